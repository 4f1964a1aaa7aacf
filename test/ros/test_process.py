"""The process: how it starts, under other names, with bad input, and how it ends."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from dds import ROOT, Client, NodeProcess, compressed_message, new_domain
from diagnostic_msgs.msg import DiagnosticStatus
from sensor_msgs.msg import CompressedImage

from matchanything_ros.bundle import load_bundle
from matchanything_ros.msg import Homography

pytestmark = pytest.mark.ros

GRAY = np.random.default_rng(0).integers(0, 256, (120, 160), np.uint8)
Start = Callable[..., Client]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    clients: list[Client] = []

    def go(parameters: dict[str, object], *remap: str, **options: object) -> Client:
        domain = new_domain()
        node = NodeProcess(domain, tmp_path / "log", parameters, *remap)
        clients.append(Client(domain, node, **options))  # type: ignore[arg-type]
        return clients[-1]

    yield go
    for client in clients:
        client.close()
        client.process.stop(signal.SIGKILL)


def test_namespace_remapping_compressed_and_by_hand(start: Start, bundles: dict[str, Path]) -> None:
    client = start(
        {"autostart": False, "bundle": bundles["fast"], "image_transport": "compressed"},
        "__ns:=/robot",
        "__node:=matching",
        "image0:=thermal/image",
        "image1:=/rgb/image/compressed",
        name="/robot/matching",
        topics=("/robot/thermal/image/compressed", "/rgb/image/compressed"),
        image_type=CompressedImage,
    )
    assert client.state() == "unconfigured"
    assert client.transition("activate") == [False]
    assert client.transition("configure") == [True] and client.state() == "inactive"
    assert client.transition("activate") == [True] and client.state() == "active"
    jpeg, png = (compressed_message(cv2.imencode(suffix, GRAY)[1].tobytes()) for suffix in (".jpg", ".png"))
    client.connected(image=jpeg)
    assert client.match(30.0, jpeg, png)[1].status == Homography.OK
    truncated = compressed_message(b"\xff\xd8\xff garbage")
    assert client.match(31.0, jpeg, truncated)[1].status == Homography.NOT_COMPUTED
    client.status(lambda status, _: status.level == DiagnosticStatus.ERROR and "image1" in status.message)
    assert client.transition("active_shutdown") == [True] and client.state() == "finalized"
    assert client.process.stop(signal.SIGINT, signal.SIGINT) == 0
    assert "Traceback" not in client.process.log


def test_qos_overrides_and_a_parameter_that_does_not_exist(start: Start, bundles: dict[str, Path]) -> None:
    client = start(
        {
            "bundle": bundles["fast"],
            "image_qos": "sensor_data",
            "qos_overrides./image0.subscription.reliability": "reliable",
            "toleranze": 0.1,
        }
    )
    client.connected()
    kinds = {
        topic: client.node.get_subscriptions_info_by_topic(topic)[0].qos_profile.reliability.name
        for topic in ("/image0", "/image1")
    }
    assert kinds == {"/image0": "RELIABLE", "/image1": "BEST_EFFORT"}
    assert "The parameter toleranze does not exist and is ignored" in client.process.log
    assert "qos_overrides" not in client.process.log
    assert client.process.stop() == 0


def test_autostart_without_a_bundle_stays_and_says_so(start: Start, bundles: dict[str, Path]) -> None:
    client = start({"bundle": bundles["missing"]})
    _, status, _ = client.status(lambda status, _: status.level == DiagnosticStatus.ERROR)
    assert "does not exist" in status.message
    assert client.state() == "unconfigured"
    assert client.set(bundle=str(bundles["fast"])) == "" and client.transition("configure", "activate") == [True, True]
    client.connected()
    assert client.match(30.0, GRAY, GRAY)[1].status == Homography.OK
    assert client.process.stop(signal.SIGINT, signal.SIGINT) == 0
    assert "Traceback" not in client.process.log


def test_a_qos_override_that_does_not_exist_fails_the_activation(start: Start, bundles: dict[str, Path]) -> None:
    client = start({"bundle": bundles["fast"], "qos_overrides./image1.subscription.reliability": "perfect"})
    _, status, _ = client.status(lambda status, _: status.level == DiagnosticStatus.ERROR)
    assert "on_activate failed" in status.message and client.state() == "unconfigured"
    assert client.node.count_subscribers("/image0") == 0
    assert client.process.stop() == 0


def test_ros_arguments_that_cannot_be_read(tmp_path: Path) -> None:
    node = NodeProcess(new_domain(), tmp_path / "log", {}, "this is no rule")
    assert node.process.wait(60) == 2
    assert "this is no rule" in node.log and "Traceback" not in node.log


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"backend": "abacus"}, "backend is 'abacus': use one of auto"),
        ({"ransac_threshold": 3}, "ransac_threshold has the wrong type: give a number with a point"),
        ({"ransac_threshold": -3.0}, "ransac_threshold"),
        ({"intensity_range": "[1.0]"}, "give two values"),
    ],
)
def test_a_wrong_parameter_at_start_ends_with_one_sentence(
    tmp_path: Path, parameters: dict[str, object], sentence: str
) -> None:
    node = NodeProcess(new_domain(), tmp_path / "log", parameters)
    assert node.process.wait(60) == 1
    assert sentence in node.log and "Traceback" not in node.log
    assert len(node.log.strip().splitlines()) == 1


def test_stopping_while_images_come(start: Start, bundles: dict[str, Path]) -> None:
    client = start({"bundle": bundles["slow"]})
    client.connected()
    for index in range(10):
        for camera in (0, 1):
            client.send(camera, 30 + index * 0.1, GRAY)
    client.until(lambda: client.homographies, "an answer")
    assert client.process.stop(signal.SIGTERM, signal.SIGTERM) == 0
    assert "Traceback" not in client.process.log


def test_the_packaged_network_on_a_real_pair(start: Start) -> None:
    bundle = load_bundle()
    with np.load(bundle.golden) as golden:
        image0 = golden["image0"]
    height, width = image0.shape[:2]
    truth = np.array([[0.96, -0.06, 14.0], [0.05, 0.98, -6.0], [1e-5, -2e-5, 1.0]])
    image1 = cv2.warpPerspective(image0, truth, (width, height))
    client = start({"use_sim_time": True})
    client.connected()
    points, homography = client.match(30.0, image0, image1)
    assert homography.status == Homography.OK and homography.matcher == bundle.manifest.name
    corners = np.array([[[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]], float)
    there = [cv2.perspectiveTransform(corners, m) for m in (truth, np.reshape(homography.homography, (3, 3)))]
    assert np.abs(there[0] - there[1]).max() < 2  # corners are extrapolated; the matches themselves agree better
    assert homography.reprojection_error < 1 and homography.inlier_ratio > 0.5
    assert len(points.inliers) == homography.num_matches
    assert client.process.stop() == 0


def test_the_launch_file_starts_the_node_with_what_is_given() -> None:
    reason = "launch comes with a ROS installation, not with the wheels"
    launch = pytest.importorskip("launch", reason=reason)
    pytest.importorskip("launch_ros.actions", reason=reason)
    spec = importlib.util.spec_from_file_location("match_launch", ROOT / "launch" / "match.launch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = {argument.name for argument in module.generate_launch_description().get_launch_arguments()}
    assert {"image0", "image1", "bundle", "backend", "namespace", "parameters", "log_level"} <= arguments
    context = launch.LaunchContext()
    context.launch_configurations.update(dict.fromkeys(arguments, ""))
    assert len(module.start(context)) == 1  # nothing given: the parameters file alone
    context.launch_configurations.update(bundle="net.onnx", use_sim_time="true", image0="/cam0")
    assert len(module.start(context)) == 1


def test_launch_and_config_agree_with_the_parameters() -> None:
    yaml = pytest.importorskip("yaml")
    from matchanything_ros.parameters import FIELDS, Parameters

    config = yaml.safe_load((ROOT / "config" / "match.yaml").read_text())["/**"]["ros__parameters"]
    defaults = {name: getattr(Parameters(), name) for name in FIELDS}
    assert {name: tuple(v) if isinstance(v, list) else v for name, v in config.items()} == defaults
    for name, value in config.items():
        assert type(value) is (list if isinstance(defaults[name], tuple) else type(defaults[name])), name
    launch = (ROOT / "launch" / "match.launch.py").read_text()
    compile(launch, "match.launch.py", "exec")
    for name in ("bundle", "backend", "image_transport"):
        assert name in FIELDS and f'"{name}": (str' in launch
