"""The local affine map between two images, from where the neighbours of a cell went."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from matchanything_tools.networks.kestrel.model import cell_centres

NEIGHBOURS = 5  # cells per side of the neighbourhood
PRIOR = 2.0 * 64.0 / NEIGHBOURS**2  # px^2: how much the map of the whole image counts where neighbours are few
X, Y, U, V = range(4)


def local_affine(points: Tensor, confidence: Tensor, shape: tuple[int, int] | torch.Size, cells: Tensor) -> Tensor:
    """Weighted least squares over 5x5 cells, drawn towards the fit over all cells.

    points [h * w, 2]: px of image 1 that the centres of image 0's cells go to; confidence [h * w]; shape (h, w);
    cells [K]: the wanted ones. Returns [K, 4], the rows of px of image 0 to px of image 1, one after the other.
    """
    height, width = shape
    weight = confidence[:, None]
    both = torch.cat((cell_centres(height, width, points.device), points), 1)
    both = both - (both * weight).sum(0) / confidence.sum().clamp(min=1e-6)
    products = _columns(both, (X, X, Y, U, U, V, V)) * _columns(both, (X, Y, Y, X, Y, X, Y))
    weighted = torch.cat((torch.ones_like(weight), both, products), 1) * weight
    grid = weighted.reshape(1, height, width, 12).permute(0, 3, 1, 2)
    local = F.avg_pool2d(grid, NEIGHBOURS, 1, NEIGHBOURS // 2, count_include_pad=True)
    local = local.permute(0, 2, 3, 1).reshape(-1, 12).index_select(0, cells)
    # Positions are about the means of the whole: its sums are its moments.
    whole = _solve(weighted[:, 5:].sum(0, keepdim=True), torch.ones_like(weight[:1]))
    prior = PRIOR * confidence.amax(0, keepdim=True)[:, None].clamp(min=1e-6)
    return _solve(_moments(local), prior, whole)


def _moments(sums: Tensor) -> Tensor:
    """Sums [N, 12] of 1, x, y, u, v and xx, xy, yy, ux, uy, vx, vy -> the latter about the means [N, 7]."""
    means = _columns(sums, (1 + X, 1 + X, 1 + Y, 1 + U, 1 + U, 1 + V, 1 + V))
    return sums[:, 5:] - means * _columns(sums, (1 + X, 1 + Y, 1 + Y, 1 + X, 1 + Y, 1 + X, 1 + Y)) / sums[:, :1].clamp(
        min=1e-6
    )


def _solve(moments: Tensor, ridge: Tensor, prior: Tensor | None = None) -> Tensor:
    """(cross + ridge prior) @ inverse(scatter + ridge), row by row [N, 4].

    Written out: TensorRT fails on products of 2x2 matrices, and rounds operands of products to ten bits.
    """
    cross = moments[:, 3:]
    if prior is not None:
        cross = cross + prior * ridge
    squares, mixed = _columns(moments, (2, 0, 2, 0)) + ridge, moments[:, 1:2]
    solved = cross * squares - _columns(cross, (1, 0, 3, 2)) * mixed
    return solved / (squares[:, :1] * squares[:, 1:2] - mixed * mixed).clamp(min=1e-6)


def _columns(x: Tensor, index: tuple[int, ...]) -> Tensor:
    return x.index_select(1, torch.tensor(index, device=x.device))
