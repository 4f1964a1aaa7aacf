"""Plans: whatever does not fit is refused with one sentence and the command that rebuilds it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from plan_case import ORIN, TRT, write_plan
from tiny_bundle import SIZE, write_bundle

from matchanything_ros.engines.device import Device
from matchanything_ros.engines.flavour import flavours, load_flavour, refusal
from matchanything_ros.engines.plan import (
    choose_plan,
    find_plans,
    manifest_path,
    misfit,
    plan_tag,
    read_manifest,
)
from matchanything_ros.errors import UserError


def test_what_is_written_is_read_and_fits(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    plan = write_plan(bundle)
    assert misfit(plan, bundle, TRT, ORIN) is None
    made = read_manifest(plan)
    assert made.profile == {f"image{i}": (SIZE, SIZE, SIZE) for i in (0, 1)} and made.compute_capabilities == ("8.7",)
    assert made.to_json() == manifest_path(plan).read_text()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"onnx_sha256": "f" * 64}, "from the network ffffffffffff and this is "),
        ({"data_sha256": "f" * 64}, "from other weights"),
        ({"flavour": "tensorrt_rtx"}, "with TensorRT-RTX and this is TensorRT 10.3.0"),
        ({"version": "10.2.0"}, "with TensorRT 10.2.0 and this is 10.3.0"),
        ({"compute_capabilities": ("8.6",)}, "for compute capability 8.6 and this is Orin with 8.7"),
        ({"gpu": "Orin Nano"}, "for the GPU Orin Nano and this is Orin"),
        ({"cuda": "13.0"}, "driver for CUDA 13.0 and this is 12.6, which is older"),
        ({"precision": "fp16"}, "in fp16 and this is fp32"),
        ({"profile": {"image0": (SIZE, SIZE, SIZE)}}, "for the inputs image0 and the bundle has image0, image1"),
        ({"profile": {f"image{i}": ((16, 16), SIZE, SIZE) for i in (0, 1)}}, "outside the bundle's sizes"),
        ({"plan_sha256": "0" * 64}, "is not the file that its manifest describes"),
        ({"size": 3}, "is not the file that its manifest describes"),
        (
            {"parity": {"passed": False, "summary": "matches are 0.50 px off"}},
            r"parity check \(matches are 0.50 px off\)",
        ),
        ({"schema": 99}, "has schema 99 and this version reads 1"),
    ],
)
def test_every_mismatch_is_one_sentence_and_the_command(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    bundle = write_bundle(tmp_path)
    reason = misfit(write_plan(bundle, **changes), bundle, TRT, ORIN)
    assert reason is not None and "\n" not in reason
    assert re.search(sentence, reason), reason
    assert f"run 'matchanything build {bundle.onnx}'" in reason


def test_a_newer_driver_and_a_narrower_profile_fit(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, dynamic=True)
    plan = write_plan(bundle, profile={f"image{i}": ((48, 48), SIZE, (64, 64)) for i in (0, 1)})
    assert misfit(plan, bundle, TRT, Device("Orin", "8.7", "13.0")) is None


def test_a_forced_plan_is_used_although_its_parity_failed_and_nothing_else_is_forgiven(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    bad = {"passed": False, "summary": "x"}
    assert misfit(write_plan(bundle, parity=bad, forced=True), bundle, TRT, ORIN) is None
    assert misfit(write_plan(bundle, parity=bad, forced=True, version="9.9"), bundle, TRT, ORIN) is not None


def test_no_gpu_no_manifest_broken_manifest(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    plan = write_plan(bundle)
    assert "this machine shows none" in str(misfit(plan, bundle, TRT, None))
    text = manifest_path(plan).read_text()
    for broken in (text[:100], "[]", json.dumps({**json.loads(text), "profile": 3}), text.replace("size", "sise")):
        manifest_path(plan).write_text(broken)
        assert "cannot be read" in str(misfit(plan, bundle, TRT, ORIN))
    manifest_path(plan).unlink()
    assert "has no manifest" in str(misfit(plan, bundle, TRT, ORIN))


def test_the_fitting_one_among_many_is_chosen_and_the_others_explained(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path)
    old = write_plan(bundle, "a", version="10.2.0")
    rtx = write_plan(bundle, "b-rtx", flavour="tensorrt_rtx")
    right = write_plan(bundle, "c")
    (tmp_path / "tiny2.x.plan").write_bytes(b"another bundle's")
    choice = choose_plan(bundle, [TRT], ORIN)
    assert choice.plan == right and choice.flavour == TRT and set(choice.reasons) == {old, rtx}
    assert choose_plan(bundle, [], ORIN).plan is None
    assert find_plans(bundle) == [old, rtx, right]


def test_names_tell_devices_and_flavours_apart() -> None:
    card = Device("NVIDIA GeForce RTX 3080", "8.6", "13.0")
    assert plan_tag("tensorrt", card) == "nvidia-geforce-rtx-3080"
    assert plan_tag("tensorrt_rtx", card) == "nvidia-geforce-rtx-3080-rtx"
    assert plan_tag("tensorrt_rtx", None, ("sm_86", "sm_120")) == "sm_86-sm_120-rtx"


def test_old_and_placeholder_tensorrt_are_refused_with_the_reason() -> None:
    assert "too old: strongly typed networks" in str(refusal("tensorrt", "8.6.1"))
    assert "placeholder" in str(refusal("tensorrt", ""))
    assert (
        refusal("tensorrt", "10.3.0")
        is refusal("tensorrt", "11.4.0.106")
        is refusal("tensorrt_rtx", "1.7.1.116")
        is None
    )


def test_no_tensorrt_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matchanything_ros.engines.flavour.MODULES", {"tensorrt": ("no_such_module",)})
    assert flavours() == ([], [])
    with pytest.raises(UserError, match="JetPack"):
        load_flavour()
    with pytest.raises(UserError, match="Only TensorRT-RTX builds for a GPU that is not in this machine"):
        load_flavour(for_target=True)
