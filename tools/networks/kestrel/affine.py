"""The local affine map between two images, from where the neighbours of a cell went."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from matchanything_tools.networks.kestrel.model import cell_centres

NEIGHBOURS = 5  # cells per side of the neighbourhood
PRIOR = 2.0 * 64.0  # px^2: how much the map of the whole image counts where neighbours are few


def local_affine(points: Tensor, confidence: Tensor, shape: tuple[int, int] | torch.Size) -> Tensor:
    """Weighted least squares over 5x5 cells, drawn towards the fit over all cells.

    points [h * w, 2]: px of image 1 that the centres of image 0's cells go to; confidence [h * w]; shape (h, w).
    Returns [h * w, 2, 2], px of image 0 to px of image 1.
    """
    height, width = shape
    centres = cell_centres(height, width, points.device)
    total = confidence.sum().clamp(min=1e-6)
    x = centres - (centres * confidence[:, None]).sum(0) / total
    u = points - (points * confidence[:, None]).sum(0) / total
    terms = torch.cat(
        (torch.ones_like(x[:, :1]), x, u, x * x, x[:, :1] * x[:, 1:], x * u[:, :1], x * u[:, 1:]), 1
    )  # 1, x, y, u, v, xx, yy, xy, xu, yu, xv, yv
    weighted = terms * confidence[:, None]
    grid = weighted.transpose(0, 1).reshape(1, 12, height, width)
    area = NEIGHBOURS * NEIGHBOURS
    local = F.avg_pool2d(grid, NEIGHBOURS, 1, NEIGHBOURS // 2, count_include_pad=True) * area
    local = local.reshape(12, -1).transpose(0, 1)
    (whole_scatter, whole_cross), (scatter, cross) = _moments(weighted.sum(0, keepdim=True)), _moments(local)
    whole = _solve(whole_scatter, whole_cross, torch.ones_like(total))
    prior = PRIOR * confidence.amax(0).clamp(min=1e-6)
    return _solve(scatter, cross + whole * prior, prior).reshape(-1, 2, 2)


def _moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Sums [N, 12] -> scatter of x as xx, xy, yy [N, 3] and of u with x as ux, uy, vx, vy [N, 4], about the means."""
    weight = sums[:, :1].clamp(min=1e-6)
    x, y, u, v = (sums[:, k : k + 1] for k in (1, 2, 3, 4))
    squares = torch.cat((sums[:, 5:6], sums[:, 7:8], sums[:, 6:7]), 1)
    scatter = squares - torch.cat((x * x, x * y, y * y), 1) / weight
    return scatter, sums[:, 8:12] - torch.cat((u * x, u * y, v * x, v * y), 1) / weight


def _solve(scatter: Tensor, cross: Tensor, ridge: Tensor) -> Tensor:
    """cross @ inverse(scatter + ridge), row by row [N, 4]; written out: TensorRT fails on products of 2x2 matrices."""
    a, b, d = scatter[:, 0:1] + ridge, scatter[:, 1:2], scatter[:, 2:3] + ridge
    first, second = cross[:, 0::2], cross[:, 1::2]  # ux, vx and uy, vy
    solved = torch.stack((first * d - second * b, second * a - first * b), 2)
    return solved.flatten(1) / (a * d - b * b).clamp(min=1e-6)
