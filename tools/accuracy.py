"""Measures of accuracy for matches and homographies with ground truth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from matchanything_ros.homography import project, transfer_error

Matrix = npt.NDArray[np.float64]
Points = npt.NDArray[np.float32]


def corner_error(estimate: Matrix | None, truth: Matrix, size0: tuple[int, int]) -> float:
    """Mean distance of the four projected corners of image 0 (their pixel centres), in pixels of image 1.

    size0: (width, height). Infinite without an estimate, or if a corner lies behind its horizon.
    """
    if estimate is None:
        return math.inf
    width, height = size0
    corners = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]], np.float64)
    with np.errstate(invalid="ignore"):
        error = float(np.hypot(*(project(estimate, corners) - project(truth, corners)).T).mean())
    return error if math.isfinite(error) else math.inf


def auc(errors: Sequence[float], threshold: float) -> float:
    """Area under the recall curve of the errors up to `threshold`, as a share of it (DeTone et al., 2018).

    The curve is joined linearly between the sorted errors, as the published tables of the field do.
    """
    if not len(errors):
        return math.nan
    ordered = np.sort(np.asarray(errors, np.float64))
    below = int(np.searchsorted(ordered, threshold))
    x = np.concatenate([[0.0], ordered[:below], [threshold]])
    recall = np.concatenate([np.arange(below + 1), [below]]) / len(ordered)
    return float(np.sum((x[1:] - x[:-1]) * (recall[1:] + recall[:-1]) / 2) / threshold)


def magsac(keypoints0: Points, keypoints1: Points, threshold_px: float = 3.0) -> Matrix | None:
    """The plain estimate that baselines are published with: no refit, nothing refused."""
    if len(keypoints0) < 4:
        return None
    try:
        matrix, _ = cv2.findHomography(
            keypoints0, keypoints1, cv2.USAC_MAGSAC, threshold_px, maxIters=10_000, confidence=0.9999
        )
    except cv2.error:  # raised for some degenerate inputs, such as many identical points
        return None
    usable = matrix is not None and matrix.shape == (3, 3) and bool(np.isfinite(matrix).all())
    return np.asarray(matrix, np.float64) if usable else None


def precision(keypoints0: Points, keypoints1: Points, truth: Matrix, threshold_px: float = 3.0) -> float:
    """Share of the matches within `threshold_px` (pixels of image 1) of the true homography; 0 without matches."""
    if not len(keypoints0):
        return 0.0
    error = transfer_error(truth, keypoints0.astype(np.float64), keypoints1.astype(np.float64))
    return float((error <= threshold_px).mean())


def roc(positives: Sequence[float], negatives: Sequence[float]) -> list[tuple[float, float, float]]:
    """(threshold, false accept rate, true accept rate) when accepting values >= threshold, strictest first."""
    if not len(positives) or not len(negatives):
        return []
    yes, no = np.asarray(positives, np.float64), np.asarray(negatives, np.float64)
    return [(float(t), float((no >= t).mean()), float((yes >= t).mean())) for t in np.unique([*yes, *no])[::-1]]


def roc_area(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Chance that a positive has the higher value than a negative (ties count half)."""
    if not len(positives) or not len(negatives):
        return math.nan
    yes, no = np.asarray(positives, np.float64)[:, None], np.asarray(negatives, np.float64)[None]
    return float((yes > no).mean() + 0.5 * (yes == no).mean())
