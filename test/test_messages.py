"""Matches and estimates survive the way through a message: rclpy's, those of rosbags, and the bytes between the two."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from matchanything_ros.homography import HomographyEstimate, Status
from matchanything_ros.matcher import Matches
from matchanything_ros.messages import (
    correspondences,
    homography,
    not_computed,
    read_correspondences,
    read_homography,
    stamp_of,
)

MSG = Path(__file__).parents[1] / "msg"
BUNDLE: Any = SimpleNamespace(manifest=SimpleNamespace(name="net", onnx_sha256="ab" * 32))


def example(count: int = 5) -> tuple[Matches, HomographyEstimate]:
    rng = np.random.default_rng(1)
    points = rng.uniform(0, 600, (2, count, 2)).astype(np.float32)
    # Sliced and transposed on purpose: what is not contiguous must not be sent in memory order.
    matches = Matches(
        points[0][::-1], points[1], np.linspace(0.9, 0.1, count, dtype=np.float32), (640, 480), (320, 256)
    )
    matrix = np.arange(9.0).reshape(3, 3).T
    estimate = HomographyEstimate(Status.OK, matrix, np.arange(count) % 2 == 0, count, 3, 0.6, 0.7, 12.5)
    return matches, estimate


@pytest.fixture(params=["rclpy", "rosbags"])
def types(request: pytest.FixtureRequest) -> SimpleNamespace:
    """Message classes, and a function through which a message goes as bytes."""
    if request.param == "rclpy":
        msg = pytest.importorskip("matchanything_ros.msg", reason="the messages are not generated here")
        rclpy = pytest.importorskip("rclpy.serialization")
        std = pytest.importorskip("std_msgs.msg")
        return SimpleNamespace(
            correspondences=msg.Correspondences,
            homography=msg.Homography,
            header=std.Header,
            time=pytest.importorskip("builtin_interfaces.msg").Time,
            send=lambda m: rclpy.deserialize_message(rclpy.serialize_message(m), type(m)),
        )
    rosbags = pytest.importorskip("rosbags.typesys")
    store = rosbags.get_typestore(rosbags.Stores.ROS2_JAZZY)
    names = {}
    for name in ("Correspondences", "Homography"):
        names[name] = f"matchanything_ros/msg/{name}"
        store.register(rosbags.get_types_from_msg((MSG / f"{name}.msg").read_text(), names[name]))
    return SimpleNamespace(
        correspondences=store.types[names["Correspondences"]],
        homography=store.types[names["Homography"]],
        header=store.types["std_msgs/msg/Header"],
        time=store.types["builtin_interfaces/msg/Time"],
        send=lambda m: store.deserialize_cdr(store.serialize_cdr(m, m.__msgtype__), m.__msgtype__),
    )


def headers(types: SimpleNamespace) -> tuple[Any, Any]:
    return tuple(types.header(stamp=types.time(sec=7, nanosec=k), frame_id=f"camera{k}") for k in (0, 1))


@pytest.mark.parametrize("count", [0, 5])
def test_round_trip(types: SimpleNamespace, count: int) -> None:
    matches, estimate = example(count)
    header0, header1 = headers(types)
    points = types.send(correspondences(types.correspondences, header0, header1, matches, estimate, BUNDLE))
    back, inliers = read_correspondences(points)
    np.testing.assert_array_equal(back.keypoints0, matches.keypoints0)
    np.testing.assert_array_equal(back.keypoints1, matches.keypoints1)
    np.testing.assert_array_equal(back.scores, matches.scores)
    np.testing.assert_array_equal(inliers, estimate.inliers)
    assert (back.size0, back.size1) == ((640, 480), (320, 256))
    message = types.send(homography(types.homography, header0, header1, matches, estimate, BUNDLE))
    for received in (points, message):
        assert received.header0.frame_id == received.header.frame_id == "camera0"
        assert received.header1.frame_id == "camera1" and stamp_of(received.header1) == 7_000_000_001
        assert (received.matcher, received.bundle_sha256) == ("net", "ab" * 32)
    again = read_homography(message)
    assert again.matrix is not None and estimate.matrix is not None
    np.testing.assert_array_equal(again.matrix, estimate.matrix)
    np.testing.assert_allclose(
        [again.num_matches, again.num_inliers, again.inlier_ratio, again.reprojection_error_px, again.significance],
        [count, 3, 0.6, 0.7, 12.5],
        rtol=1e-6,
    )


def test_a_pair_that_could_not_be_matched(types: SimpleNamespace) -> None:
    matches, estimate = not_computed((640, 480), (0, 0))
    header0, header1 = headers(types)
    message = types.send(homography(types.homography, header0, header1, matches, estimate, BUNDLE))
    back = read_homography(message)
    assert back.status is Status.NOT_COMPUTED and back.matrix is None and not np.any(message.homography)
    assert np.isnan(back.reprojection_error_px)
    points = types.send(correspondences(types.correspondences, header0, header1, matches, estimate, BUNDLE))
    assert len(read_correspondences(points)[0]) == 0 and points.width0 == 640


def test_status_numbers_are_those_of_the_message() -> None:
    text = (MSG / "Homography.msg").read_text()
    for status in Status:
        assert f"uint8 {status.name} = {status.value} " in text
