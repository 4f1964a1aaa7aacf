"""The local affine map between two images, from where the neighbours of a cell went.

Many tiny operators take a GPU longer than a large one. So the columns of the tensors below are ordered, and repeated,
in such a way that each of them is used whole.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

NEIGHBOURS = 5  # cells per side of the neighbourhood
PRIOR = 2.0 / NEIGHBOURS**2  # cells^2: how much the map of the whole image counts where neighbours are few
WHOLE_PRIOR = 1 / 64  # cells^2: keeps the fit over the whole image from dividing by zero
ONE, X, Y, U, V, XX, XY, YY, UX, UY, VX, VY = range(12)  # the columns of sums over cells
MEANS = {XX: (X, X), XY: (X, Y), YY: (Y, Y), UX: (U, X), UY: (U, Y), VX: (V, X), VY: (V, Y)}
# Each entry of the solution, and each determinant, is a * b - c * d of these moments, see _solve.
A = (UX, UY, VX, VY, *[YY] * 4, *[UX] * 4)
B = (YY, XX, YY, XX, *[XX] * 4, *[VY] * 4)
C = (UY, UX, VY, VX, *[XY] * 4, *[UY] * 4)
D = (XY, XY, XY, XY, *[XY] * 4, *[VX] * 4)
MOMENTS = (*A, *B, *C, *D)


def local_affine(
    targets: tuple[int, int] | torch.Size | Tensor,
    partner: Tensor,
    confidence: Tensor,
    shape: tuple[int, int] | torch.Size,
    cells: Tensor,
    highest: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weighted least squares over 5x5 cells, drawn towards the fit over all cells.

    shape (h, w): cells of image 0, every one of which has a partner [h * w]: a cell of image 1, whose shape is
    `targets` (or whose places in cells [N, 2] it is), with a confidence [h * w], `highest` [1] at most. cells [K]: the
    wanted ones of image 0.
    Returns [K, 4], the rows of px of image 0 to px of image 1, one after the other, and the determinant [K, 4], four
    times the same.
    """
    height, width = shape
    x, y = _places(shape, partner.device).unbind(1)
    targets = targets if isinstance(targets, Tensor) else _places(targets, partner.device)
    u, v = targets.unbind(1)
    from0 = torch.stack((x * 0 + 1, x, y, x * 0 + 1, x * 0 + 1, x * x, x * y, y * y, x, y, x, y), 1)
    from1 = torch.stack((*(u * 0 + 1,) * 3, u, v, *(u * 0 + 1,) * 3, u, u, v, v), 1)
    weighted = from1.index_select(0, partner) * from0 * confidence[:, None]
    grid = weighted.reshape(1, height, width, 12).permute(0, 3, 1, 2)
    local = F.avg_pool2d(grid, NEIGHBOURS, 1, NEIGHBOURS // 2, count_include_pad=True)
    local = local.permute(0, 2, 3, 1).reshape(-1, 12).index_select(0, cells)
    moments = _moments(torch.cat((local, weighted.sum(0, keepdim=True))))
    diagonal = torch.tensor([float(k in (XX, YY)) for k in MOMENTS], device=partner.device)
    solution, _ = _solve(moments[-1:] + WHOLE_PRIOR * diagonal)
    # The prior: its map times its weight in the place of the mixed moments, its weight on the diagonal.
    swap = torch.tensor([(UX, UY, VX, VY).index(k) if k >= UX else 0 for k in MOMENTS], device=partner.device)
    mixed = torch.tensor([PRIOR * (k >= UX) for k in MOMENTS], device=partner.device)
    prior = (solution.index_select(1, swap) * mixed + PRIOR * diagonal) * highest.clamp(min=1e-6)
    affine, area = _solve(moments + prior)
    return affine[:-1], area[:-1]


def _places(shape: tuple[int, int] | torch.Size, device: torch.device) -> Tensor:
    """(x, y) [h * w, 2] of cells, from the middle of the image: sums of squares stay small."""
    height, width = shape
    x, y = (torch.arange(length, dtype=torch.float32, device=device) for length in (width, height))
    x, y = x - x.mean(), y - y.mean()
    return torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), -1).reshape(-1, 2)


def _moments(sums: Tensor) -> Tensor:
    """Sums [N, 12] -> second moments about the means [N, MOMENTS]."""
    firsts, seconds = ([MEANS[k][side] for k in MOMENTS] for side in (0, 1))
    products, left, right = (
        sums.index_select(1, torch.tensor(index, device=sums.device)) for index in (MOMENTS, firsts, seconds)
    )
    return products - left * right / sums[:, :1].clamp(min=1e-6)


def _solve(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Moments [N, MOMENTS] -> the map cross @ inverse(scatter) row by row [N, 4], its determinant [N, 4].

    Written out: TensorRT fails on products of 2x2 matrices, and rounds operands of products to ten bits.
    """
    a, b, c, d = moments.chunk(4, 1)
    solution, scatter, cross = (a * b - c * d).chunk(3, 1)
    scatter = scatter.clamp(min=1e-10)
    return solution / scatter, cross / scatter
