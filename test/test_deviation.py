"""How far two results of a network are apart, and from where on that is too far."""

from __future__ import annotations

import numpy as np
import pytest

from matchanything_tools.deviation import GOLDEN_LIMITS, LIMITS, Deviation, compare, corner_distance, judge, summarise


def arrays(keypoints: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
    return {"keypoints0": keypoints.astype(np.float32), "keypoints1": keypoints.astype(np.float32), "scores": scores}


def test_deviation() -> None:
    rng = np.random.default_rng(0)
    keypoints, scores = rng.uniform(0, 500, (400, 2)), np.linspace(1, 0.1, 400).astype(np.float32)
    same = summarise([compare(arrays(keypoints, scores), arrays(keypoints, scores), 0.2)])
    assert same["mean_px"] == 0 and same["within_0.1_px"] == 1 and same["score_correlation"] == pytest.approx(1)
    assert not judge(same, LIMITS["fp32"])

    moved = summarise([compare(arrays(keypoints, scores), arrays(keypoints + np.array([0.4, 0]), scores), 0.2)])
    assert moved["mean_px"] == pytest.approx(0.4, abs=1e-4) and moved["within_0.1_px"] == 0
    assert any("px off" in problem for problem in judge(moved, LIMITS["fp16"]))

    # Twelve scores fall below the threshold: fewer matches, but none of them is lost.
    lower = scores.copy()
    lower[300:312] *= 0.6
    fewer = summarise([compare(arrays(keypoints, scores), arrays(keypoints, lower), 0.2)])
    assert fewer["matches_expected"] - fewer["matches"] == 12 and fewer["within_1_px"] == 1
    assert any("matches instead of" in problem for problem in judge(fewer, LIMITS["fp16"]))

    # Twenty of the matches are gone: the share within 1 px says so, the mean distance of the others does not.
    gone = compare(arrays(keypoints, scores), arrays(keypoints[20:], scores[20:]), 0.2)
    assert (gone.distances[:20] > 1).all() and (gone.distances[20:] == 0).all()
    summary = summarise([gone])
    assert summary["mean_px"] < 0.1 and any("within 1 px" in problem for problem in judge(summary, LIMITS["fp16"]))

    only = {name: x[:1] for name, x in arrays(keypoints, scores).items()}
    lost = summarise([compare(only, {**only, "keypoints1": only["keypoints1"] + 9}, 0.2)])
    assert any("within 1 px" in problem for problem in judge(lost, LIMITS["fp16"]))  # the only one must be there

    assert summarise([Deviation(0, 0, np.zeros(0, np.float32), np.zeros((0, 2), np.float32))])["mean_px"] is None


def test_deviation_of_a_dense_warp() -> None:
    """One pixel in fifty of one direction goes elsewhere: the typical one does not say so, the share does."""
    cert = np.ones((1, 1, 100, 200), np.float32)
    cert[..., 60:, :] = 0.4  # not certain
    warp = np.zeros((1, 4, 100, 200), np.float32)
    other = warp.copy()
    other[0, 0, 58:, 100:] = 2 * 5 / 100  # 5 px of 100, two rows of sixty that are certain
    matches = arrays(np.zeros((1, 2)), np.ones(1, np.float32))
    one = compare({**matches, "warp": warp, "cert": cert}, {**matches, "warp": other, "cert": cert}, 0.1)
    summary = summarise([one, one])
    assert summary["warp_pixels"] == 2 * 12000 and summary["warp_median_px"] == 0
    assert summary["warp_mean_px"] == pytest.approx(5 / 60) and summary["warp_within_1_px"] == pytest.approx(59 / 60)
    assert judge(summary, LIMITS["fp16"]) == ["only 98.3% of the certain warp is within 1 px (limit 99%)"]
    assert not judge(summary, GOLDEN_LIMITS["fp16"])
    one_wrong = compare({**matches, "warp": warp, "cert": cert}, {**matches, "warp": warp, "cert": cert * 0.8}, 0.1)
    assert judge(summarise([one_wrong]), LIMITS["fp16"]) == ["the certainty is 0.200 off (limit 0.1)"]
    half = warp.copy()
    half[..., 100:] = np.nan
    not_a_number = summarise(
        [compare({**matches, "warp": warp, "cert": cert}, {**matches, "warp": half, "cert": cert}, 0.1)]
    )
    assert judge(not_a_number, GOLDEN_LIMITS["fp16"]) == ["not all values are finite (1 image pairs)"]
    other[0, 0, :, 100:] = 2 * 0.7 / 100
    moved = summarise([compare({**matches, "warp": warp, "cert": cert}, {**matches, "warp": other, "cert": cert}, 0.1)])
    assert judge(moved, GOLDEN_LIMITS["fp16"]) == ["the warp is 0.700 px off where it is certain (limit 0.5)"]


def test_corner_distance() -> None:
    shift = np.array([[1, 0, 3], [0, 1, 4], [0, 0, 1.0]])
    assert corner_distance(np.eye(3), shift, (640, 480)) == pytest.approx(5)
    assert corner_distance(np.eye(3), 2 * shift, (640, 480)) == pytest.approx(5)  # scale is no difference
    double = np.diag([2.0, 2.0, 1.0])  # 5 px of image 1 are 2.5 px of image 0
    assert corner_distance(double, shift @ double, (640, 480)) == pytest.approx(5)


def test_scores_are_correlated_match_by_match() -> None:
    """Deviations from the mean of -3, -1, 1, 3 and -1, -3, 3, 1: (3 + 3 + 3 + 3) / 20. The order does not matter."""
    keypoints, scores = 100 * np.arange(8.0).reshape(4, 2), np.array([0.2, 0.4, 0.6, 0.8], np.float32)
    given = np.array([0.4, 0.2, 0.8, 0.6], np.float32)
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        summary = summarise([compare(arrays(keypoints, scores), arrays(keypoints[order], given[order]), 0.1)])
        assert summary["mean_px"] == 0 and summary["score_correlation"] == pytest.approx(0.6)
        assert judge(summary, LIMITS["fp16"]) == ["the scores' correlation is 0.6000 (limit 0.98)"]


# Limits of: mean px; change of the number of matches; share within 1 px; correlation; and of a warp: median px, share
# within 1 px, certainty. Of matches drawn from a warp, half the share.
EXPECTED = {
    "real fp32": (0.02, 0.005, 0.99, 0.999, 0.05, 0.99, 0.01),
    "real fp16": (0.25, 0.02, 0.97, 0.98, 0.25, 0.99, 0.1),
    "golden fp32": (0.02, 0.005, 0.99, 0.999, 0.2, 0.99, 0.01),
    "golden fp16": (0.5, 0.2, 0.8, 0.96, 0.5, 0.5, 0.1),
}
COUNT = 10_000  # matches: every limit of a share is a whole number of them


@pytest.mark.parametrize("name", EXPECTED)
def test_every_limit_holds_and_is_named_past_it(name: str) -> None:
    kind, precision = name.split()
    limits = {"real": LIMITS, "golden": GOLDEN_LIMITS}[kind][precision]
    mean, change, share, correlation, warp, warp_share, certainty = EXPECTED[name]
    nothing = Deviation(COUNT, COUNT, np.zeros(COUNT, np.float32), np.zeros((COUNT, 2), np.float32))
    matches = summarise([nothing])
    dense = {**matches, "warp_pixels": 1, "warp_median_px": 0.0, "warp_within_1_px": 1.0, "certainty_difference": 0.0}
    cases = (
        (matches, "mean_px", mean, 1e-6, "keypoints are"),
        (matches, "matches", round(COUNT * (1 + change)), 1, "matches instead of"),
        (matches, "matches", round(COUNT * (1 - change)), -1, "matches instead of"),
        (matches, "within_1_px", share, -1 / COUNT, "of the matches are within 1 px"),
        (matches, "score_correlation", correlation, -1e-6, "correlation"),
        (dense, "within_1_px", share / 2, -1 / COUNT, "of the matches are within 1 px"),
        (dense, "warp_median_px", warp, 1e-6, "the warp is"),
        (dense, "warp_within_1_px", warp_share, -1e-6, "of the certain warp is within 1 px"),
        (dense, "certainty_difference", certainty, 1e-6, "the certainty is"),
    )
    for good, measure, limit, step, phrase in cases:
        assert judge({**good, measure: limit}, limits) == [], measure
        (problem,) = judge({**good, measure: limit + step}, limits)
        assert phrase in problem
