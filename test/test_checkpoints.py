"""Checkpoints of every published layout load to the last key; everything else is refused with one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import seeded
import torch
from safetensors.torch import save_file

from matchanything_ros.errors import UserError
from matchanything_tools.checkpoints import load_strict, read_checkpoint, sha256
from matchanything_tools.fingerprints import guess_family


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))


def state() -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network().state_dict().items()}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state().items()}


LAYOUTS = {
    "raw": state(),
    "lightning": {"state_dict": prefixed("matcher.model."), "epoch": 3, "hyper_parameters": {"lr": 1e-3}},
    "model": {"model": prefixed("module.")},
    "nested": {"state_dict": {"model": prefixed("_orig_mod.matcher.")}},
    "other names": {"params_of_student": prefixed("student.backbone."), "step": 7},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save(LAYOUTS[layout], path)
    loaded = read_checkpoint(path)
    assert list(loaded) == list(state())
    module = network()
    for value in module.state_dict().values():
        value.zero_()
    load_strict(module, loaded, what="the toy", path=path)
    for key, value in state().items():
        assert torch.equal(module.state_dict()[key], value)


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(prefixed("matcher."), str(path))
    assert list(sorted(read_checkpoint(path))) == sorted(state())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"no whole \.safetensors"):
        read_checkpoint(path)


def test_the_content_tells_the_format_not_the_name(tmp_path: Path) -> None:
    save_file(state(), str(tmp_path / "weights.pth"))
    torch.save(state(), tmp_path / "weights.safetensors")
    for path in tmp_path.iterdir():
        assert sorted(read_checkpoint(path)) == sorted(state()), path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_are_read(dtype: torch.dtype) -> None:
    loaded = network()
    load_strict(loaded, {key: value.to(dtype) for key, value in state().items()}, what="the toy", path=Path("toy.ckpt"))
    torch.testing.assert_close(loaded.state_dict()["0.weight"], state()["0.weight"].to(dtype).float())


def test_weights_that_are_no_floating_point_numbers_are_refused() -> None:
    """Copied into the network, 8-bit weights would be integers without scale: a network that runs and is wrong."""
    odd = {
        "int8": (state()["0.weight"] * 100).to(torch.int8),
        "complex64": state()["0.weight"].to(torch.complex64),
        "sparse_coo": state()["0.weight"].to_sparse(),
        "meta": state()["0.weight"].to("meta"),
    }
    for name, value in odd.items():
        with pytest.raises(UserError, match=rf"stores 0\.weight .*{name}"):
            load_strict(network(), state() | {"0.weight": value}, what="the toy", path=Path("toy.ckpt"))


def test_prefix_that_only_some_keys_share_stays(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"matcher.a": torch.zeros(1), "b": torch.zeros(1)}, path)
    assert set(read_checkpoint(path)) == {"matcher.a", "b"}


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch code_was_run",)


def test_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for zipped in (True, False):
        path = tmp_path / "evil.ckpt"
        torch.save({"state_dict": state(), "hook": Evil()}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match="contains code"):
            read_checkpoint(path)
    assert not Path("code_was_run").exists()


def test_unreadable_files(tmp_path: Path) -> None:
    whole = tmp_path / "whole.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(100_000)}}, whole)
    raw = whole.read_bytes()
    cases = {
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 64000000\n", "Git LFS pointer"),
        "truncated": (raw[: len(raw) // 2], "truncated"),
        "empty": (b"", "empty"),
        "page": (b"<!doctype html><html><body>Sign in to download</body></html>", "web page"),
        "noise": (bytes(range(256)) * 20, "truncated"),
    }
    for name, (content, sentence) in cases.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        with pytest.raises(UserError, match=sentence) as caught:
            read_checkpoint(path)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "nowhere.ckpt")
    with pytest.raises(UserError, match="is a folder"):
        read_checkpoint(tmp_path)
    other = tmp_path / "list.pt"
    torch.save({"epoch": 1, "losses": [0.1] * 50}, other)
    with pytest.raises(UserError, match="no state dict"):
        read_checkpoint(other)
    torch.save(state() | {"epoch": 1}, other)
    with pytest.raises(UserError, match="7 tensors and, beside them, epoch"):
        read_checkpoint(other)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(other))
    with pytest.raises(UserError, match="TorchScript"):
        read_checkpoint(other)


def test_renamed_and_additional_keys_nan_and_shape(tmp_path: Path) -> None:
    path = Path("toy.ckpt")
    renamed = state()
    renamed["0.wait"] = renamed.pop("0.weight")
    with pytest.raises(UserError, match=r"1 missing: 0\.weight; 1 unexpected: 0\.wait"):
        load_strict(network(), renamed, what="the toy", path=path)
    with pytest.raises(UserError, match=r"\(7 keys\): 1 unexpected: 0\.wait\."):
        load_strict(network(), state() | {"0.wait": torch.zeros(1)}, what="the toy", path=path)
    shaped = state() | {"0.bias": torch.zeros(5)}
    with pytest.raises(UserError, match=r"0\.bias \[5\] instead of \[4\]"):
        load_strict(network(), shaped, what="the toy", path=path)
    broken = state()
    broken["1.running_var"][2] = float("nan")
    with pytest.raises(UserError, match=r"not finite in 1\.running_var"):
        load_strict(network(), broken, what="the toy", path=path)


def test_another_model_is_named() -> None:
    wrong = {key: torch.zeros(shape) for key, shape in {"desc_head.agg_weights": (32, 128, 128), "x": (2,)}.items()}
    with pytest.raises(UserError, match="looks like ALIKED n32: give the checkpoint of the toy") as caught:
        load_strict(network(), wrong, what="the toy", path=Path("toy.ckpt"))
    assert "and 3 more" in str(caught.value)  # shortened: 7 keys are missing
    with pytest.raises(UserError, match="give the file as it was published"):  # it is that one, but damaged
        load_strict(network(), wrong, what="ALIKED n32", path=Path("toy.ckpt"))


@pytest.mark.parametrize("target", sorted(seeded.TARGETS))
def test_every_published_model_is_recognised(target: str) -> None:
    import json

    entries = json.loads((seeded.KEYS / f"{target}.json").read_text())
    from matchanything_tools.checkpoints import strip_prefixes

    shapes = strip_prefixes({key: torch.empty(shape, device="meta") for key, (shape, _) in entries.items()})
    expected = {
        "roma": "MatchAnything-RoMa",
        "eloftr": "MatchAnything-ELoFTR",
        "dinov2": "DINOv2 ViT-L/14",
        "aliked-n16": "ALIKED n16 or n16rot",
        "aliked-n16rot": "ALIKED n16 or n16rot",
        "aliked-n32": "ALIKED n32",
        "aliked-t16": "ALIKED t16",
    }
    assert guess_family(shapes) == expected.get(target, target.replace("dedode_", "DeDoDe ").replace("_", " "))


def test_seeded_checkpoints_are_those_of_the_golden_results() -> None:
    for target in ("eloftr", "dedode_detector_L", "dedode_descriptor_B"):
        seeded.weights(target)  # asserts the digest


def test_hash(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
