"""Diagnostics: what is counted, and when a node warns."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from matchanything_ros import diagnostics
from matchanything_ros.diagnostics import Level, Statistics, describe
from matchanything_ros.homography import Status
from matchanything_ros.pairing import Drop, Pairing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each look at the clock is one second later."""
    seconds = iter(range(100))
    monkeypatch.setattr(diagnostics.time, "monotonic", lambda: float(next(seconds)))


def stand_in(pairing: Pairing) -> Any:
    manifest = SimpleNamespace(name="net", onnx_sha256="ab")
    matcher = SimpleNamespace(
        bundle=SimpleNamespace(manifest=manifest, onnx="net.onnx"), engine=SimpleNamespace(backend="cpu")
    )
    return SimpleNamespace(matcher=matcher, pairing=pairing, lock=threading.Lock())


INPUTS = SimpleNamespace(lost=[0, 3], silence=lambda camera: f"camera {camera} is silent.")


def test_percentiles_and_outcomes() -> None:
    statistics = Statistics()
    for value in range(1, 101):
        statistics.record({"network": float(value)}, Status.OK)
    statistics.record({}, Status.NOT_COMPUTED, "broken")
    assert statistics.percentiles()["network"] == pytest.approx((50.5, np.percentile(range(1, 101), 95)))
    values = statistics.values(Pairing())
    assert (values["pairs OK"], values["pairs NOT_COMPUTED"], values["pairs published"]) == ("100", "1", "101")
    assert statistics.failure == "broken"
    statistics.record({}, Status.OK)
    assert statistics.failure == ""


def test_every_reason_of_a_drop_is_listed() -> None:
    values = Statistics().values(Pairing())
    assert {f"image{camera} dropped {reason.value}" for camera in (0, 1) for reason in Drop} <= set(values)


def test_levels(clock: None) -> None:
    statistics, pairing = Statistics(), Pairing()
    worker = stand_in(pairing)

    def look(problem: str = "") -> Any:
        return describe("active", problem, worker, statistics, INPUTS, None)

    assert look().level == Level.OK  # rates need two looks
    for _ in range(4):
        assert look().level == Level.OK  # and silence some seconds
    assert look().sentence == "camera 0 is silent. camera 1 is silent."
    pairing.add(0, 10**9, None)
    report = look()
    assert (report.level, report.sentence) == (Level.WARN, "camera 1 is silent.")
    assert report.values["image0 rate [Hz]"] == "0.20" and report.values["image1 lost on the way"] == "3"
    pairing.add(0, 2 * 10**9, None)
    pairing.add(1, 3 * 10**9, None)
    assert "none pair" in look().sentence and "queue_size" in look().sentence
    for camera in (0, 1):
        pairing.add(camera, 4 * 10**9, None)
    assert pairing.take() is not None
    for camera in (0, 1):
        pairing.add(camera, 5 * 10**9, None)
    assert look().level == Level.OK  # in work for longer than a report's second
    statistics.record({}, Status.OK)
    assert look("the bundle is missing").level == Level.ERROR
    assert look().values["state"] == "active"


def test_a_slow_camera_is_not_silent(clock: None) -> None:
    """Half an image a second, as a radar's or a map's."""
    statistics, pairing = Statistics(), Pairing()
    worker = stand_in(pairing)
    for second in range(30):
        if second % 2 == 0:
            for camera in (0, 1):
                pairing.add(camera, (second + 1) * 10**9, None)
            while pairing.take() is not None:
                statistics.record({}, Status.OK)
        report = describe("active", "", worker, statistics, INPUTS, None)
        assert report.level == Level.OK
    assert 0.3 < float(report.values["image0 rate [Hz]"]) < 0.7 and "0." in report.sentence


def test_an_old_failure_hides_nothing(clock: None) -> None:
    statistics, pairing = Statistics(), Pairing()
    worker = stand_in(pairing)

    def look(inputs: Any = INPUTS) -> Any:
        return describe("active" if inputs else "inactive", "", worker, statistics, inputs, None)

    look()
    for camera in (0, 1):
        pairing.add(camera, 10**9, None)
    assert pairing.take() is not None
    statistics.record({}, Status.NOT_COMPUTED, "broken image")
    assert (look().level, look().sentence) == (Level.ERROR, "broken image")
    later = [look() for _ in range(6)][-1]
    assert (later.level, later.sentence) == (Level.WARN, "camera 0 is silent. camera 1 is silent.")
    assert (look(None).level, look(None).sentence) == (Level.OK, "inactive")
    assert look().level == Level.OK  # active again: nothing is known yet
