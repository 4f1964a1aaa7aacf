"""What the flags of `matchanything export` choose, before anything is exported: networks without their weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from aliked_case import WEIGHTS

from matchanything_ros.bundle import Preprocess
from matchanything_tools.export import Exportable, add_arguments, network
from matchanything_tools.networks import dedode, eloftr, roma
from matchanything_tools.networks.dedode.network import DescriptorB, Detector
from matchanything_tools.networks.sparse_pair import SparsePair


def chosen(words: str) -> Exportable:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([*words.split(), "--out", "x.onnx"])
    return network(args.family).exportable(args)


@pytest.fixture(autouse=True)
def unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file `weights`, of which only the digest is taken: the large networks have random weights, or are left out."""
    (tmp_path / "weights").write_bytes(b"none")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eloftr, "load", lambda *_: None)
    monkeypatch.setattr(eloftr, "EfficientLoFTR", lambda *_, **options: SimpleNamespace(**options))
    monkeypatch.setattr(dedode, "load_detector", lambda *_: Detector(False))
    monkeypatch.setattr(dedode, "load_descriptor", lambda *_: DescriptorB())
    monkeypatch.setattr(roma, "load", lambda *_: Nothing())


class Nothing(torch.nn.Module):
    def bake(self, *_: object) -> None: ...


def test_pipelines_of_eloftr() -> None:
    """Those of the authors: the demo pads to a square and does not rescale positions, the evaluation rescales only."""
    demo = chosen("eloftr --weights weights --size 480x640")
    assert demo.module.square is True and demo.module.position_scale == 1.0
    fixed = chosen("eloftr --weights weights --size 480x640 --pipeline evaluation")
    assert fixed.module.square is False and fixed.module.position_scale == 832 / 640
    assert (demo.preprocess.resize, fixed.preprocess.resize) == ("stretch", "stretch")
    dynamic = chosen("eloftr --weights weights --min 224x224 --opt 416x320 --max 832x832")
    assert dynamic.module.square is False and dynamic.module.position_scale == 2.0
    assert dynamic.preprocess == eloftr.preprocessing("evaluation", True)
    assert dynamic.preprocess.resize == "fit_stretch"  # the aspect ratio is kept, but for multiples of 32


def test_preprocessing_of_dedode() -> None:
    """As the original, bicubic, and to multiples of 8."""
    words = "dedode --weights weights --descriptor weights"
    assert chosen(words).preprocess == Preprocess(resize="stretch", interpolation="bicubic_antialias", divisor=8)
    dynamic = chosen(f"{words} --min 64x64 --opt 96x128 --max 128x128")
    assert dynamic.preprocess == Preprocess(resize="fit", interpolation="bicubic_antialias", divisor=8)


@pytest.mark.parametrize(
    "words", ["eloftr --size 480x640", "dedode --descriptor weights", "roma --dinov2 weights --variant fast"]
)
def test_score_threshold_is_what_was_asked_for(words: str) -> None:
    for threshold in (0.0, 0.3):
        assert chosen(f"{words} --weights weights --score-threshold {threshold}").score_threshold == threshold
    default = {"eloftr": 0.1, "dedode": 0.01, "roma": 0.05}[words.split()[0]]  # the originals'
    assert chosen(f"{words} --weights weights").score_threshold == default


@pytest.mark.parametrize(("matching", "threshold"), [("dual_softmax", 0.1), ("mutual", 0.75), ("ratio", 0.0)])
def test_matching_of_sparse_networks(matching: str, threshold: float) -> None:
    """Each criterion has a score, and hence a threshold, of its own."""
    aliked = chosen(f"aliked --variant t16 --weights {WEIGHTS / 'aliked-t16.pth'} --matching {matching}")
    other = chosen(f"dedode --weights weights --descriptor weights --matching {matching}")
    assert aliked.score_threshold == threshold
    assert other.score_threshold == (0.01 if matching == "dual_softmax" else threshold)  # its original's
    for item in (aliked, other):
        assert isinstance(item.module, SparsePair) and item.module.criterion == matching


@pytest.mark.parametrize(("flags", "normalize"), [("", False), (" --normalize imagenet", True)])
def test_colours_of_roma(flags: str, normalize: bool) -> None:
    assert chosen(f"roma --weights weights --dinov2 weights --variant fast{flags}").module.normalize is normalize
