"""Coarse matching of EfficientLoFTR: dual softmax over all pairs of cells, then the K most confident pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from matchanything_tools.networks.topk import topk

TEMPERATURE = 0.1
BORDER = 2  # cells at the border of the valid area that are never matched


def confidence(features0: Tensor, features1: Tensor) -> Tensor:
    """float32 [C, N0] and [C, N1] -> confidence [N0, N1]: softmax over image 0 times softmax over image 1.

    There is no mutual nearest neighbour test: a cell may have several partners, as in the original.
    """
    width = features0.shape[0]
    similarity = (features0 * (1 / (width * TEMPERATURE))).T @ features1
    return torch.softmax(similarity, 0) * torch.softmax(similarity, 1)


def best_pairs(conf: Tensor, size0: tuple[int, int], size1: tuple[int, int], count: int) -> tuple[Tensor, ...]:
    """The `count` largest entries of conf [h0 * w0, h1 * w1], best first: scores [K], cells i [K] and j [K].

    Exact and of fixed shape: whatever is among the K best of the matrix lies in one of the K rows with the largest
    maxima, and there in one of the K (row of conf, row of image 1) stretches with the largest maxima. Pairs in the
    border, and rows added where there are fewer than K, have score 0.
    """
    (h0, w0), (h1, w1) = size0, size1
    inner = conf.reshape(h0 * w0 * h1, w1)[:, BORDER : w1 - BORDER]
    width = w1 - 2 * BORDER
    stretch = inner.amax(1).reshape(h0 * w0, h1) * _allowed(h0, w0, h1, conf.device)
    rows = _largest(stretch.amax(1), count)[1]
    chosen, place = _largest(stretch.index_select(0, rows).reshape(-1), count)
    source, rows1 = quotient(place, h1)
    cells0 = rows.index_select(0, source)
    candidates = inner.index_select(0, cells0 * h1 + rows1) * (chosen > 0).to(conf.dtype)[:, None]
    scores, place = _largest(candidates.reshape(-1), count)
    which, column = quotient(place, width)
    return scores, cells0.index_select(0, which), rows1.index_select(0, which) * w1 + column + BORDER


def quotient(index: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder of indices >= 0. One integer division: // and torch.div export as seven operators each."""
    whole: Tensor = torch.ops.prims.div(index, divisor)
    return whole, index - whole * divisor


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Top-K of a vector that may be shorter than K: then filled with value 0 at index 0."""
    length = values.shape[0]
    if isinstance(length, int) and length >= count:
        return topk(values, count)
    best, index = topk(F.pad(values, (0, count)), count)
    inside = index < length
    return best * inside.to(best.dtype), torch.where(inside, index, torch.zeros_like(index))


def _allowed(h0: int, w0: int, h1: int, device: torch.device) -> Tensor:
    """[h0 * w0, h1] float32: 1 where neither the cell of image 0 nor the row of image 1 lies in the border."""
    rows0, columns0, rows1 = (_inside(length, device) for length in (h0, w0, h1))
    return (rows0[:, None] * columns0).reshape(-1, 1) * rows1


def _inside(length: int, device: torch.device) -> Tensor:
    index = torch.arange(length, device=device)
    return ((index >= BORDER) & (index < length - BORDER)).to(torch.float32)
