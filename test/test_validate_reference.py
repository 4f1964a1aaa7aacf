"""What validate compares a bundle with: the PyTorch network in fp32, in pixels of the images, within which limits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import seeded
from tiny_bundle import expected, write_bundle

from matchanything_ros.bundle import Bundle, WeightsInfo, load_bundle, sha256_of
from matchanything_ros.cli import main
from matchanything_tools.rebuild import rebuild
from matchanything_tools.validate import against, pytorch_network

WEIGHTS = Path(__file__).parent / "data" / "weights" / "aliked-t16.pth"


def replace_reference(monkeypatch: pytest.MonkeyPatch, shift_px: float) -> None:
    """In place of the PyTorch network, the tiny bundle's results with matches so far to the right."""

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays = expected(inputs["image0"], inputs["image1"])
        return {**arrays, "keypoints1": arrays["keypoints1"] + np.array([shift_px, 0], np.float32)}

    monkeypatch.setattr("matchanything_tools.validate.pytorch_network", lambda *_: run)


def test_validate_fails_if_the_pytorch_network_gives_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_bundle(tmp_path)
    words = ["validate", str(bundle.onnx), "--weights", "some.pth", "--out", str(tmp_path / "validation.json")]
    words += ["--backend", "onnxruntime-cpu"]
    replace_reference(monkeypatch, 0.0)
    assert main(words) == 0
    replace_reference(monkeypatch, 0.3)
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "deviates: PyTorch, fp32: keypoints are 0.300 px off (limit 0.02).\n" in error and "golden" not in error


def test_golden_images_have_wider_limits_than_real_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """0.4 px off both the golden result and the PyTorch network: in fp16 too far on real images only."""
    bundle = write_bundle(tmp_path)
    arrays = dict(np.load(bundle.golden))
    np.savez(bundle.golden, **{**arrays, "keypoints1": arrays["keypoints1"] + np.array([0.4, 0], np.float32)})
    manifest = dataclasses.replace(bundle.manifest, precision="fp16", golden_sha256=sha256_of(bundle.golden))
    bundle.onnx.with_suffix(".json").write_text(manifest.to_json())
    replace_reference(monkeypatch, 0.4)
    (tmp_path / "pairs" / "real").mkdir(parents=True)
    for name in ("0.png", "1.png"):
        cv2.imwrite(str(tmp_path / "pairs" / "real" / name), arrays["image0"])
    out = tmp_path / "validation.json"
    words = ["validate", str(bundle.onnx), "--weights", "some.pth", "--out", str(out), "--backend", "onnxruntime-cpu"]
    assert main(words) == 0
    assert main([*words, "--pairs", str(tmp_path / "pairs")]) == 1
    assert "deviates: PyTorch, fp32: keypoints are 0.400 px off (limit 0.25).\n" in capsys.readouterr().err
    report = json.loads(out.read_text())
    assert (report["limits"]["mean_px"], report["golden_limits"]["mean_px"]) == (0.25, 0.5)


def test_corners_are_compared_in_pixels_of_the_images(tmp_path: Path) -> None:
    """Image 0 has twice as many pixels as the network's input (64x48), image 1 three times: 4 px there are 12 px."""
    bundle = write_bundle(tmp_path)
    grid = np.stack(np.meshgrid(np.arange(4, 56, 8), np.arange(4, 48, 8)), -1).reshape(-1, 2).astype(np.float32)
    wanted = {"keypoints0": grid, "keypoints1": grid, "scores": np.full(len(grid), 0.9, np.float32)}
    given = {**wanted, "keypoints1": grid + np.array([4, 0], np.float32)}
    engine: Any = SimpleNamespace(bundle=bundle, run=lambda _: given)
    image0, image1 = np.zeros((96, 128, 3), np.uint8), np.zeros((144, 192, 3), np.uint8)
    deviation = against(engine, lambda _: wanted, image0, image1)
    assert deviation.distances == pytest.approx(4) and deviation.corner_px == pytest.approx(12, abs=1e-3)


def aliked(precision: str) -> Bundle:
    """What is known of a bundle that was exported so; the network itself is not needed."""
    command = "matchanything export aliked --variant t16 --weights aliked-t16.pth --size 64x96 --keypoints 32"
    exporter = {"command": f"{command} --precision {precision} --out small.onnx"}
    entry = WeightsInfo(WEIGHTS.name, sha256_of(WEIGHTS), "BSD-3-Clause", "")
    manifest = dataclasses.replace(load_bundle("kestrel").manifest, weights=(entry,), exporter=exporter)
    return Bundle(Path("small.onnx"), dataclasses.replace(manifest, precision=precision))


def test_a_bundle_in_fp16_is_rebuilt_and_compared_in_fp32() -> None:
    item = rebuild(aliked("fp16"), [WEIGHTS])
    assert item.precision == "fp32" and {str(each.dtype) for each in item.module.parameters()} == {"torch.float32"}
    image = np.random.default_rng(0).random((1, 3, 64, 96), np.float32)
    one, other = (
        pytorch_network(aliked(precision), [WEIGHTS])({"image0": image, "image1": image[..., ::-1].copy()})
        for precision in ("fp32", "fp16")
    )
    assert len(one["scores"]) and all(np.array_equal(one[key], other[key]) for key in one)


def test_checkpoints_of_one_name_in_two_folders(tmp_path: Path) -> None:
    """Detector and descriptor may both be called model.pth: each is found by its hash and put to its flag."""
    paths = []
    for target in ("dedode_detector_B", "dedode_descriptor_B"):
        paths.append(tmp_path / target / "model.pth")
        paths[-1].parent.mkdir()
        seeded.save(target, paths[-1])
    entries = tuple(WeightsInfo("model.pth", sha256_of(path), "none", "") for path in paths)
    command = "matchanything export dedode --weights model.pth --descriptor model.pth --size 64x64 --keypoints 16"
    manifest = dataclasses.replace(load_bundle("kestrel").manifest, weights=entries, exporter={"command": command})
    item = rebuild(Bundle(tmp_path / "dedode.onnx", manifest), paths[::-1])
    assert [entry.sha256 for entry in item.weights] == [entry.sha256 for entry in entries] and item.variant == "BB"
