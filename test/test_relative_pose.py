"""Made views and the pose found in them: rendering obeys the camera, true matches give the true pose."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from matchanything_ros.matcher import Matches
from matchanything_tools.baselines import sift
from matchanything_tools.relative_pose import PoseRecord, errors, judge_pose, pose_table
from matchanything_tools.rooms import SIZE, PosePair, look_at, pose_pairs, render


def texture(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    return cv2.resize(noise, (640, 480), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def pairs() -> list[PosePair]:
    return pose_pairs([texture(seed) for seed in range(4)], 2)


def test_a_spot_on_the_wall_is_seen_where_the_camera_projects_it() -> None:
    walls = [np.zeros((400, 400, 3), np.uint8) for _ in range(3)]
    cv2.circle(walls[2], (100, 300), 6, (255, 255, 255), -1)  # of the plane z = 0: x = 0.25, y = 0.25
    intrinsics = np.array([[576.0, 0, 319.5], [0, 576.0, 239.5], [0, 0, 1]])
    position = np.array([0.9, 1.1, 1.3])
    rotation = look_at(position, np.array([0.3, 0.2, 0.25]), roll=0.2)
    image = render(walls, rotation, position, intrinsics)
    assert image.shape == (SIZE[1], SIZE[0], 3)
    rows, columns = np.nonzero(image[..., 0] > 128)
    x, y, z = intrinsics @ rotation @ (np.array([100.5 / 400, 1 - 300.5 / 400, 0]) - position)
    assert z > 0 and len(rows) > 20
    assert math.hypot(columns.mean() - x / z, rows.mean() - y / z) < 0.5


def true_matches(pair: PosePair, wrong: int = 0) -> Matches:
    """Random points in front of camera 0 and their true places in camera 1; the last `wrong` of them are not true."""
    random = np.random.default_rng(0)
    points = random.uniform((-0.4, -0.3, 1.0), (0.4, 0.3, 2.0), (200, 3))
    places = []
    for seen in (points, points @ pair.rotation.T + pair.translation):
        projected = seen @ pair.intrinsics.T
        places.append((projected[:, :2] / projected[:, 2:]).astype(np.float32))
    places[1][200 - wrong :] = random.uniform(0, 480, (wrong, 2))
    return Matches(places[0], places[1], np.ones(200, np.float32), SIZE, SIZE, {})


def test_true_matches_give_the_true_pose(pairs: list[PosePair]) -> None:
    for pair in pairs:
        record = judge_pose(pair, lambda a, b, pair=pair: true_matches(pair, wrong=60))
        assert record.num_matches == 200 and 0.68 < record.inlier_ratio < 0.75
        assert record.rotation_deg is not None and record.rotation_deg < 0.1
        assert record.translation_deg is not None and record.translation_deg < 0.3
        turned = cv2.Rodrigues(np.array([0.0, 0.1, 0.0]))[0] @ pair.rotation
        other = PosePair(pair.name, pair.image0, pair.image1, pair.intrinsics, turned, pair.translation)
        wrong = judge_pose(other, lambda a, b, pair=pair: true_matches(pair)).rotation_deg
        assert wrong == pytest.approx(math.degrees(0.1), abs=0.1)


def test_the_views_can_be_matched(pairs: list[PosePair]) -> None:
    """With SIFT, which is exact to a fraction of a pixel: the pose of the pictures is the pose that they claim."""
    record = judge_pose(pairs[0], sift)
    assert record.num_matches > 100
    assert record.rotation_deg is not None and record.rotation_deg < 1
    assert record.translation_deg is not None and record.translation_deg < 4


def test_too_few_matches_are_no_pose(pairs: list[PosePair]) -> None:
    nothing = Matches(
        np.zeros((3, 2), np.float32), np.zeros((3, 2), np.float32), np.ones(3, np.float32), SIZE, SIZE, {}
    )
    record = judge_pose(pairs[0], lambda a, b: nothing)
    assert record.rotation_deg is None and errors([record]) == [math.inf]
    table = pose_table({"a": [record, PoseRecord("b", 10, 0.5, 1.0, 3.0)]})
    assert "| a | .350 .425 .463 | inf deg | inf deg |" in table  # one of two pairs, 3 degrees off
