"""Plans in use: the fitting one is taken, checked once, built in the background, and left when its context is lost."""

from __future__ import annotations

import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plan_case import ORIN, write_plan
from tensorrt_machine import Machine
from tiny_bundle import write_bundle

from matchanything_ros.engines import open_engine, open_plan
from matchanything_ros.engines.background_build import BackgroundBuild, plan_is_missing
from matchanything_ros.engines.device import current_device
from matchanything_ros.engines.flavour import Flavour
from matchanything_ros.engines.plan import (
    find_plans,
    read_manifest,
)
from matchanything_ros.errors import UserError
from matchanything_ros.matcher import Matcher
from matchanything_ros.pairing import Pairing
from matchanything_ros.worker import Worker


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with doubles of TensorRT, pycuda and the driver, and a plan of unknown parity."""
    machine = Machine(tmp_path)
    flavour = Flavour("tensorrt", "10.3.0", machine.trt)
    monkeypatch.setattr(open_plan, "flavours", lambda: ([flavour], []))
    monkeypatch.setattr(open_plan, "current_device", lambda: ORIN)
    monkeypatch.setattr("matchanything_ros.engines.cuda.import_pycuda", lambda: machine.cuda)
    content = machine.plan.read_bytes()
    machine.plan.unlink()
    write_plan(machine.bundle, content=content, parity=None)
    return machine


def test_auto_uses_a_fitting_plan_and_the_matcher_gives_the_same_as_onnx_runtime(machine: Machine) -> None:
    rng = np.random.Generator(np.random.PCG64(2))
    images = [rng.integers(0, 256, shape, np.uint8) for shape in ((70, 90, 3), (50, 60))]
    with Matcher(machine.bundle) as matcher, Matcher(machine.bundle, "onnxruntime-cpu") as other:
        assert matcher.engine.backend == "tensorrt"
        here, there = matcher.match(*images), other.match(*images)
        as_float = matcher.match(*(image.astype(np.float32) / np.float32(255) for image in images))
    for result in (here, as_float):
        np.testing.assert_allclose(result.keypoints0, there.keypoints0, atol=1e-3)
        np.testing.assert_allclose(result.keypoints1, there.keypoints1, atol=1e-3)
    assert set(here.timings_ms) == set(there.timings_ms)
    assert machine.cuda.retained == 0 and machine.cuda.memory == []


def test_a_plan_built_elsewhere_is_checked_once_at_first_use(machine: Machine) -> None:
    (plan,) = find_plans(machine.bundle)
    open_engine(machine.bundle, "tensorrt").close()
    parity = read_manifest(plan).parity
    assert parity is not None and parity["passed"] and parity["expected"] == 12
    machine.cuda.calls.clear()
    open_engine(machine.bundle, "tensorrt").close()
    assert "synchronize" not in machine.cuda.calls, "not run again"


def test_a_plan_that_fails_its_first_check_is_never_used_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (plan,) = find_plans(machine.bundle)
    monkeypatch.setattr(machine, "_enqueue", lambda *_: None)
    machine.trt.enqueue = lambda *_: None  # a miscompiled network: zeros
    with pytest.raises(UserError, match=r"failed its parity check .*run 'matchanything build"):
        open_engine(machine.bundle, "tensorrt")
    assert read_manifest(plan).bad and machine.cuda.retained == 0
    with caplog.at_level(logging.WARNING):
        engine = open_engine(machine.bundle, "auto")
    assert engine.backend == "onnxruntime-cpu" and "parity" in caplog.text
    engine.close()


def test_without_a_plan_tensorrt_says_what_to_type_and_auto_does_not_ask(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    with pytest.raises(UserError, match=rf"no TensorRT plan beside .*run 'matchanything build {bundle.onnx}'"):
        open_engine(bundle, "tensorrt")
    engine = open_engine(bundle, "auto")
    assert engine.backend.startswith("onnxruntime")
    engine.close()


def test_doctor_lines(machine: Machine) -> None:
    lines = "\n".join(open_plan.plan_report(machine.bundle))
    assert lines == "plan tiny.orin.plan (parity not checked yet: done at first use)"
    (plan,) = find_plans(machine.bundle)
    write_plan(machine.bundle, version="10.2.0")
    (line,) = open_plan.plan_report(machine.bundle)
    assert line.startswith(f"not run: The plan {plan.name} was built with") and "run 'matchanything build" in line
    plan.unlink()
    assert open_plan.plan_report(machine.bundle) == [f"no plan: run 'matchanything build {machine.bundle.onnx}'"]


def test_a_build_in_the_background_would_help_only_without_a_fitting_or_failing_plan(machine: Machine) -> None:
    assert not plan_is_missing(machine.bundle)
    write_plan(machine.bundle, version="10.2.0")
    assert plan_is_missing(machine.bundle)
    write_plan(machine.bundle, parity={"passed": False, "summary": "x"})
    assert not plan_is_missing(machine.bundle), "it would fail again, at every start of the node"


def _until_ended(build: BackgroundBuild) -> None:
    deadline = time.monotonic() + 20
    while not (build.succeeded or build.failed):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_background_build_tells_how_it_stands(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    build = BackgroundBuild(
        machine.bundle, [sys.executable, "-c", "import sys; sys.stdin.read(); open(sys.argv[1])", "x"]
    )
    _until_ended(build)
    assert build.failed and "was not built: FileNotFoundError" in build.status()
    build.close()
    build = BackgroundBuild(machine.bundle, [sys.executable, "-c", "import time; time.sleep(60)"])
    assert build.status().startswith("Building the TensorRT plan of tiny.onnx for 0 s")
    start = time.monotonic()
    build.close()
    assert build.failed and time.monotonic() - start < 5
    build = BackgroundBuild(machine.bundle, [sys.executable, "-c", "pass"])
    _until_ended(build)
    assert build.succeeded and build.status() == "The TensorRT plan of tiny.onnx is built."
    build.close()


def test_background_build_is_the_real_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU it fails, with the command's own sentence."""
    if current_device() is not None:
        pytest.skip("there is a GPU")
    links = tmp_path / "links"
    links.mkdir()
    for name in ("matchanything_ros", "matchanything_tools"):
        (links / name).symlink_to(Path(__import__(name).__file__ or "").parent)
    monkeypatch.setenv("PYTHONPATH", str(links))
    build = BackgroundBuild(write_bundle(tmp_path))
    _until_ended(build)
    assert build.failed and re.search("There is no (GPU|usable TensorRT) here", build.status()), build.status()
    build.close()


def test_after_a_lost_context_the_node_can_be_configured_again(machine: Machine) -> None:
    """What the node does with its worker: failed frames, cleanup, configure; then ONNX Runtime matches.

    CUDA itself is lost until the process ends.
    """
    images = np.random.Generator(np.random.PCG64(2)).integers(0, 256, (2, 60, 80, 3), np.uint8)
    results: list[Any] = []

    def work(matcher: Matcher, pair: Any) -> None:
        try:
            results.append(len(matcher.match(pair.image0, pair.image1)))
        except UserError as error:
            results.append(str(error))

    def frame(worker: Worker, stamp: int) -> None:
        count = len(results)
        for camera in (0, 1):
            worker.add(camera, stamp, images[camera])
        deadline = time.monotonic() + 20
        while len(results) == count:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def configured() -> Worker:
        return Worker(lambda: Matcher(machine.bundle), Pairing(0.05), work)

    worker = configured()
    frame(worker, 1)
    machine.cuda.lost = machine.cuda.LogicError("cuStreamSynchronize failed: an illegal memory access was encountered")
    frame(worker, 2)
    frame(worker, 3)
    worker.stop()
    assert machine.cuda.retained == 0
    worker = configured()
    assert worker.matcher is not None and worker.matcher.engine.backend == "onnxruntime-cpu"
    frame(worker, 4)
    worker.stop()
    assert results[0] == results[3] == 12
    assert all("cannot be used in this process any more: start the program again" in result for result in results[1:3])


def test_a_matcher_goes_over_to_the_plan_once_it_is_there(machine: Machine) -> None:
    (plan,) = find_plans(machine.bundle)
    away = plan.with_suffix(".away")
    plan.rename(away)
    images = np.random.Generator(np.random.PCG64(2)).integers(0, 256, (2, 60, 80, 3), np.uint8)
    with Matcher(machine.bundle) as matcher:
        assert matcher.engine.backend == "onnxruntime-cpu"
        before = matcher.match(*images)
        away.rename(plan)
        matcher.reopen()
        assert matcher.engine.backend == "tensorrt"
        np.testing.assert_allclose(matcher.match(*images).keypoints1, before.keypoints1, atol=1e-3)
        plan.unlink()
        with pytest.raises(UserError):
            matcher.reopen("tensorrt")
        assert len(matcher.match(*images)) == len(before)
    assert machine.cuda.retained == 0
