"""What a matcher made of one pair with ground truth, under three estimators."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from matchanything_ros.homography import Status, estimate_homography, refine_homography
from matchanything_ros.matcher import Matches
from matchanything_tools.accuracy import corner_error, magsac, precision
from matchanything_tools.pairs import ImagePair

SOLVED_PX = 10.0  # a corner error below this counts as solved


@dataclass(frozen=True)
class Record:
    """One pair by one method. Errors: mean corner error in pixels of image 1, None if there is no homography.

    error_magsac_px: MAGSAC alone. error_px: with our refit. error_accepted_px: what estimate_homography hands out,
    None where it refuses. precision: share of the matches within 3 px of the truth.
    """

    name: str
    category: str
    num_matches: int
    num_inliers: int
    inlier_ratio: float
    status: str
    significance: float
    sources: tuple[str, ...] = ()
    precision: float | None = None
    error_magsac_px: float | None = None
    error_px: float | None = None
    error_accepted_px: float | None = None


def judge(pair: ImagePair, matches: Matches) -> Record:
    """Estimate the homography in the three ways of Record and compare it with the truth."""
    points0, points1 = matches.keypoints0, matches.keypoints1
    estimate = estimate_homography(points0, points1, matches.size0, matches.size1)
    common: dict[str, Any] = {
        "name": pair.name,
        "category": pair.category,
        "num_matches": len(matches),
        "num_inliers": estimate.num_inliers,
        "inlier_ratio": round(estimate.inlier_ratio, 4),
        "status": estimate.status.name,
        "significance": round(estimate.significance, 3),
        "sources": tuple(sorted(pair.sources)),
    }
    if pair.homography is None:
        return Record(**common)
    plain = magsac(points0, points1)
    refined = plain
    if plain is not None and len(matches) > 4:
        refined = refine_homography(plain, points0.astype(np.float64), points1.astype(np.float64), 3.0)
    errors = [corner_error(matrix, pair.homography, matches.size0) for matrix in (plain, refined, estimate.matrix)]
    plain_px, refined_px, accepted_px = (round(error, 3) if math.isfinite(error) else None for error in errors)
    return Record(
        **common,
        precision=round(precision(points0, points1, pair.homography), 4),
        error_magsac_px=plain_px,
        error_px=refined_px,
        error_accepted_px=accepted_px,
    )


def failed(record: Record) -> bool:
    """Whether the pair is unsolved, or accepted although it shares nothing."""
    if record.precision is None:
        return record.status == Status.OK.name
    return record.error_px is None or record.error_px >= SOLVED_PX
