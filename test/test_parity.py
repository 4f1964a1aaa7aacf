"""The comparison with the golden result passes rounding and refuses what is wrong."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny_bundle import write_bundle

from matchanything_ros.engines import open_engine
from matchanything_ros.engines.onnxruntime import OnnxRuntimeEngine, forbid_tf32
from matchanything_ros.engines.parity import check_parity, compare, load_golden, warn_if_wrong, warp_distances
from matchanything_ros.errors import UserError

RNG = np.random.Generator(np.random.PCG64(11))
COUNT = 200


def golden() -> dict[str, np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(1))
    points = rng.uniform(0, 400, (COUNT, 4)).astype(np.float32)
    scores = np.sort(rng.uniform(0.2, 1, COUNT).astype(np.float32))[::-1].copy()
    scores[150:] = 0  # padding, whose keypoints mean nothing
    return {"keypoints0": points[:, :2].copy(), "keypoints1": points[:, 2:].copy(), "scores": scores}


def changed(**arrays: np.ndarray) -> dict[str, np.ndarray]:
    return {**golden(), **arrays}


def test_itself_reordered_and_with_other_padding_passes() -> None:
    result = golden()
    order = np.concatenate([RNG.permutation(150), 150 + RNG.permutation(50)])
    outputs = {name: value[order].copy() for name, value in result.items()}
    outputs["keypoints0"][150:] = 12345
    parity = compare(result, outputs, 0.1, "fp32")
    assert parity.passed and parity.expected == parity.matches == 150 and parity.median_px == 0


def test_rounding_passes_and_a_shift_does_not() -> None:
    result = golden()
    noise = RNG.normal(0, 0.02, (COUNT, 2)).astype(np.float32)
    assert compare(result, changed(keypoints1=result["keypoints1"] + noise), 0.1, "fp32").passed
    shifted = compare(result, changed(keypoints1=result["keypoints1"] + np.float32(0.5)), 0.1, "fp32")
    assert not shifted.passed and "px off" in shifted.summary, "half a pixel is the commonest mistake of all"
    assert not compare(result, changed(keypoints1=result["keypoints1"] + np.float32(0.5)), 0.1, "fp16").passed


def test_swapped_missing_and_invented_matches_do_not_pass() -> None:
    result = golden()
    swapped = changed(keypoints0=result["keypoints1"], keypoints1=result["keypoints0"])
    assert not compare(result, swapped, 0.1, "fp16").passed
    fewer = changed(scores=np.where(np.arange(COUNT) < 100, result["scores"], 0))
    assert not compare(result, fewer, 0.1, "fp16").passed
    none = compare(result, changed(scores=np.zeros(COUNT, np.float32)), 0.1, "fp16")
    assert not none.passed and none.found == 0
    invented = changed(scores=np.full(COUNT, 0.9, np.float32), keypoints0=result["keypoints0"].copy())
    invented["keypoints0"][150:] = 0.5
    assert not compare(result, invented, 0.1, "fp32").passed
    assert not compare(changed(scores=np.zeros(COUNT, np.float32)), golden(), 0.1, "fp32").passed


def test_matches_at_the_threshold_may_come_and_go_in_fp16() -> None:
    result = golden()
    fewer = changed(scores=np.where(np.arange(COUNT) < 132, result["scores"], 0))  # 88 %
    assert compare(result, fewer, 0.1, "fp16").passed and not compare(result, fewer, 0.1, "fp32").passed


def test_of_few_matches_one_may_be_missing_but_not_the_only_one() -> None:
    few = {name: value[:12] for name, value in golden().items()}
    fewer = {**few, "scores": np.where(np.arange(12) < 11, few["scores"], 0)}
    assert compare(few, fewer, 0.1, "fp32").passed
    assert not compare(few, {**few, "scores": np.where(np.arange(12) < 10, few["scores"], 0)}, 0.1, "fp32").passed
    one = {name: value[:1] for name, value in golden().items()}
    none = {**one, "scores": np.zeros(1, np.float32)}
    assert not compare(one, none, 0.1, "fp16").passed and compare(none, none, 0.1, "fp32").passed


def test_nan_does_not_pass() -> None:
    outputs = golden()
    outputs["keypoints1"][190] = np.nan  # padding, yet a sign of something wrong
    parity = compare(golden(), outputs, 0.1, "fp16")
    assert not parity.passed and "finite" in parity.summary


def dense(shift: float = 0.0, half: int = 0) -> dict[str, np.ndarray]:
    """A warp [1, 4, 64, 2 * 96] as RoMa writes it: targets in image 1 on the left, in image 0 on the right; those of
    one half are so many pixels farther to the right."""
    y, x = np.mgrid[-1:1:64j, -1:1:96j].astype(np.float32)
    left, right = np.stack([x, y, x * 0.9, y * 0.9]), np.stack([x * 0.8, y * 0.8, x, y])
    (left, right)[half][2 - 2 * half] += np.float32(shift * 2 / 96)
    return {"warp": np.concatenate([left, right], 2)[None], "cert": np.ones((1, 1, 64, 192), np.float32)}


@pytest.mark.parametrize("half", [0, 1])
def test_a_dense_warp_decides_where_there_is_one(half: int) -> None:
    thin = {name: x[..., ::4, ::4].astype(np.float16) for name, x in dense().items()}
    result = {**golden(), **thin}
    moved = np.where(np.arange(COUNT)[:, None] % 5 < 2, 50, 0).astype(np.float32)
    other = changed(keypoints0=golden()["keypoints0"] + moved)  # two in five are other matches of the same warp
    same = compare(result, {**other, **dense()}, 0.1, "fp16")
    assert same.passed and same.warp_px is not None and same.warp_px < 0.05
    right, wrong = sorted(warp_distances(result, dense(3.0, half)), key=np.mean)
    assert len(right) == len(wrong) == 16 * 24 and right.max() < 0.05
    np.testing.assert_allclose(wrong, 3, atol=0.05)
    off = compare(result, {**other, **dense(3.0, half)}, 0.1, "fp16")
    assert not off.passed and off.warp_px == pytest.approx(3, abs=0.05)  # the worse direction, not both together
    none, swapped = changed(scores=np.zeros(COUNT, np.float32)), golden()
    swapped["keypoints0"], swapped["keypoints1"] = swapped["keypoints1"], swapped["keypoints0"]
    for matches, certainty in ((none, 1.0), (swapped, 1.0), (other, 0.0), (other, np.nan)):
        cert = np.full((1, 1, 64, 192), certainty, np.float32)
        assert not compare(result, {**matches, **dense(), "cert": cert}, 0.1, "fp16").passed
    nowhere = {**thin, "cert": np.full_like(thin["cert"], 0.4)}
    assert warp_distances(nowhere, dense()) == []


def test_any_engine_can_be_asked(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    engine = open_engine(bundle, "onnxruntime-cpu")
    assert check_parity(engine).passed
    engine.close()


def test_another_golden_result_is_refused(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    bundle.golden.write_bytes(b"other")
    with pytest.raises(UserError, match="is not the golden result"):
        load_golden(bundle)
    bundle.golden.unlink()
    with pytest.raises(UserError, match="is missing"):
        load_golden(bundle)


def test_an_engine_that_is_wrong_is_warned_of(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    engine = open_engine(bundle, "onnxruntime-cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_wrong(engine)
    arrays = load_golden(bundle)
    np.savez(bundle.golden, **{**arrays, "keypoints1": arrays["keypoints1"] + np.float32(3)})
    engine.bundle = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, golden_sha256=None))
    with pytest.warns(RuntimeWarning, match="in onnxruntime-cpu does not give the result it was exported with"):
        warn_if_wrong(engine)
    bundle.golden.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_wrong(engine)  # a bundle without a golden result cannot be checked


def test_no_memory_left_on_a_gpu_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullGpu:  # a mock: there is no GPU here
        def run_with_iobinding(self, binding: object) -> None:
            raise RuntimeError("bfc_arena.cc: Failed to allocate memory for requested buffer of size 36507222016\nmore")

    engine = OnnxRuntimeEngine(write_bundle(tmp_path), "cpu")
    monkeypatch.setattr(engine, "_bind", lambda inputs: None)
    engine.backend, engine._session = "onnxruntime-cuda", FullGpu()
    with pytest.raises(UserError, match=r"36507222016\. Export it with --precision fp16, or allow TF32"):
        engine.run({})


def test_tf32_is_forbidden_and_said_when_that_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    with pytest.warns(RuntimeWarning, match="start this process with NVIDIA_TF32_OVERRIDE=0"):
        assert forbid_tf32() == "0"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert forbid_tf32() == os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
        assert forbid_tf32() == "1"
        monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
        monkeypatch.delitem(sys.modules, "torch")
        assert forbid_tf32() == "0"
