"""Coarse matching of EfficientLoFTR: dual softmax over all pairs of cells, then the K most confident pairs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from matchanything_tools.networks.topk import quotient, topk

from .transformer import to_blocks

CELL = 8  # pixels of a cell
TEMPERATURE = 0.1
BORDER = 2  # cells at the border of the valid area that are never matched
PARTNERS = 9  # of one cell, at most; see best_pairs


class Cells(NamedTuple):
    """The cells of an image: one 4x4 block of the transformer after the other.

    In this order a row of similarities changes slowly, for which ONNX Runtime's top-K takes half the time.

    inside: [N] float32, 1 where a cell may be matched and 0 in the border. corner: [N, 2] float32, (x, y) of its first
    pixel. window: [N] int64, index of that pixel in the fine features, half as large, as one row of pixels.
    """

    inside: Tensor
    corner: Tensor
    window: Tensor


def make_cells(rows: int, columns: int, stride: int, first: int, device: torch.device) -> Cells:
    """rows, columns: cells. stride: pixels in a row of the fine features. first: index of the first of them."""
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    inside = _inside(row, rows)[:, None] * _inside(column, columns)

    def table(values: Tensor) -> Tensor:
        return block_by_block(to_blocks(values.expand(rows, columns)[None, None], rows // 4, columns // 4)).reshape(-1)

    x, y = (table(values.float() * CELL) for values in (column, row[:, None]))
    half = CELL // 2
    window = table(row[:, None] * (half * stride) + column * half)
    # Within what can be read: this moves windows at the border only, which are never matched.
    window = window.clamp(stride + 1, (half * rows - 4) * stride - 5) + first
    return Cells(table(inside), torch.stack([x, y], 1), window)


def block_by_block(x: Tensor) -> Tensor:
    """What the transformer gives, [16, T, 1, C], as rows in the order of `Cells`, [N, C]."""
    return x.transpose(0, 1).reshape(-1, x.shape[3])


def confidences(features0: Tensor, features1: Tensor) -> tuple[Tensor, Tensor]:
    """[N0, C] and [N1, C] -> softmax over image 1 [N0, N1], softmax over image 0 [N1, N0], in their precision.

    The confidence of a pair is their product. The similarities are computed twice, because a second product costs less
    than to transpose the largest matrix of the network.
    """
    width = features0.shape[1]
    scaled = features0 * (1 / (width * TEMPERATURE))
    return torch.softmax(scaled @ features1.T, 1), torch.softmax(features1 @ scaled.T, 1)


def best_pairs(over1: Tensor, over0: Tensor, inside0: Tensor, inside1: Tensor, count: int) -> tuple[Tensor, ...]:
    """The `count` most confident pairs, best first: float32 scores [K], cells i [K] and j [K].

    over1 [N0, N1] and over0 [N1, N0]: see `confidences`. Each row of over1 gives its PARTNERS largest entries, and the
    K most confident of these pairs are taken. A confidence is at most its factor, and factors of a row sum to 1: this
    holds every pair above 1 / (PARTNERS + 1), all that the threshold of the published configuration lets pass. There is
    no mutual nearest neighbour test: a cell may have several partners, as in the original. Pairs in the border, and
    rows added where there are fewer than K, have score 0.
    """
    best, partner = torch.topk(over1, PARTNERS)
    cells0 = over1.shape[0]
    place = partner * cells0 + torch.arange(cells0, device=partner.device)[:, None]
    other = over0.reshape(-1).index_select(0, place.reshape(-1)).reshape(-1, PARTNERS)
    allowed = inside0[:, None] * inside1.index_select(0, partner.reshape(-1)).reshape(-1, PARTNERS)
    scores, place = _largest((best.float() * other.float() * allowed).reshape(-1), count)
    return scores, quotient(place, PARTNERS)[0], partner.reshape(-1).index_select(0, place)


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
    surplus = groups * size - length
    table = (F.pad(values, (0, surplus), value=-1.0) if surplus else values).reshape(groups, size)
    winners, place = topk(table, min(count, size))
    place = place + size * torch.arange(groups, device=values.device)[:, None]
    best, index = topk(winners.reshape(-1), count)
    return best, place.reshape(-1).index_select(0, index)


def _inside(index: Tensor, length: int) -> Tensor:
    return ((index >= BORDER) & (index < length - BORDER)).to(torch.float32)
