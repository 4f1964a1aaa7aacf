"""Two views of one photograph: random homographies, warps, and the cells and offsets that follow from them.

Homographies act on pixels (x, y), centres at integers. `difficulty` [B] in 0..1 widens every range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from matchanything_tools.networks.kestrel.model import CELL, cell_centres

MAX_ZOOM = 4.0  # relative scale of two views at difficulty 1
PERSPECTIVE = 0.33  # of the projective coefficients, view half-sides as unit


def uniform(count: int, low: float, high: float, device: torch.device) -> Tensor:
    """[count] uniform numbers."""
    return torch.rand(count, device=device) * (high - low) + low


def random_views(sizes: Tensor, shape: tuple[int, int], difficulty: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two windows on each photograph.

    sizes [B, 2] (width, height) of the photographs; shape (height, width) of the views.
    Returns M0, M1 [B, 3, 3], pixels of the view -> pixels of the photograph, and the windows' sides s0, s1 [B] in
    pixels of the photograph. Zoom up to 4x, any rotation, shear, perspective, overlap down to about 15 %.
    """
    count, device = len(sizes), sizes.device
    shorter = sizes.min(1).values
    spread = uniform(count, -1, 1, device)
    zoom = torch.where(torch.rand(count, device=device) < 0.5, spread * math.log(MAX_ZOOM) * difficulty, spread * 0.25)
    base = shorter * uniform(count, 0.4, 1.0, device)
    side0, side1 = base * torch.exp(zoom / 2), base * torch.exp(-zoom / 2)
    excess = (torch.maximum(side0, side1) / (1.15 * shorter)).clamp(min=1)
    side0, side1 = side0 / excess, side1 / excess
    upright = torch.rand(count, device=device) < 0.6
    angle0 = torch.where(upright, uniform(count, -0.2, 0.2, device), uniform(count, -math.pi, math.pi, device))
    gentle = torch.rand(count, device=device) < 0.5
    turn = torch.where(
        gentle, uniform(count, -0.5, 0.5, device), uniform(count, -math.pi, math.pi, device) * difficulty
    )
    larger = torch.maximum(side0, side1)
    centre0 = sizes / 2 + (torch.rand(count, 2, device=device) - 0.5) * (sizes - larger[:, None] * 0.9).clamp(min=0)
    reach = 0.1 + 0.6 * difficulty * torch.rand(count, device=device)
    centre1 = centre0 + (torch.rand(count, 2, device=device) * 2 - 1) * (larger * reach)[:, None]
    margin = side1[:, None] * 0.35
    centre1 = torch.minimum(torch.maximum(centre1, margin), sizes - margin)
    tilt = torch.rand(count, device=device) * PERSPECTIVE * difficulty
    return (
        _view(shape, side0, angle0, centre0, 0.08 * difficulty, difficulty),
        _view(shape, side1, angle0 + turn, centre1, tilt, difficulty),
        side0,
        side1,
    )


def _view(
    shape: tuple[int, int], side: Tensor, angle: Tensor, centre: Tensor, tilt: Tensor, difficulty: Tensor
) -> Tensor:
    count, device = len(side), side.device
    height, width = shape
    unit = 2 / math.sqrt(height * width)
    normalise = torch.tensor(
        [[unit, 0, -unit * (width - 1) / 2], [0, unit, -unit * (height - 1) / 2], [0, 0, 1.0]], device=device
    )
    zero, one = torch.zeros(count, device=device), torch.ones(count, device=device)

    def signed(amount: Tensor | float) -> Tensor:
        return uniform(count, -1, 1, device) * amount

    stretch = torch.exp(signed(0.15) * difficulty)
    shape_matrix = torch.stack(
        (
            stretch,
            signed(0.12) * difficulty,
            zero,
            signed(0.12) * difficulty,
            one / stretch,
            zero,
            signed(tilt),
            signed(tilt),
            one,
        ),
        -1,
    ).view(count, 3, 3)
    radius = side / 2
    place = torch.stack(
        (
            radius * angle.cos(), -radius * angle.sin(), centre[:, 0],
            radius * angle.sin(), radius * angle.cos(), centre[:, 1],
            zero, zero, one,
        ), -1
    ).view(count, 3, 3)  # fmt: skip
    return place @ shape_matrix @ normalise


def warp(matrices: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """points [B, N, 2] through matrices [B, 3, 3]; also which of them [B, N] lie in front (positive depth)."""
    mapped = points @ matrices[:, :, :2].transpose(1, 2) + matrices[:, None, :, 2]
    depth = mapped[..., 2:]
    safe = torch.where(depth.abs() < 1e-4, torch.full_like(depth, 1e-4), depth)
    return mapped[..., :2] / safe, depth[..., 0] > 1e-3


def jacobian(matrices: Tensor, points: Tensor) -> Tensor:
    """Local affine maps [B, N, 2, 2] of homographies [B, 3, 3] at points [B, N, 2]."""
    mapped = points @ matrices[:, :, :2].transpose(1, 2) + matrices[:, None, :, 2]
    depth = mapped[..., 2:].clamp(min=1e-3)
    target = mapped[..., :2] / depth
    outer = target[..., :, None] * matrices[:, None, 2:, :2]
    return (matrices[:, None, :2, :2] - outer) / depth[..., None]


def between(matrices0: Tensor, matrices1: Tensor) -> Tensor:
    """Homographies [B, 3, 3] from pixels of view 0 to pixels of view 1, solved in float64.

    |H[2, 2]| = 1: pixel (0, 0) of view 0 may lie behind the horizon of view 1, and depth must stay positive in front.
    """
    matrix = torch.linalg.solve(matrices1.double(), matrices0.double())
    return (matrix / matrix[:, 2:, 2:].abs()).float()


@dataclass
class Targets:
    """Where the cells of one view go in the other: L = h * w cells, row by row."""

    points: Tensor  # [B, L, 2] px of the other view
    cells: Tensor  # [B, L] index of the cell they fall into (clamped where invalid)
    valid: Tensor  # [B, L] covisible: inside both photographs and both views


def cell_targets(matrices: Tensor, inside: Tensor, inside_other: Tensor, shape: tuple[int, int]) -> Targets:
    """Targets of every cell under homographies [B, 3, 3].

    inside, inside_other [B, L]: whether the cell shows the photograph, in this view and in the other.
    """
    rows, columns = shape[0] // CELL, shape[1] // CELL
    centres = cell_centres(rows, columns, matrices.device).expand(len(matrices), -1, -1)
    points, front = warp(matrices, centres)
    index = ((points + 0.5) / CELL).floor().clamp(-1, 1 << 15).long()
    limit = torch.tensor([columns, rows], device=matrices.device)
    within = ((index >= 0) & (index < limit)).all(-1)
    index = torch.minimum(index.clamp(min=0), limit - 1)
    cells = index[..., 1] * columns + index[..., 0]
    return Targets(points, cells, front & within & inside & inside_other.gather(1, cells))
