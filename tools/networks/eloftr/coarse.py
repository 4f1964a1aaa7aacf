"""Coarse matching of EfficientLoFTR: dual softmax over all pairs of cells, then the K most confident pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from matchanything_tools.networks.topk import topk

TEMPERATURE = 0.1
BORDER = 2  # cells at the border of the valid area that are never matched
PARTNERS = 9  # of one cell, at most; see best_pairs


def confidence(features0: Tensor, features1: Tensor) -> Tensor:
    """[C, N0] and [C, N1] -> confidence [N0, N1]: softmax over image 0 times softmax over image 1, in their precision.

    There is no mutual nearest neighbour test: a cell may have several partners, as in the original.
    """
    width = features0.shape[0]
    similarity = (features0 * (1 / (width * TEMPERATURE))).T @ features1
    return torch.softmax(similarity, 0) * torch.softmax(similarity, 1)


def best_pairs(conf: Tensor, size0: tuple[int, int], size1: tuple[int, int], count: int) -> tuple[Tensor, ...]:
    """The `count` largest entries of conf [h0 * w0, h1 * w1], best first: float32 scores [K], cells i [K] and j [K].

    Each row gives its PARTNERS largest entries, and the K largest of these are taken. Confidences of a row sum to at
    most 1, so that this holds every entry above 1 / (PARTNERS + 1), whatever the matrix: all that the threshold of the
    published configuration lets pass. Pairs in the border, and rows added where there are fewer than K, have score 0.
    """
    (h0, w0), (h1, w1) = size0, size1
    best, partner = torch.topk(conf, PARTNERS)
    allowed = _inside(h0, w0, conf.device)[:, None] * _inside(h1, w1, conf.device).index_select(
        0, partner.reshape(-1)
    ).reshape(-1, PARTNERS)
    scores, place = _largest((best.float() * allowed).reshape(-1), count)
    return scores, quotient(place, PARTNERS)[0], partner.reshape(-1).index_select(0, place)


def quotient(index: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder of indices >= 0. One integer division: // and torch.div export as seven operators each."""
    whole: Tensor = torch.ops.prims.div(index, divisor)
    return whole, index - whole * divisor


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Top-K of a vector that may be shorter than K: then filled with value 0 at index 0.

    Long vectors of known length are searched in groups side by side, then their winners: the same result, several
    times faster on GPUs whose top-K works on one vector with one block of threads.
    """
    length = values.shape[0]
    if not isinstance(length, int) or length < count:
        best, index = topk(F.pad(values, (0, count)), count)
        inside = index < length
        return best * inside.to(best.dtype), torch.where(inside, index, torch.zeros_like(index))
    groups = round(math.sqrt(length / count))
    if groups < 2:
        return topk(values, count)
    size = -(-length // groups)
    table = F.pad(values, (0, groups * size - length), value=-1.0).reshape(groups, size)
    winners, place = topk(table, min(count, size))
    place = place + size * torch.arange(groups, device=values.device)[:, None]
    best, index = topk(winners.reshape(-1), count)
    return best, place.reshape(-1).index_select(0, index)


def _inside(height: int, width: int, device: torch.device) -> Tensor:
    """[height * width] float32: 1 where a cell may be matched, 0 in the border."""
    rows, columns = (
        ((index >= BORDER) & (index < length - BORDER)).to(torch.float32)
        for length in (height, width)
        for index in (torch.arange(length, device=device),)
    )
    return (rows[:, None] * columns).reshape(-1)
