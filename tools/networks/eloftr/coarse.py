"""Coarse matching of EfficientLoFTR: dual softmax over all pairs of cells, then the K most confident pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from matchanything_tools.networks.topk import quotient, topk

from .grid import from_blocks, to_blocks

CELL = 8  # pixels of a cell
TEMPERATURE = 0.1
BORDER = 2  # cells at the border of the valid area that are never matched
PARTNERS = 9  # of one cell, at most; see best_pairs


class Cells(NamedTuple):
    """The cells of an image: one 4x4 block of the transformer after the other.

    In this order a row of similarities changes slowly, for which ONNX Runtime's top-K takes half the time.

    corner: [N, 2] float32, (x, y) of a cell's first pixel. window: [N] int64, index of that pixel in the fine features,
    half as large, as one row of pixels. matched: [M] int64, line by line the cells that may be matched, all but the
    border. rank: [N] int64, place of a cell in `matched`, of another one in the border. inside: [N] float32, 1 for
    cells in `matched`, 0 in the border.
    """

    corner: Tensor
    window: Tensor
    matched: Tensor
    rank: Tensor
    inside: Tensor


def make_cells(rows: int, columns: int, stride: int, first: int, device: torch.device) -> Cells:
    """rows, columns: cells. stride: pixels in a row of the fine features. first: index of the first of them."""
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    inside = _inside(row, rows)[:, None] * _inside(column, columns)
    down, across = ((places - BORDER).clamp(min=0) for places in (row, column))
    rank = down.clamp(max=rows - 2 * BORDER - 1)[:, None] * (columns - 2 * BORDER)
    rank = rank + across.clamp(max=columns - 2 * BORDER - 1)
    number = torch.arange(rows * columns, device=device).reshape(1, -1, 16, 1)
    matched = from_blocks(number, rows // 4, columns // 4)[0, 0, BORDER : rows - BORDER, BORDER : columns - BORDER]

    def table(values: Tensor) -> Tensor:
        return to_blocks(values.expand(rows, columns)[None, None], rows // 4, columns // 4).reshape(-1)

    x, y = (table(values.float() * CELL) for values in (column, row[:, None]))
    half = CELL // 2
    window = table(row[:, None] * (half * stride) + column * half)
    # Within what can be read: this moves windows at the border only, which are never matched.
    window = window.clamp(stride + 1, (half * rows - 4) * stride - 5) + first
    return Cells(torch.stack([x, y], 1), window, matched.reshape(-1), table(rank), table(inside))


def confidences(features0: Tensor, features1: Tensor, cells0: Tensor, cells1: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of two softmaxes of the similarities of all cells, [N0, C] and [N1, C], in their precision, each for
    some of them: over image 1 [M0, N1] for cells0 [M0] of image 0, over image 0 [M1, N0] for cells1 [M1] of image 1.

    The confidence of a pair is the exponential of their sum, which is taken of few pairs. Softmax itself divides
    numbers that, far below the largest, are subnormal, for which a GPU has no fast division: on an H200 one of
    10000 x 10816 took 447 us of real similarities and 268 us of others.
    The similarities are computed twice, because a second product costs less than to transpose the largest matrix of
    the network.
    """
    scale = 1 / (features0.shape[1] * TEMPERATURE)
    # Of image 0 in both, whose values are rounded then; ONNX Runtime makes the factors part of the products.
    over1 = (features0.index_select(0, cells0) * scale) @ features1.T
    over0 = features1.index_select(0, cells1) @ (features0 * scale).T
    return torch.log_softmax(over1, 1), torch.log_softmax(over0, 1)


def best_pairs(over1: Tensor, over0: Tensor, cells0: Cells, cells1: Cells, count: int) -> tuple[Tensor, ...]:
    """The `count` most confident pairs, best first: float32 scores [K], cells i [K] and j [K].

    over1 [M0, N1] and over0 [M1, N0]: see `confidences`, for the cells that may be matched. Each row of over1 gives its
    PARTNERS largest entries, and the K most confident of these pairs are taken. A confidence is at most its factor, and
    factors of a row sum to 1: this holds every pair above 1 / (PARTNERS + 1), all that the threshold of the published
    configuration lets pass. There is no mutual nearest neighbour test: a cell may have several partners, as in the
    original. Pairs in the border, and rows added where there are fewer than K, have score 0.
    """
    best, partner = torch.topk(over1, PARTNERS)
    partner = partner.reshape(-1)
    start = (cells1.rank * over0.shape[1]).index_select(0, partner).reshape(-1, PARTNERS)  # of the partner's row
    other = over0.reshape(-1).index_select(0, (start + cells0.matched[:, None]).reshape(-1)).reshape(-1, PARTNERS)
    inside = cells1.inside.index_select(0, partner).reshape(-1, PARTNERS)
    confidence = (best.float() + other.float()).exp() * inside
    scores, index = _largest(confidence.reshape(-1), count)
    return scores, cells0.matched.index_select(0, quotient(index, PARTNERS)[0]), partner.index_select(0, index)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Top-K of a vector that may be shorter than K: then filled with value 0 at index 0."""
    length = values.shape[0]
    if isinstance(length, int) and length >= count:
        return topk(values, count)
    best, index = topk(F.pad(values, (0, count)), count)
    inside = index < length
    return best * inside.to(best.dtype), torch.where(inside, index, torch.zeros_like(index))


def _inside(index: Tensor, length: int) -> Tensor:
    return ((index >= BORDER) & (index < length - BORDER)).to(torch.float32)
