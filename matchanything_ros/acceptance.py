"""Whether a homography found in matches is one: how unlikely its support is by chance, and whether it can be a view.

A count of inliers does not tell: unrelated images reach a dozen. The a-contrario significance (Moisan and Stival, IJCV
2004) asks how many inliers chance would give, and the geometry tests refuse what no camera sees of a plane.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

CELLS = 32  # grid over each image: matches in one cell are one observation


def match_significance(
    points0: Points,
    points1: Points,
    inliers: Mask,
    size0: tuple[int, int],
    size1: tuple[int, int],
    threshold_px: float,
) -> float:
    """-log10 of the expected number of homographies that so many of these matches would fit by chance.

    A-contrario: if the n points of image 1 lay anywhere in it, one would be within the threshold of its prediction with
    p = pi t^2 / area, and NFA = (n - 4) C(n, k) C(k, 4) p^(k - 4). Neighbouring matches move together and are no
    independent witnesses, so n and k count the pairs of cells (of a grid over both images) that matches and inliers
    occupy, not the matches.
    """
    sizes = np.array([size0, size1], np.float64)
    cells = np.concatenate([points0 / sizes[0], points1 / sizes[1]], axis=1)
    ids = np.clip((cells * CELLS).astype(np.int64), 0, CELLS - 1)
    n = _distinct(ids[:, :2], ids[:, 2:])
    k = _distinct(ids[inliers, :2], ids[inliers, 2:])
    if k <= 4:
        return 0.0
    p = min(math.pi * threshold_px**2 / (size1[0] * size1[1]) * _growth(n, len(points0)), 0.5)
    log_nfa = math.log10(max(n - 4, 1)) + _log10_comb(n, k) + _log10_comb(k, 4) + (k - 4) * math.log10(p)
    return -log_nfa


def _growth(cells: int, matches: int) -> float:
    """With several matches in a cell, the best of them counts: the chance of a cell grows with their number."""
    return max(matches / max(cells, 1), 1.0)


def _distinct(cells0: npt.NDArray[np.int64], cells1: npt.NDArray[np.int64]) -> int:
    """Number of cells occupied, in the image where they are fewer: many-to-one matches do not add up."""
    return min(len(np.unique(cells[:, 0] * CELLS + cells[:, 1])) for cells in (cells0, cells1))


def _log10_comb(n: int, k: int) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(10)


def plausible(matrix: Matrix, support0: Points, support1: Points) -> bool:
    """Whether the matrix is a view of a plane, seen from its support (inliers [N, 2] in both images).

    False for supports that are a line or a point in either image, for mirror images, for near-singular matrices, and
    where the local scale on the support differs by more than a factor of 50 between directions or places.
    """
    for support in (support0, support1):
        spread = np.linalg.svd(support - support.mean(0), compute_uv=False) / math.sqrt(len(support))
        if spread[1] < 1.0 or spread[1] < 0.01 * spread[0]:  # under a pixel wide, or 100 times longer than wide
            return False
    homogeneous = support0 @ matrix[2, :2] + matrix[2, 2]
    if not (np.all(homogeneous > 0) or np.all(homogeneous < 0)):
        return False  # the horizon passes through the support
    stretch = np.array([np.linalg.svd(_jacobian(matrix, point), compute_uv=False) for point in _corners(support0)])
    turned = [np.linalg.det(_jacobian(matrix, point)) for point in _corners(support0)]
    return bool(min(turned) > 0 and stretch.min() > 1e-3 and stretch.max() / stretch.min() < 50)


def _corners(support: Points) -> Points:
    """The extreme points of the support along four directions, and its centre."""
    directions = np.array([[1, 0], [0, 1], [1, 1], [1, -1]], np.float64)
    along = support @ directions.T
    picked = np.concatenate([along.argmin(0), along.argmax(0)])
    return np.concatenate([support[picked], support.mean(0, keepdims=True)])


def _jacobian(matrix: Matrix, point: Points) -> Points:
    u, v, w = matrix @ np.append(point, 1.0)
    return (matrix[:2, :2] * w - np.outer([u, v], matrix[2, :2])) / (w * w)
