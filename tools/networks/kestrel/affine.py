"""The local affine map between two images, from where the neighbours of a cell went.

Many tiny operators take a GPU longer than a large one. So all that is alike is done at once: quantities are rows, which
are cheap to pick and to take apart where columns are not, and the whole image is one more cell.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

NEIGHBOURS = 5  # cells per side of the neighbourhood
PRIOR = 2.0 / NEIGHBOURS**2  # cells^2: how much the map of the whole image counts where neighbours are few
WHOLE_PRIOR = 1 / 64  # cells^2: keeps the fit over the whole image from dividing by zero
ONE, X, Y, U, V = range(5)  # the first of the rows of sums over cells; then come the seven second moments:
XX, XY, YY, UX, UY, VX, VY = range(7)
SECONDS, *MEANS = tuple(range(5, 12)), (X, X, Y, U, U, V, V), (X, Y, Y, X, Y, X, Y)  # what they are to be about
# Each is a * b - c * d of second moments: the four entries of cross times the adjugate of scatter, the determinant of
# scatter, the determinant of cross; see _solve.
A = (UX, UY, VX, VY, XX, UX)
B = (YY, XX, YY, XX, YY, VY)
C = (UY, UX, VY, VX, XY, UY)
D = (XY, XY, XY, XY, XY, VX)
SCATTER, CROSS = 4, 5


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
    Returns [4, K], the map of px of image 0 to px of image 1, row by row, and its determinant [1, K].
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
    moments = _moments(torch.cat((local, weighted.sum(0, keepdim=True))).T)
    diagonal = _column([float(k in (XX, YY)) for k in range(7)], moments)
    whole = _solve(moments[:, -1:] + WHOLE_PRIOR * diagonal)
    # The prior: its weight on the diagonal, its map times its weight in the place of the mixed moments.
    prior = whole.index_select(0, _index((SCATTER, SCATTER, SCATTER, 0, 1, 2, 3), whole))  # row SCATTER is 1
    factors = _column([PRIOR * (k != XY) for k in range(7)], moments)
    solution = _solve(moments + prior * (factors * highest))[:, :-1]
    return solution[:4], solution[CROSS:]


def _places(shape: tuple[int, int] | torch.Size, device: torch.device) -> Tensor:
    """(x, y) [h * w, 2] of cells, from the middle of the image: sums of squares stay small."""
    height, width = shape
    x, y = (torch.arange(length, dtype=torch.float32, device=device) for length in (width, height))
    x, y = x - x.mean(), y - y.mean()
    return torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), -1).reshape(-1, 2)


def _moments(sums: Tensor) -> Tensor:
    """Sums [12, N] -> second moments about the means [7, N]."""
    # Not slices: ONNX Runtime would move the transposition behind each of them.
    one, seconds, left, right = (sums.index_select(0, _index(rows, sums)) for rows in ((ONE,), SECONDS, *MEANS))
    return seconds - left * right / one.clamp(min=1e-6)


def _solve(moments: Tensor) -> Tensor:
    """Moments [7, N] -> the map cross @ inverse(scatter) row by row, 1, its determinant: [6, N].

    Written out: TensorRT fails on products of 2x2 matrices, and rounds operands of products to ten bits.
    """
    a, b, c, d = moments.index_select(0, _index((*A, *B, *C, *D), moments)).chunk(4)
    values = a * b - c * d
    return values / values[SCATTER : SCATTER + 1].clamp(min=1e-10)


def _index(rows: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(rows, device=like.device)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)[:, None]
