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
    everywhere = _moments(weighted.sum(0, keepdim=True))
    scatter, cross = _moments(local)
    whole = _solve(everywhere[0] + torch.eye(2, device=x.device), everywhere[1])
    prior = PRIOR * confidence.amax(0).clamp(min=1e-6) * torch.eye(2, device=x.device)
    return _solve(scatter + prior, cross + whole @ prior)


def _moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Sums [N, 12] -> scatter of x [N, 2, 2] and cross scatter of u and x [N, 2, 2], about the weighted means."""
    weight = sums[:, :1].clamp(min=1e-6)
    xx = sums[:, 5:7] - sums[:, 1:3] * sums[:, 1:3] / weight
    xy = sums[:, 7:8] - sums[:, 1:2] * sums[:, 2:3] / weight
    ux = sums[:, 8:10] - sums[:, 1:3] * sums[:, 3:4] / weight
    vx = sums[:, 10:12] - sums[:, 1:3] * sums[:, 4:5] / weight
    scatter = torch.cat((xx[:, :1], xy, xy, xx[:, 1:]), 1).reshape(-1, 2, 2)
    return scatter, torch.cat((ux, vx), 1).reshape(-1, 2, 2)


def _solve(scatter: Tensor, cross: Tensor) -> Tensor:
    """cross @ inverse(scatter) for symmetric positive definite 2x2 matrices."""
    a, b, d = scatter[:, 0, 0], scatter[:, 0, 1], scatter[:, 1, 1]
    adjoint = torch.stack((d, -b, -b, a), 1).reshape(-1, 2, 2)
    return cross @ adjoint / (a * d - b * b).clamp(min=1e-6)[:, None, None]
