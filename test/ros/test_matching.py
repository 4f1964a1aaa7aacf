"""What the running node answers to images, good and bad, over real DDS."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dds import Client, image_message
from diagnostic_msgs.msg import DiagnosticStatus
from numpy.testing import assert_allclose
from sensor_msgs.msg import Image

from matchanything_ros.bundle import load_bundle
from matchanything_ros.messages import read_correspondences, read_homography
from matchanything_ros.msg import Homography

pytestmark = pytest.mark.ros

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (240, 320), np.uint8)


def test_a_pair_is_answered_with_points_and_a_homography(client: Client, now: float, bundles: dict[str, Path]) -> None:
    points, homography = client.match(now, GRAY, GRAY)
    manifest = load_bundle(bundles["fast"]).manifest
    for message in (points, homography):
        assert (message.header0.frame_id, message.header1.frame_id) == ("camera0", "camera1")
        assert message.header == message.header0
        assert (message.width0, message.height0, message.width1, message.height1) == (320, 240, 320, 240)
        assert (message.matcher, message.bundle_sha256) == ("fast", manifest.onnx_sha256)
    matches, inliers = read_correspondences(points)
    assert len(matches) == manifest.max_matches and inliers.all()
    # The network moves by (6, -4) in 160x120: twice that in 320x240, wherever the pixel centres are.
    assert_allclose(matches.keypoints1 - matches.keypoints0, np.tile([12, -8], (len(matches), 1)), atol=1e-3)
    estimate = read_homography(homography)
    assert homography.status == Homography.OK and estimate.matrix is not None
    assert_allclose(estimate.matrix, [[1, 0, 12], [0, 1, -8], [0, 0, 1]], atol=1e-3)
    assert estimate.num_inliers == len(matches) and estimate.inlier_ratio == 1


def test_images_of_changing_size_and_encoding(client: Client, now: float) -> None:
    thermal = (7000 + RNG.integers(0, 300, (120, 160))).astype(np.uint16)
    colour = RNG.integers(0, 256, (480, 640, 3), np.uint8)
    depth = RNG.random((64, 48), np.float32)
    for index, (image0, encoding0, image1, encoding1) in enumerate(
        [(thermal, "mono16", colour, "bgr8"), (colour, "rgb8", thermal, "16UC1"), (depth, "32FC1", GRAY, "bayer_rggb8")]
    ):
        message0, message1 = image_message(image0, encoding0), image_message(image1, encoding1)
        points, homography = client.match(now + index, message0, message1)
        assert (points.width0, points.height0) == image0.shape[1::-1]
        assert (points.width1, points.height1) == image1.shape[1::-1]
        assert homography.status == Homography.OK
        scale = np.array([image1.shape[1] / image0.shape[1], image1.shape[0] / image0.shape[0]])
        assert_allclose(np.reshape(homography.homography, (3, 3))[[0, 1], [0, 1]], scale, rtol=1e-3)


def broken(**changes: object) -> Image:
    message = image_message(GRAY)
    for name, value in changes.items():
        setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (broken(encoding="nv12"), "image1: The image encoding 'nv12' is not supported"),
        (broken(encoding="\u00e4\n\t"), "is not supported"),
        (broken(height=10_000), "broken"),
        (broken(step=3), "broken"),
        (Image(encoding="mono8"), "empty"),
    ],
)
def test_garbage_is_answered_and_reported(client: Client, now: float, message: Image, sentence: str) -> None:
    points, homography = client.match(now, GRAY, message)
    assert homography.status == Homography.NOT_COMPUTED and not np.any(homography.homography)
    assert len(points.points0) == 0 and (homography.width0, homography.height0) == (320, 240)
    client.status(lambda status, _: status.level == DiagnosticStatus.ERROR and sentence in status.message)
    assert client.match(now + 1, GRAY, GRAY)[1].status == Homography.OK


def test_no_match_is_an_answer_with_a_status(client: Client, now: float) -> None:
    assert client.set(score_threshold=1.0) == ""
    points, homography = client.match(now, GRAY, GRAY)
    assert homography.status == Homography.TOO_FEW_MATCHES and not np.any(homography.homography)
    assert len(points.scores) == homography.num_matches == 0
    assert np.isnan(homography.reprojection_error)


def test_pictures_are_drawn_only_for_somebody(client: Client, now: float) -> None:
    client.match(now, GRAY, GRAY)
    _, _, values = client.status()
    assert not any(key.startswith("picture") for key in values)
    pictures: list[Image] = []
    subscription = client.node.create_subscription(Image, "/match_node/matches/image", pictures.append, 10)
    # The node learns of the subscription after we learn of the node: publish until a picture comes.
    stamps = iter(np.arange(now + 1, now + 90, 0.5))
    client.until(lambda: pictures or client.match(next(stamps), GRAY, GRAY) is None, "a picture of the matches")
    assert pictures[0].encoding == "rgb8" and len(pictures[0].data) == pictures[0].height * pictures[0].step
    assert np.ptp(np.asarray(pictures[0].data)) > 200
    client.node.destroy_subscription(subscription)


def test_one_silent_camera_is_reported_and_its_partner_stale(client: Client, now: float) -> None:
    _, _, before = client.status()
    for first in (0, 60):  # not more at once than what a subscription holds
        for index in range(first, first + 60):
            client.send(0, now + index * 0.1, GRAY[:8, :8])
        wanted = int(before["image0 received"]) + first + 60
        client.status(lambda _, values, wanted=wanted: int(values["image0 received"]) == wanted)
    wanted = int(before["image0 dropped stale"]) + 20  # the queue keeps a hundred
    client.status(lambda _, values: int(values["image0 dropped stale"]) == wanted)
    client.status(lambda status, _: "/cam1/image" in status.message and status.level == DiagnosticStatus.WARN)
    assert client.match(now + 20, GRAY, GRAY)[1].status == Homography.OK


def test_stamps_too_far_apart_or_out_of_order_are_counted(client: Client, now: float) -> None:
    _, _, before = client.status()
    client.send(0, now, GRAY)
    client.send(1, now + 0.051, GRAY)  # the tolerance is 0.05
    client.send(1, now + 0.02, GRAY)
    client.match(now + 1, GRAY, GRAY)
    assert len(client.points) == 1
    _, _, after = client.status(lambda _, values: values["pairs published"] != before["pairs published"])
    for key in ("image0 dropped unpaired", "image1 dropped unpaired", "image1 dropped out_of_order"):
        assert int(after[key]) == int(before[key]) + 1


def test_clock_jumping_back(client: Client, now: float) -> None:
    _, _, before = client.status()
    client.send(0, now + 50, GRAY)
    client.match(now + 60, GRAY, GRAY)
    assert client.match(now, GRAY, GRAY)[1].status == Homography.OK
    _, _, after = client.status(lambda _, values: values["clock jumps"] != before["clock jumps"])
    assert int(after["clock jumps"]) == int(before["clock jumps"]) + 1


def test_simulated_time(client: Client, now: float) -> None:
    from rosgraph_msgs.msg import Clock

    clock = client.node.create_publisher(Clock, "/clock", 10)
    assert client.set(use_sim_time=True) == ""
    message = Clock()
    message.clock.sec = 77

    def simulated() -> bool:
        clock.publish(message)
        return bool(client.diagnostics) and client.diagnostics[-1].header.stamp.sec == 77

    client.until(simulated, "diagnostics stamped with the simulated time")
    assert client.match(now, GRAY, GRAY)[1].status == Homography.OK
    assert client.set(use_sim_time=False) == ""


def test_diagnostics_say_what_runs_and_how_long_it_takes(client: Client, now: float, bundles: dict[str, Path]) -> None:
    client.match(now, GRAY, GRAY)
    _, status, values = client.status(lambda status, _: status.level == DiagnosticStatus.OK)
    assert status.name == "/match_node: matching" and values["state"] == "active"
    assert values["backend"] == "onnxruntime-cpu" and values["bundle"] == str(bundles["fast"])
    assert len(values["bundle sha256"]) == 64
    for stage in ("decode", "preprocess", "network", "homography", "publish", "total"):
        assert 0 <= float(values[f"{stage} p50 [ms]"]) <= float(values[f"{stage} p95 [ms]"])
    for camera in (0, 1):
        dropped = sum(int(count) for key, count in values.items() if key.startswith(f"image{camera} dropped"))
        assert int(values[f"image{camera} received"]) - dropped - int(values["pairs published"]) in range(101)
