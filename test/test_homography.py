"""The estimate is precise where there is a homography, and says why not where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from matchanything_ros.acceptance import match_significance, plausible
from matchanything_ros.errors import UserError
from matchanything_ros.homography import Status, estimate_homography, project, refine_homography, transfer_error

SIZE = (640, 480)
TRUE = np.array([[0.92, 0.11, 20.0], [-0.07, 1.05, -12.0], [1.5e-4, -8e-5, 1.0]])


def scene(inliers: int, outliers: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p0 = rng.uniform((0, 0), SIZE, (inliers + outliers, 2))
    p1 = project(TRUE, p0) + rng.normal(0, noise, p0.shape)
    p1[inliers:] = rng.uniform((0, 0), SIZE, (outliers, 2))
    return p0.astype(np.float32), p1.astype(np.float32)


def corner_error(matrix: np.ndarray) -> float:
    corners = np.array([[0, 0], [639, 0], [639, 479], [0, 479]], np.float64)
    return float(np.linalg.norm(project(matrix, corners) - project(TRUE, corners), axis=1).mean())


def test_exact_matches_give_the_matrix() -> None:
    p0, p1 = scene(100, 0, 0.0)
    result = estimate_homography(p0, p1, SIZE, SIZE)
    assert result.status is Status.OK and result.matrix is not None
    assert result.matrix[2, 2] == 1 and corner_error(result.matrix) < 1e-3  # float32 points
    assert result.num_inliers == 100 and result.inlier_ratio == 1 and result.reprojection_error_px < 1e-3


def test_refinement_uses_all_matches() -> None:
    """n matches of noise s: least-squares corners are a few s / sqrt(n) off, those of a minimal sample several s."""
    p0, p1 = scene(800, 400, 1.0)
    result = estimate_homography(p0, p1, SIZE, SIZE)
    assert result.matrix is not None and corner_error(result.matrix) < 6 * 1.0 / np.sqrt(800) * 2
    rough = TRUE + np.array([[0.004, 0, 1.5], [0, -0.004, -1.5], [0, 0, 0]])
    refined = refine_homography(rough, p0.astype(np.float64), p1.astype(np.float64), 3.0)
    assert corner_error(refined / refined[2, 2]) < 0.3 * corner_error(rough)


def test_the_same_input_gives_the_same_output() -> None:
    p0, p1 = scene(60, 60, 1.0)
    first, second = (estimate_homography(p0, p1, SIZE, SIZE) for _ in range(2))
    assert np.array_equal(first.matrix, second.matrix) and np.array_equal(first.inliers, second.inliers)


def ground(height: float = 1.0, focal: float = 500.0) -> np.ndarray:
    """Homography from the ground plane (x, z, 1) in metres to pixels of a level camera at z = 0."""
    pinhole = np.array([[focal, 0, 319.5], [0, focal, 239.5], [0, 0, 1]])
    return np.asarray(pinhole @ np.array([[1, 0, 0], [0, 0, height], [0, 1, 0]]))


@pytest.mark.parametrize("back", [2.0, 3.0, 6.0])
@pytest.mark.parametrize("outliers", [0, 400])
def test_a_robot_that_drove_on(back: float, outliers: int) -> None:
    """Image 1 is taken farther back. From 3 m on, what image 0 shows at its top lies behind the ground's horizon."""
    moved = np.array([[1, 0, 0], [0, 1, back], [0, 0, 1]])
    truth = ground() @ moved @ np.linalg.inv(ground())
    rng = np.random.default_rng(0)
    points = ground() @ np.stack([rng.uniform(-6, 6, 20000), rng.uniform(1, 20, 20000), np.ones(20000)])
    p0 = (points[:2] / points[2]).T
    there = truth @ np.concatenate([p0, np.ones((len(p0), 1))], 1).T
    p1 = (there[:2] / there[2]).T
    seen = np.all((p0 > 0) & (p0 < SIZE) & (p1 > 0) & (p1 < SIZE), 1)
    p0, p1 = p0[seen][:400], p1[seen][:400] + rng.normal(0, 0.3, (400, 2))
    p0 = np.concatenate([p0, rng.uniform((0, 0), SIZE, (outliers, 2))])
    p1 = np.concatenate([p1, rng.uniform((0, 0), SIZE, (outliers, 2))])
    assert (transfer_error(truth, p0, p1)[:400] < 3).all()
    for a, b in ((p0, p1), (p1, p0)):
        result = estimate_homography(a, b, SIZE, SIZE)
        assert result.status is Status.OK and result.inliers[:400].mean() > 0.9


@pytest.mark.parametrize("seed", range(20))
def test_chance_is_refused(seed: int) -> None:
    p0, p1 = scene(0, 300, 0.0, seed)
    result = estimate_homography(p0, p1, SIZE, SIZE)
    assert result.status is not Status.OK and result.matrix is None and len(result.inliers) == 300


@pytest.mark.parametrize("count", [0, 1, 7])
def test_too_few(count: int) -> None:
    p0, p1 = scene(count, 0, 0.0)
    result = estimate_homography(p0, p1, SIZE, SIZE)
    assert result.status is Status.TOO_FEW_MATCHES and result.matrix is None and result.num_matches == count


def test_collinear_and_coincident_points_are_degenerate() -> None:
    t = np.linspace(10, 400, 80)
    line = np.stack([t, 0.5 * t + 30], 1).astype(np.float32)
    assert estimate_homography(line, line + 5, SIZE, SIZE).status is not Status.OK
    point = np.full((50, 2), 100, np.float32)
    assert estimate_homography(point, point, SIZE, SIZE).status is not Status.OK


def test_a_mirror_image_is_no_view_of_a_plane() -> None:
    p0, _ = scene(200, 0, 0.0)
    mirrored = p0 * np.array([-1, 1], np.float32) + np.array([639, 0], np.float32)
    assert estimate_homography(p0, mirrored, SIZE, SIZE).status is Status.DEGENERATE


@pytest.mark.parametrize(
    ("matrix", "fine"),
    [
        (np.eye(3), True),
        (np.diag([8.0, 8.0, 1.0]), True),
        (np.diag([-1.0, -1.0, 1.0]), True),  # half a turn
        (np.diag([1.0, -1.0, 1.0]), False),  # a flip
        (np.diag([100.0, 1.0, 1.0]), False),  # wildly anisotropic
        (np.array([[1, 0, 0], [0, 1, 0], [-1 / 300, 0, 1.0]]), False),  # the horizon runs through the support
        (np.diag([1e-5, 1e-5, 1.0]), False),  # collapses to a point
    ],
)
def test_plausible(matrix: np.ndarray, fine: bool) -> None:
    support = np.random.default_rng(0).uniform((0, 0), SIZE, (100, 2))
    image = support @ matrix[:2, :2].T if not fine else project(matrix, support)
    assert plausible(matrix.astype(np.float64), support, image) is fine


def test_significance_grows_with_witnesses_in_different_places_only() -> None:
    p0, p1 = (points.astype(np.float64) for points in scene(60, 60, 0.5))
    inliers = np.arange(120) < 60
    spread = match_significance(p0, p1, inliers, SIZE, SIZE, 3.0)
    few = match_significance(p0, p1, np.arange(120) < 10, SIZE, SIZE, 3.0)
    clumped0, clumped1 = p0.copy(), p1.copy()
    clumped0[:60], clumped1[:60] = p0[0] + np.random.default_rng(0).uniform(0, 3, (60, 2)), p1[0]
    assert spread > few > 0 and match_significance(clumped0, clumped1, inliers, SIZE, SIZE, 3.0) < few


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_a_threshold_that_is_no_distance(threshold: float) -> None:
    p0, p1 = scene(20, 0, 0.0)
    with pytest.raises(UserError, match="positive"):
        estimate_homography(p0, p1, SIZE, SIZE, threshold)
    bad = p0.copy()
    bad[0] = np.nan
    with pytest.raises(UserError, match="finite"):
        estimate_homography(bad, p1, SIZE, SIZE)


def test_refit_follows_the_precision_of_the_matches() -> None:
    """A tenth of the matches is off by 1.8 px, all to one side in one corner: within the threshold, yet no noise."""
    rng = np.random.default_rng(5)
    truth = np.array([[1.05, 0.04, 8.0], [-0.03, 0.97, -5.0], [2e-4, -1e-4, 1.0]])
    points0 = rng.uniform((0, 0), (320, 480), (1500, 2))
    points1 = project(truth, points0) + rng.normal(0, 0.15, (1500, 2))
    bent = (points0[:, 0] > 240) & (points0[:, 1] > 300)
    points1[bent] += (1.6, 0.8)
    refined = refine_homography(truth, points0, points1, 3.0)
    corners = np.array([[0, 0], [639, 0], [639, 479], [0, 479]], float)
    # at the threshold's own scale (c = 2 px) the bend enters nearly in full and moves the far corners by 3.6 px
    assert np.abs(project(refined, corners) - project(truth, corners)).max() < 1.8
