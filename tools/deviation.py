"""How far the matches of one network are from those of another that should be equal: the measures of `validate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from matchanything_ros.engines.parity import (
    Arrays,
    Float,
    all_finite,
    certainty_difference,
    matches_above,
    nearest,
    warp_distances,
)

Summary = Mapping[str, float | int | None]

PAIRING_PX = 5.0  # farther than this it is another match, not the same one moved
WITHIN_PX = (0.1, 0.5, 1.0)


@dataclass(frozen=True)
class WarpDeviation:
    """Distances of two dense warps over so many pixels: mean, median in the worse direction, share of at most 1 px. And
    the median difference of the certainty there."""

    pixels: int
    mean_px: float
    median_px: float
    share: float
    certainty: float


def compare_warps(reference: Arrays, other: Arrays) -> WarpDeviation | None:
    """None without warps, or where the reference is nowhere certain."""
    directions = warp_distances(reference, other)
    if not directions:
        return None
    every = np.concatenate(directions)
    median = max(float(np.median(x)) for x in directions)
    certainty = certainty_difference(reference, other)
    return WarpDeviation(len(every), float(every.mean()), median, float((every <= 1).mean()), certainty)


@dataclass(frozen=True)
class Deviation:
    """One image pair. distances: for every reference match, pixels to the nearest of the others (the larger of the
    distances in image 0 and image 1; infinite if there is none). scores: [N, 2], reference and other score of the
    matches that were found again. finite: all of the other's values. warp: of the dense warp where it is certain, if
    there is one. corner_px: mean distance of the image's corners under both homographies; None unless both were
    accepted."""

    expected: int
    given: int
    distances: Float
    scores: Float
    finite: bool = True
    warp: WarpDeviation | None = None
    corner_px: float | None = None


@dataclass(frozen=True)
class Limits:
    """What counts as equal. count: relative change of the number of matches; share: of matches within 1 px. Of a dense
    warp where it is certain: the median, the share within 1 px, the certainty; of its matches half that of others."""

    mean_px: float
    count: float
    share: float
    correlation: float
    warp_px: float
    warp_share: float = 0.99
    certainty: float = 0.1


# fp32: the original itself moves by 3e-5 px under noise of 1e-6, with a rare jump to another fine match. fp16: what a
# conversion is published with is 0.23 px, 99.2 %, 5 % and 0.96; we ask for more where rounding allows it. Keypoints at
# the edge of a top-K change places by rounding, with their matches: sparse networks reach 97 to 98 % and 0.985.
LIMITS = {
    "fp32": Limits(0.02, 0.005, 0.99, 0.999, warp_px=0.05, certainty=0.01),
    "fp16": Limits(0.25, 0.02, 0.97, 0.98, warp_px=0.25),
}
# The one drawn pair of a golden result tells another network from rounding, as after a build (parity.py: one match in
# five may differ in fp16); how much fp16 changes takes many pairs of real images. Golden warps are stored in fp16, in
# which 864 pixels are 0.1 px off at most.
GOLDEN_LIMITS = {
    "fp32": dataclasses.replace(LIMITS["fp32"], warp_px=0.2),
    "fp16": Limits(0.5, 0.2, 0.8, 0.96, warp_px=0.5, warp_share=0.5),
}


def compare(reference: Arrays, other: Arrays, threshold: float) -> Deviation:
    """Compare two results of a network (see Engine.run) on the same inputs, in pixels of these.

    Both are cut at the threshold to be counted. To be paired, the other's matches count down to half of it: one that
    crosses the threshold is a difference in number, not in place.
    """
    wanted, wanted_scores = matches_above(reference, threshold)
    given, given_scores = matches_above(other, threshold / 2)
    partner, distances = nearest(wanted, given)
    again = distances <= PAIRING_PX
    scores = np.stack([wanted_scores[again], given_scores[partner[again]]], 1)
    counted = int((given_scores >= threshold).sum())
    warp = compare_warps(reference, other)
    return Deviation(len(wanted), counted, distances, scores, all_finite(other), warp)


def summarise(deviations: Sequence[Deviation]) -> Summary:
    """All pairs together, in the measures that reports give; None where nothing can be measured."""
    distances = np.concatenate([each.distances for each in deviations]) if deviations else np.zeros(0, np.float32)
    scores = np.concatenate([each.scores for each in deviations]) if deviations else np.zeros((0, 2), np.float32)
    same = distances[distances <= PAIRING_PX]
    corners = [each.corner_px for each in deviations if each.corner_px is not None]
    warps = [each.warp for each in deviations if each.warp is not None]
    pixels = sum(each.pixels for each in warps)
    varied = len(scores) > 2 and scores.std(0).min() > 0
    return {
        "matches_expected": sum(each.expected for each in deviations),
        "matches": sum(each.given for each in deviations),
        "found_again": len(same),
        "mean_px": float(same.mean()) if len(same) else None,
        "p95_px": float(np.quantile(same, 0.95)) if len(same) else None,
        **{f"within_{px:g}_px": float((distances <= px).mean()) if len(distances) else None for px in WITHIN_PX},
        "score_correlation": float(np.corrcoef(scores.T)[0, 1]) if varied else None,
        "corner_error_px": float(np.mean(corners)) if corners else None,
        "warp_pixels": pixels or None,
        "warp_mean_px": sum(each.pixels * each.mean_px for each in warps) / pixels if warps else None,
        "warp_median_px": float(np.mean([each.median_px for each in warps])) if warps else None,
        "warp_within_1_px": sum(each.pixels * each.share for each in warps) / pixels if warps else None,
        "certainty_difference": max(each.certainty for each in warps) if warps else None,
        "not_finite": sum(not each.finite for each in deviations) or None,
    }


def judge(summary: Summary, limits: Limits) -> list[str]:
    """What is past the limits, one phrase each; empty if the two networks are equal within them.

    A single match may come or go, whatever its share: fewer than a hundred would make every limit arbitrary.
    """
    if summary["not_finite"]:
        return [f"not all values are finite ({summary['not_finite']} image pairs)"]
    share, expected = summary["within_1_px"], int(summary["matches_expected"] or 0)
    dense = summary["warp_pixels"] is not None
    found = _judge_warp(summary, limits) if dense else _judge_matches(summary, limits)
    least = limits.share / 2 if dense else limits.share
    lost = 0.0 if share is None else (1 - share) * expected
    if lost > max(1.0, (1 - least) * expected) + 1e-6 or (expected and share == 0):
        found.append(f"only {share:.1%} of the matches are within 1 px (limit {least:.0%})")
    return found


def _judge_warp(summary: Summary, limits: Limits) -> list[str]:
    """Matches are drawn from thousands of equally certain pixels: the warp decides."""
    measured = (summary[name] for name in ("warp_median_px", "warp_within_1_px", "certainty_difference"))
    median, share, certainty = (float(value or 0) for value in measured)
    found = []
    if median > limits.warp_px:
        found.append(f"the warp is {median:.3f} px off where it is certain (limit {limits.warp_px:g})")
    if share < limits.warp_share:
        found.append(f"only {share:.1%} of the certain warp is within 1 px (limit {limits.warp_share:.0%})")
    if certainty > limits.certainty:
        found.append(f"the certainty is {certainty:.3f} off (limit {limits.certainty:g})")
    return found


def _judge_matches(summary: Summary, limits: Limits) -> list[str]:
    expected, given = int(summary["matches_expected"] or 0), int(summary["matches"] or 0)
    mean, correlation = summary["mean_px"], summary["score_correlation"]
    found = []
    if abs(given - expected) > max(1.0, limits.count * expected):
        found.append(f"{given} matches instead of {expected}")
    if mean is not None and mean > limits.mean_px:
        found.append(f"keypoints are {mean:.3f} px off (limit {limits.mean_px:g})")
    if correlation is not None and correlation < limits.correlation:
        found.append(f"the scores' correlation is {correlation:.4f} (limit {limits.correlation:g})")
    return found


def corner_distance(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64], size: tuple[int, int]) -> float:
    """Mean distance in pixels of image 1 between the corners of image 0, (width, height), under two homographies."""
    width, height = size
    corners = np.array([[0, 0, 1], [width - 1, 0, 1], [width - 1, height - 1, 1], [0, height - 1, 1]], np.float64)
    one, two = ((corners @ matrix.T) for matrix in (first, second))
    return float(np.linalg.norm(one[:, :2] / one[:, 2:] - two[:, :2] / two[:, 2:], axis=1).mean())
