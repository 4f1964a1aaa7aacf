"""Checkpoints of RoMa: every published layout loads, and what is something else is named for what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from matchanything_ros.cli import main
from matchanything_ros.errors import UserError
from matchanything_tools.networks.dinov2 import read_dinov2
from matchanything_tools.networks.roma.loading import read_roma

KEYS = {"encoder.cnn.layers.0.weight": torch.ones(2), "decoder.proj.1.0.bias": torch.zeros(3)}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in KEYS.items()}


LAYOUTS = {
    "MatchAnything": {"state_dict": prefixed("matcher.model.")},
    "RoMa and MINIMA": KEYS,
    "GIM": {"state_dict": prefixed("model.") | {"teacher.net.0.weight": torch.ones(1)}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout], tmp_path / "roma.ckpt")
    assert read_roma(tmp_path / "roma.ckpt").keys() == KEYS.keys()


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("tiny RoMa", ["coarse_matcher.0.layer.0.weight", "fine_matcher.0.layer.0.weight"]),
        ("RoMa v2", ["f.x.weight", "matcher.y.weight", "refiners.4.z.weight", "refiner_features.w.weight"]),
    ],
)
def test_other_romas_are_named(name: str, keys: list[str], tmp_path: Path) -> None:
    torch.save({key: torch.ones(1) for key in keys}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=f"is {name}, another architecture"):
        read_roma(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("width", "registers", "name"),
    [(384, False, "ViT-S/14:"), (768, True, "ViT-B/14 with"), (1024, True, "ViT-L/14 with")],
)
def test_other_dinov2_are_named(width: int, registers: bool, name: str, tmp_path: Path) -> None:
    state = {"cls_token": torch.zeros(1, 1, width)}
    if registers:
        state["register_tokens"] = torch.zeros(1, 4, width)
    torch.save(state, tmp_path / "dinov2.pth")
    with pytest.raises(UserError, match=f"is DINOv2 {name}"):
        read_dinov2(tmp_path / "dinov2.pth")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "needs the weights of its coarse encoder"),
        (["--coarse", "550"], "multiple of 14"),
        (["--coarse", "518"], "multiple of 56"),  # 518 is for one pass
        (["--variant", "fast", "--upsample", "864"], "has no second pass"),
        (["--size", "480x640"], "--coarse N and --upsample N"),
        (["--max-matches", "10001"], "1 to 10000"),
        (["--max-matches", "0"], "1 to"),
        (["--coarse", "0"], "multiple of 14"),
        (["--variant", "fast", "--upsample", "0"], "has no second pass"),
        (["--score-threshold", "1.5"], "from 0 to 1"),
        (["--score-threshold", "nan"], "from 0 to 1"),
        (["--out", "roma.pt"], "ends in .onnx"),
    ],
)
def test_bad_flags_end_with_one_sentence(
    flags: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "roma.ckpt").write_bytes(b"never read")
    monkeypatch.chdir(tmp_path)
    command = ["export", "roma", "--weights", str(tmp_path / "roma.ckpt"), "--out", str(tmp_path / "roma.onnx"), *flags]
    assert main(command) == 1
    message = capsys.readouterr().err
    assert sentence in message and len(message.strip().splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["roma.ckpt"]
