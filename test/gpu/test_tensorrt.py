"""TensorRT itself on this GPU: build, run, parity, speed. Skipped where TensorRT, pycuda or such a GPU is missing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import LARGEST, SMALLEST, expected, write_bundle

from matchanything_ros.bundle import BUNDLES, Bundle, load_bundle
from matchanything_ros.engines import open_engine
from matchanything_ros.engines.flavour import flavours
from matchanything_ros.engines.open_plan import open_plan
from matchanything_ros.engines.parity import check_parity, compare, load_golden
from matchanything_ros.engines.plan import manifest_path, read_manifest
from matchanything_ros.errors import UserError
from matchanything_ros.matcher import Matcher
from matchanything_tools.make_plan import make_plan

Report = Callable[[str], None]
PACKAGED = sorted(file.stem for file in BUNDLES.glob("*.onnx"))


@pytest.fixture(params=[flavour.name for flavour in flavours()[0]] or ["none"])
def flavour(request: pytest.FixtureRequest, gpu: Any, drv: Any) -> Iterator[str]:
    if request.param == "none":
        pytest.skip("no usable TensorRT here")
    if request.param == "tensorrt_rtx":
        trt = next(entry.trt for entry in flavours()[0] if entry.name == "tensorrt_rtx")
        if f"SM{gpu.target[3:]}" not in trt.ComputeCapability.__members__:
            pytest.skip(f"TensorRT-RTX does not support {gpu.name}")
    yield request.param


def built(bundle: Bundle, flavour: str) -> tuple[Path, Any]:
    return make_plan(bundle, flavour_name=flavour)


def test_small_network_of_every_size(flavour: str, tmp_path: Path, report: Report) -> None:
    bundle = write_bundle(tmp_path, dynamic=True)
    plan, made = built(bundle, flavour)
    assert made.parity is not None and made.parity["passed"], made.parity
    engine = open_plan(bundle)
    rng = np.random.Generator(np.random.PCG64(1))
    for size in (SMALLEST, LARGEST, (48, 96), (96, 64)):
        inputs = {name: rng.random((1, 3, *size), np.float32) for name in ("image0", "image1")}
        outputs = engine.run(inputs)
        for name, value in expected(inputs["image0"], inputs["image1"]).items():
            np.testing.assert_allclose(outputs[name], value, atol=1e-3)
    with pytest.raises(UserError, match="takes no image0"):
        engine.run({name: np.zeros((1, 3, 112, 128), np.float32) for name in ("image0", "image1")})
    engine.close()
    report(f"{plan.name} in {made.build_seconds:.1f} s, {made.parity['summary']}")


@pytest.mark.parametrize("name", PACKAGED or ["none"])
def test_packaged_bundle(flavour: str, name: str, tmp_path: Path, report: Report) -> None:
    """Build, parity from arrays and from images, time against ONNX Runtime, 20 starts."""
    if name == "none":
        pytest.skip("no bundle in the package")
    for file in BUNDLES.glob(f"{name}.*"):
        shutil.copy2(file, tmp_path)
    bundle = load_bundle(tmp_path / f"{name}.onnx")
    _, made = built(bundle, flavour)
    again = built(bundle, flavour)[1]
    assert made.parity is not None and made.parity["passed"], made.parity
    golden = load_golden(bundle)
    engine = open_plan(bundle)
    if engine.takes_images:
        outputs, _, _ = engine.run_images((golden["image0"], golden["image1"]))
        parity = compare(golden, outputs, bundle.manifest.score_threshold, bundle.manifest.precision)
        assert parity.passed, parity
    engine.close()
    times = {}
    for backend in ("tensorrt", "onnxruntime"):
        with Matcher(bundle, backend) as matcher:
            for _ in range(5):
                matcher.match(golden["image0"], golden["image1"])
            laps = []
            for _ in range(30):
                start = time.perf_counter()
                matcher.match(golden["image0"], golden["image1"])
                laps.append(1e3 * (time.perf_counter() - start))
            times[matcher.engine.backend] = float(np.median(laps))
    for _ in range(20):
        open_plan(bundle).close()
    speed = ", ".join(f"{backend} {value:.2f} ms" for backend, value in times.items())
    report(
        f"built in {made.build_seconds:.0f} s, again in {again.build_seconds:.0f} s; {made.parity['summary']}; a pair: "
        f"{speed}; preprocessing {'on the CPU: ' + str(engine.fallback) if engine.fallback else 'on the GPU'}"
    )


def test_a_stale_plan_is_refused(flavour: str, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    plan, _ = built(bundle, flavour)
    text = manifest_path(plan).read_text()
    manifest_path(plan).write_text(text.replace(f'"version": "{read_manifest(plan).version}"', '"version": "1.0.0"'))
    with pytest.raises(UserError, match=r"1\.0\.0 and this is .*run 'matchanything build"):
        open_engine(bundle, "tensorrt")


def test_parity_finds_a_wrong_network(flavour: str, tmp_path: Path) -> None:
    """The golden result of another pair of images: what a miscompiled network looks like."""
    bundle = write_bundle(tmp_path)
    built(bundle, flavour)
    engine = open_plan(bundle)
    golden = load_golden(bundle)
    assert check_parity(engine).passed
    wrong = {**golden, "keypoints1": golden["keypoints1"] + np.float32(0.5)}
    outputs = {name: golden[name] for name in ("keypoints0", "keypoints1", "scores")}
    assert not compare(wrong, outputs, 0.2, "fp32").passed
    engine.close()
