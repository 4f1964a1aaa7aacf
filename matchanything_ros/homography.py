"""Robust homography from matches, or the reason why there is none.

MAGSAC++ finds it (Barath et al., CVPR 2020, OpenCV's USAC_MAGSAC), a Gauss-Newton refit over all matches makes it
precise, and three tests refuse what is not one: geometry (folds, flips, collinear support), the share of inliers, and
an a-contrario significance (Moisan and Stival, IJCV 2004).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import cv2
import numpy as np
import numpy.typing as npt

from matchanything_ros.acceptance import match_significance, plausible
from matchanything_ros.errors import UserError

Points = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

MIN_SIGNIFICANCE = 10.0  # -log10 of the false alarms expected if keypoints were spread evenly; they cluster (see below)
ROUNDS = 2  # of the refit, the first at the threshold's scale
TUNING = 4.685  # sigmas: the customary scale of a redescending weight, 95 % as precise as least squares on pure noise
NEAR = 1e-9  # third coordinate of what lies on the horizon
MIN_MATCHES = 8  # four fix a homography; as many again must agree with it before it says anything


class Status(IntEnum):
    """Outcome of the estimate; the same numbers as the constants of msg/Homography.msg."""

    OK = 0
    NOT_COMPUTED = 1
    TOO_FEW_MATCHES = 2
    DEGENERATE = 3
    LOW_INLIER_RATIO = 4
    NOT_SIGNIFICANT = 5


@dataclass(frozen=True)
class HomographyEstimate:
    """A homography from pixels of image 0 to pixels of image 1, or why there is none.

    matrix: float64 [3, 3] with matrix[2, 2] = 1, pixel centres at integers; None unless status is OK.
    inliers: bool [N], matches within the threshold of the candidate (also when it was refused).
    reprojection_error_px: mean over the inliers, pixels of image 1; NaN without inliers.
    significance: -log10 of the expected number of false alarms; higher is surer, 0 and below is chance.
    """

    status: Status
    matrix: Matrix | None
    inliers: Mask
    num_matches: int
    num_inliers: int
    inlier_ratio: float
    reprojection_error_px: float
    significance: float


def estimate_homography(
    keypoints0: Points,
    keypoints1: Points,
    size0: tuple[int, int],
    size1: tuple[int, int],
    threshold_px: float = 3.0,
    min_inlier_ratio: float = 0.0,
    min_significance: float = MIN_SIGNIFICANCE,
    max_iterations: int = 10_000,
    refine: bool = True,
) -> HomographyEstimate:
    """Estimate the homography of matches [N, 2] (pixels of the original images, (x, y)); deterministic.

    size0, size1: (width, height). threshold_px: largest reprojection error of an inlier, pixels of image 1.
    min_significance: least significance of an accepted estimate. On unrelated images wrong estimates from unfiltered
        ALIKED matches reached the default in 2 of 148 pairs, and from filtered ones 1.0; solved pairs had above 100.
    Raises UserError if the threshold is not a positive number or the points are not finite pairs.
    """
    if not (math.isfinite(threshold_px) and threshold_px > 0):
        raise UserError(f"The RANSAC threshold is {threshold_px}: give a positive number of pixels.")
    points0 = np.asarray(keypoints0, np.float64).reshape(-1, 2)
    points1 = np.asarray(keypoints1, np.float64).reshape(-1, 2)
    if points0.shape != points1.shape or not (np.isfinite(points0).all() and np.isfinite(points1).all()):
        raise UserError("Matches must be two arrays [N, 2] of the same length with finite pixels.")
    count = len(points0)
    if count < MIN_MATCHES:
        return _refused(Status.TOO_FEW_MATCHES, count)
    cv2.setRNGSeed(0)
    try:
        candidate, _ = cv2.findHomography(
            points0, points1, cv2.USAC_MAGSAC, threshold_px, maxIters=max_iterations, confidence=0.9999
        )
    except cv2.error:  # raised for some degenerate inputs, such as many identical points
        candidate = None
    if candidate is None or candidate.shape != (3, 3) or not np.isfinite(candidate).all():
        return _refused(Status.DEGENERATE, count)
    matrix = np.asarray(candidate, np.float64)
    if refine:
        matrix = refine_homography(matrix, points0, points1, threshold_px)
    error = transfer_error(matrix, points0, points1)
    inliers = error <= threshold_px
    significance = match_significance(points0, points1, inliers, size0, size1, threshold_px)
    status = _judge(matrix, points0, points1, inliers, min_inlier_ratio, significance, min_significance)
    num_inliers = int(inliers.sum())
    return HomographyEstimate(
        status=status,
        matrix=matrix / matrix[2, 2] if status is Status.OK else None,
        inliers=inliers,
        num_matches=count,
        num_inliers=num_inliers,
        inlier_ratio=num_inliers / count,
        reprojection_error_px=float(error[inliers].mean()) if num_inliers else math.nan,
        significance=significance,
    )


def project(matrix: Matrix, points: npt.NDArray[np.float64], front: float | None = None) -> npt.NDArray[np.float64]:
    """Apply a homography to points [N, 2]; points on or behind its horizon become infinite.

    front: sign of the third coordinate in front of the horizon, see `front_of`; without it pixel (0, 0) is in front.
    """
    mapped, depth = _mapped(matrix, points)
    if front is None:
        front = -1.0 if matrix[2, 2] < 0 else 1.0
    return np.where((front * depth > NEAR)[:, None], mapped, np.inf)


def front_of(matrix: Matrix, points0: npt.NDArray[np.float64], points1: npt.NDArray[np.float64]) -> float:
    """Sign of the third coordinate on that side of the horizon where the matches [N, 2] agree with the homography.

    A homography is known up to its sign, and pixel (0, 0) need not be on the side that a camera sees: from farther back
    the ground begins lower in the other image, and what is above it here, lies behind the camera there.
    """
    return _front(*_distances(matrix, points0, points1))


def transfer_error(
    matrix: Matrix, points0: npt.NDArray[np.float64], points1: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Distance [N] in pixels of image 1 between projected and matched points; infinite behind the horizon."""
    distance, depth = _distances(matrix, points0, points1)
    return np.where(_front(distance, depth) * depth > NEAR, distance, np.inf)


def _mapped(matrix: Matrix, points: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Where points [N, 2] go, on either side of the horizon, and their third coordinate [N]."""
    homogeneous = points @ matrix[:, :2].T + matrix[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return homogeneous[:, :2] / homogeneous[:, 2:], homogeneous[:, 2]


def _distances(
    matrix: Matrix, points0: npt.NDArray[np.float64], points1: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    mapped, depth = _mapped(matrix, points0)
    delta = mapped - points1
    return np.hypot(delta[:, 0], delta[:, 1]), depth


def _front(distance: npt.NDArray[np.float64], depth: npt.NDArray[np.float64]) -> float:
    with np.errstate(over="ignore"):
        vote = 1 / (1 + distance**2)
    return 1.0 if vote[depth > NEAR].sum() >= vote[depth < -NEAR].sum() else -1.0


def refine_homography(
    matrix: Matrix,
    points0: npt.NDArray[np.float64],
    points1: npt.NDArray[np.float64],
    threshold_px: float,
) -> Matrix:
    """Gauss-Newton over all matches with Geman-McClure weights 1 / (1 + (r / c)^2)^2.

    A hypothesis from RANSAC stands on few points; this one stands on all of them, each by how well it agrees. First
    with c = 2/3 of the threshold, then with c as the residuals themselves say: where matches are precise, a bend of
    less than the threshold that many of them show must not pass as noise (corners outside of the overlap follow it).
    """
    scale = 2 / 3 * threshold_px
    for _ in range(ROUNDS):
        matrix = _descend(matrix, points0, points1, scale)
        error = transfer_error(matrix, points0, points1)
        near = error[error <= threshold_px]
        if len(near) < MIN_MATCHES:
            break
        # the median of Rayleigh-distributed distances is 1.1774 sigma; 0.1 px: no detector is better
        scale = min(scale, max(TUNING / 1.1774 * float(np.median(near)), 0.1))
    return matrix


def _descend(
    matrix: Matrix,
    points0: npt.NDArray[np.float64],
    points1: npt.NDArray[np.float64],
    scale_px: float,
    iterations: int = 12,
) -> Matrix:
    """Gauss-Newton at one scale c, in normalised coordinates (Hartley, PAMI 1997).

    Returns the given matrix if the robust cost does not fall.
    """
    t0, t1 = _normaliser(points0), _normaliser(points1)
    normal0 = points0 * t0[0, 0] + t0[:2, 2]
    normal1 = points1 * t1[0, 0] + t1[:2, 2]
    scale = scale_px * t1[0, 0]
    h = t1 @ matrix @ np.linalg.inv(t0)
    if abs(h[2, 2]) < 1e-12:
        return matrix
    h = h * (front_of(matrix, points0, points1) / abs(h[2, 2]))  # in front is where w > 0
    x, y = normal0[:, 0], normal0[:, 1]
    ones, zeros = np.ones_like(x), np.zeros_like(x)
    best, best_cost = matrix, np.inf
    for _ in range(iterations):
        u, v, w = (h @ np.stack([x, y, ones])).reshape(3, -1)
        visible = w > 1e-6
        inverse = np.where(visible, 1 / np.where(visible, w, 1.0), 0.0)
        px, py = u * inverse, v * inverse
        rx, ry = normal1[:, 0] - px, normal1[:, 1] - py
        ratio = np.where(visible, (rx * rx + ry * ry) / scale**2, np.inf)
        cost = float(np.sum(1 - 1 / (1 + ratio)))
        if cost < best_cost - 1e-9 * len(x):
            best_cost = cost
            best = np.linalg.inv(t1) @ h @ t0
        else:
            break
        weight = 1 / (1 + ratio) ** 2
        ax, ay, aw = x * inverse, y * inverse, inverse
        jacobian_x = np.stack([ax, ay, aw, zeros, zeros, zeros, -px * ax, -px * ay])
        jacobian_y = np.stack([zeros, zeros, zeros, ax, ay, aw, -py * ax, -py * ay])
        normal = (jacobian_x * weight) @ jacobian_x.T + (jacobian_y * weight) @ jacobian_y.T
        gradient = jacobian_x @ (weight * rx) + jacobian_y @ (weight * ry)
        try:
            step = np.linalg.solve(normal + 1e-12 * np.trace(normal) * np.eye(8), gradient)
        except np.linalg.LinAlgError:
            break
        h = h + np.append(step, 0.0).reshape(3, 3)
    return best


def _judge(
    matrix: Matrix,
    points0: npt.NDArray[np.float64],
    points1: npt.NDArray[np.float64],
    inliers: Mask,
    min_inlier_ratio: float,
    significance: float,
    min_significance: float,
) -> Status:
    if inliers.sum() < MIN_MATCHES:
        return Status.NOT_SIGNIFICANT
    if not plausible(matrix, points0[inliers], points1[inliers]):
        return Status.DEGENERATE
    if inliers.mean() < min_inlier_ratio:
        return Status.LOW_INLIER_RATIO
    return Status.OK if significance >= min_significance else Status.NOT_SIGNIFICANT


def _normaliser(points: npt.NDArray[np.float64]) -> Matrix:
    """Similarity that moves points to mean 0 and mean distance sqrt(2)."""
    mean = points.mean(0)
    scale = math.sqrt(2) / max(float(np.hypot(*(points - mean).T).mean()), 1e-9)
    return np.array([[scale, 0, -scale * mean[0]], [0, scale, -scale * mean[1]], [0, 0, 1]])


def _refused(status: Status, count: int) -> HomographyEstimate:
    return HomographyEstimate(status, None, np.zeros(count, bool), count, 0, 0.0, math.nan, 0.0)
