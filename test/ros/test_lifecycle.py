"""Transitions and their failures, what is configured by them, and parameters that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dds import Client
from diagnostic_msgs.msg import DiagnosticStatus

from matchanything_ros.msg import Homography

pytestmark = pytest.mark.ros

GRAY = np.random.default_rng(0).integers(0, 256, (120, 160), np.uint8)
Restart = Callable[..., None]


def test_an_inactive_node_does_not_listen(client: Client, now: float) -> None:
    assert client.transition("deactivate") == [True] and client.state() == "inactive"
    client.until(lambda: not any(p.get_subscription_count() for p in client.images), "both cameras unsubscribed")
    assert client.transition("activate") == [True]
    client.connected(now - 30)
    assert client.match(now, GRAY, GRAY)[1].status == Homography.OK


def test_a_transition_that_does_not_exist_here_is_refused_and_harmless(client: Client, now: float) -> None:
    assert client.transition("activate", "configure", "cleanup") == [False] * 3 and client.state() == "active"
    assert client.match(now, GRAY, GRAY)[1].status == Homography.OK


@pytest.mark.parametrize(
    ("bundle", "sentence"),
    [("missing", "does not exist"), ("truncated", "truncated or replaced"), ("future", "schema 99")],
)
def test_a_bad_bundle_fails_the_transition_and_a_good_one_mends_it(
    client: Client, restart: Restart, now: float, bundles: dict[str, Path], bundle: str, sentence: str
) -> None:
    assert client.transition("deactivate", "cleanup") == [True, True]
    assert client.set(bundle=str(bundles[bundle])) == ""
    assert client.transition("configure") == [False] and client.state() == "unconfigured"
    _, status, values = client.status(lambda status, _: status.level == DiagnosticStatus.ERROR)
    assert sentence in status.message and "\n" not in status.message and values["state"] == "unconfigured"
    assert status.message in client.process.log
    restart(bundle=str(bundles["fast"]))
    assert client.match(now, GRAY, GRAY)[1].status == Homography.OK
    client.status(lambda status, _: status.level != DiagnosticStatus.ERROR)


def test_bursts_faster_than_the_matcher(client: Client, restart: Restart, now: float, bundles: dict[str, Path]) -> None:
    restart(bundle=str(bundles["slow"]))
    _, _, before = client.status(lambda _, values: "pairs published" in values)
    count = 30
    for index in range(count):
        for camera in (0, 1):
            client.send(camera, now + index * 0.1, GRAY)
    client.answer(now + (count - 1) * 0.1)  # the newest is answered
    received = count + int(before["image0 received"])
    _, _, values = client.status(lambda _, values: int(values["image0 received"]) == received)
    assert len(client.homographies) < count / 2
    answered = int(values["pairs published"])
    stamps = [m.header0.stamp.sec * 10**9 + m.header0.stamp.nanosec for m in client.homographies]
    assert stamps == sorted(stamps)
    for camera in (0, 1):
        dropped = {key: int(n) for key, n in values.items() if key.startswith(f"image{camera} dropped") and n != "0"}
        assert dropped.get(f"image{camera} dropped busy", 0) > 0
        assert int(values[f"image{camera} received"]) == answered + sum(dropped.values())
    restart(bundle=str(bundles["fast"]))


def test_exact_pairing(client: Client, restart: Restart, now: float) -> None:
    restart(approximate_sync=False)
    client.send(0, now, GRAY)
    client.send(1, now + 1e-3, GRAY)
    client.match(now + 1, GRAY, GRAY)
    assert len(client.points) == 1
    restart(approximate_sync=True)


def test_quality_of_service(client: Client, restart: Restart, now: float) -> None:
    reliable = client.images
    client.images = [client.publisher(p.topic_name, reliable=False) for p in reliable]
    try:
        client.send(0, now, GRAY)
        _, status, _ = client.status(
            lambda status, _: status.level == DiagnosticStatus.WARN and "QoS" in status.message
        )
        assert "RELIABILITY" in status.message and "/cam0/image" in status.message
        restart(image_qos="sensor_data")  # now a best-effort camera is heard
        assert client.match(now, GRAY, GRAY)[1].status == Homography.OK
    finally:
        for publisher in client.images:
            client.node.destroy_publisher(publisher)
        client.images = reliable
    client.connected(now + 10)  # and a reliable one as well
    restart(image_qos="reliable")


def reliability(client: Client) -> str:
    """How the node subscribes to camera 0."""
    found = client.node.get_subscriptions_info_by_topic(client.images[0].topic_name)
    return str(found[0].qos_profile.reliability.name) if len(found) == 1 else ""


def test_quality_of_service_follows_the_publishers(client: Client, restart: Restart, now: float) -> None:
    assert client.transition("deactivate", "cleanup") == [True, True]
    assert client.set(image_qos="auto") == "" and client.transition("configure", "activate") == [True, True]
    client.until(lambda: reliability(client) == "RELIABLE", "reliable as the publisher")
    client.connected(now)
    other = client.publisher(client.images[0].topic_name, reliable=False)
    client.until(lambda: reliability(client) == "BEST_EFFORT", "best effort: a publisher is")
    client.connected(now + 20)
    client.node.destroy_publisher(other)
    client.until(lambda: reliability(client) == "RELIABLE", "reliable again")
    client.connected(now + 40)
    restart(image_qos="reliable")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"ransac_threshold": -1.0}, "ransac_threshold"),
        ({"ransac_threshold": float("nan")}, "ransac_threshold"),
        ({"ransac_threshold": "wide"}, "DOUBLE"),
        ({"score_threshold": 1.5}, "score_threshold"),
        ({"max_matches": -1}, "max_matches"),
        ({"intensity_percentiles": [99.0, 1.0]}, "the lower one first"),
        ({"intensity_percentiles": [1.0, 2.0, 3.0]}, "two values"),
        ({"backend": "onnxruntime"}, "when the node is configured"),
        ({"bundle": "other.onnx"}, "when the node is configured"),
        ({"queue_size": 20}, "when the node is configured"),
        ({"max_matches": 10, "image_transport": "raw"}, "when the node is configured"),
    ],
)
def test_parameters_are_refused_with_the_reason(client: Client, values: dict[str, Any], reason: str) -> None:
    assert reason in client.set(**values)


def test_choices_are_checked_while_unconfigured(client: Client, restart: Restart) -> None:
    assert client.transition("deactivate", "cleanup") == [True, True]
    for values in ({"backend": "abacus"}, {"image_transport": "theora"}, {"image_qos": "perfect"}):
        assert "use one of" in client.set(**values)
    restart()


def test_parameters_that_change_at_run_time_do(client: Client, now: float) -> None:
    assert client.set(max_matches=20, ransac_threshold=5.0) == ""
    points, _ = client.match(now, GRAY, GRAY)
    assert len(points.scores) == 20
    assert client.set(max_matches=0, score_threshold=0.8) == ""
    points, _ = client.match(now + 1, GRAY, GRAY)
    assert 20 < len(points.scores) < 80 and min(points.scores) >= np.float32(0.8)
    assert client.set(score_threshold=-1.0, min_significance=1000.0) == ""
    assert client.match(now + 2, GRAY, GRAY)[1].status == Homography.NOT_SIGNIFICANT
    assert client.set(min_significance=10.0) == ""
