"""One pair with ground truth: which errors are measured, what counts as failed; and the plain ways beside ours."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from matchanything_ros.matcher import Matches
from matchanything_tools.accuracy import corner_error, magsac
from matchanything_tools.baselines import sift
from matchanything_tools.judgement import Record, failed, judge
from matchanything_tools.pairs import ImagePair

SIZE0, SIZE1 = (101, 81), (401, 201)
GRID = np.stack(np.meshgrid(np.arange(5, 100, 10), np.arange(5, 80, 10)), -1).reshape(-1, 2).astype(np.float32)


def pair(truth: np.ndarray) -> ImagePair:
    return ImagePair("pair", (Path("0.png"), Path("1.png")), "viewpoint", truth, frozenset({"farm"}))


def moved(x: float, y: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64)


def test_errors_are_those_of_the_corners_of_image_0() -> None:
    """The matches say that nothing moves. By the truth x grows by 5 %: 5 px at the right corners, x = 100."""
    matches = Matches(GRID, GRID, np.ones(len(GRID), np.float32), SIZE0, SIZE1)
    record = judge(pair(np.diag([1.05, 1, 1])), matches)
    assert (record.error_magsac_px, record.error_px, record.error_accepted_px) == (2.5, 2.5, 2.5)


def test_the_refit_is_measured_beside_plain_magsac(monkeypatch: pytest.MonkeyPatch) -> None:
    """From an estimate that is 1 px off, exact matches lead the refit to the truth."""
    monkeypatch.setattr("matchanything_tools.judgement.magsac", lambda *_: moved(20.6, 30.8))
    matches = Matches(GRID, GRID + np.array([20, 30], np.float32), np.ones(len(GRID), np.float32), SIZE0, SIZE1)
    record = judge(pair(moved(20, 30)), matches)
    assert record.error_magsac_px == 1 and record.error_px == 0 and record.precision == 1


@pytest.mark.parametrize(("error", "expected"), [(None, True), (0.0, False), (9.999, False), (10.0, True)])
def test_a_pair_fails_from_ten_pixels_on(error: float | None, expected: bool) -> None:
    for status in ("OK", "NOT_SIGNIFICANT"):
        assert failed(Record("x", "viewpoint", 9, 9, 1.0, status, 20.0, precision=1.0, error_px=error)) is expected


def test_a_pair_without_overlap_fails_if_it_is_accepted() -> None:
    for status, expected in (("OK", True), ("NOT_SIGNIFICANT", False), ("DEGENERATE", False)):
        assert failed(Record("x", "no overlap", 9, 9, 1.0, status, 20.0)) is expected


def test_plain_magsac_leaves_out_what_is_10_px_off() -> None:
    """Every third match is: far outside 3 px, and well inside a threshold that would let it pull the others along."""
    points1 = GRID.copy()
    points1[::3, 0] += 10
    assert corner_error(magsac(GRID, points1), np.eye(3), SIZE0) < 0.1


def test_sift_scores_sure_matches_high() -> None:
    """The scores are 1 - distance ratio: 1 for the same image, whose descriptors are 0 apart; above 1 - 0.8 else."""
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (120, 160), np.uint8), (0, 0), 2)
    same = sift(image, image)
    assert len(same) > 20 and np.array_equal(same.keypoints0, same.keypoints1) and (same.scores == 1).all()
    noisy = sift(image, np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8))
    assert len(noisy) > 20 and noisy.scores.min() > 0.2
