"""ALIKED as it is exported: the bundle in the package, every other form, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from aliked_case import WEIGHTS, network

from matchanything_ros import cli
from matchanything_ros.bundle import InputSpec, load_bundle
from matchanything_ros.engines import open_engine
from matchanything_ros.matcher import Matcher
from matchanything_ros.preprocess import prepare
from matchanything_tools.networks.aliked import VARIANTS, Aliked
from matchanything_tools.networks.sparse_pair import SparsePair, dynamic_shapes

DATA = Path(__file__).parent / "data"
NAME = "aliked-n16"  # the bundle in the package


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged bundle, exported again with the command that its manifest notes."""
    out = tmp_path_factory.mktemp("aliked") / "aliked-n16.onnx"
    words = load_bundle(NAME).manifest.exporter["command"].split()[1:]
    words[words.index("--weights") + 1] = str(WEIGHTS / "aliked-n16.pth")
    assert cli.main([*words, "--out", str(out)]) == 0
    return out


def test_packaged_bundle_is_what_the_code_exports(exported: Path) -> None:
    """The same function: equal matches on a golden pair and on images of other, odd sizes."""
    shipped, made = load_bundle(NAME), load_bundle(exported)
    assert shipped.manifest.weights == made.manifest.weights and shipped.manifest.inputs == made.manifest.inputs
    assert shipped.manifest.preprocess == made.manifest.preprocess
    engines = [open_engine(bundle, "onnxruntime-cpu") for bundle in (shipped, made)]
    coffee = [cv2.imread(str(DATA / "golden" / f"coffee_{i}.png"))[..., ::-1].copy() for i in (0, 1)]
    golden = np.load(shipped.golden)
    for pair in ((golden["image0"], golden["image1"]), (coffee[0][:301, :385], coffee[1][:333, :270])):
        inputs = {
            spec.name: prepare(pair[spec.image], shipped.manifest.preprocess, spec)[0]
            for spec in shipped.manifest.inputs
        }
        one, other = (as_matches(engine.run(inputs)) for engine in engines)
        assert len(one) > 50
        # Equal but for matches whose score is near zero or whose keypoint is the last that is taken.
        common = one.keys() & other.keys()
        assert len(common) >= 0.99 * max(len(one), len(other))
        assert max(abs(one[key] - other[key]) for key in common) < 1e-3
    assert "/" not in shipped.manifest.exporter["command"]


def as_matches(outputs: dict[str, np.ndarray]) -> dict[tuple[float, ...], float]:
    """Coordinates to a hundredth of a pixel -> score."""
    rows = np.concatenate((outputs["keypoints0"], outputs["keypoints1"]), axis=1).round(2)
    return {tuple(row): float(s) for row, s in zip(rows.tolist(), outputs["scores"], strict=True) if s > 0}


def test_onnx_equals_pytorch_network() -> None:
    """The shipped bundle against the golden result that the PyTorch network gave when it was exported."""
    bundle = load_bundle(NAME)
    golden = np.load(bundle.golden)
    inputs = {
        spec.name: prepare(golden[spec.name], bundle.manifest.preprocess, spec)[0] for spec in bundle.manifest.inputs
    }
    found = as_matches(open_engine(bundle, "onnxruntime-cpu").run(inputs))
    wanted = as_matches({key: golden[key] for key in ("keypoints0", "keypoints1", "scores")})
    common = found.keys() & wanted.keys()
    assert len(common) >= 0.99 * max(len(found), len(wanted)) and len(wanted) > 500
    assert max(abs(found[key] - wanted[key]) for key in common) < 1e-3


def test_matcher_finds_the_true_matches() -> None:
    """Through the whole robot side: original pixels of both images, related by the known homography."""
    truth = np.load(DATA / "golden" / "coffee_homography.npz")
    matrix = truth[truth.files[0]]
    images = [cv2.imread(str(DATA / "golden" / f"coffee_{i}.png"))[..., ::-1].copy() for i in (0, 1)]
    with Matcher(NAME, backend="onnxruntime-cpu") as matcher:
        matches = matcher.match(*images)
        nothing = matcher.match(np.zeros((100, 120, 3), np.uint8), images[1])
    mapped = cv2.perspectiveTransform(matches.keypoints0[None], matrix)[0]
    error = np.linalg.norm(mapped - matches.keypoints1, axis=1)
    assert len(matches) > 200
    assert np.median(error) < 1.5  # pixels of images that were shrunk by up to 1.4
    assert np.mean(error < 5) > 0.9
    assert len(nothing) == 0


@pytest.mark.tensorrt
def test_tensorrt_builds_the_bundle() -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    from matchanything_tools.make_plan import build_engine

    built = build_engine(load_bundle(NAME), target="sm_86")
    assert built.profile["image0"][2] == (640, 640)


@pytest.mark.tensorrt
def test_fixed_fp16(tmp_path: Path) -> None:
    """A small t16 in half precision: still the same matches, and TensorRT accepts it."""
    out = tmp_path / "t16.onnx"
    words = f"export aliked --variant t16 --weights {WEIGHTS / 'aliked-t16.pth'} --size 192x256 --keypoints 300".split()
    assert cli.main([*words, "--precision", "fp16", "--out", str(out)]) == 0
    bundle = load_bundle(out)
    images = [cv2.imread(str(DATA / "golden" / f"coffee_{i}.png"))[..., ::-1] for i in (0, 1)]
    pair = [np.ascontiguousarray(cv2.resize(x, (256, 192), interpolation=cv2.INTER_AREA)) for x in images]
    with Matcher(bundle, backend="onnxruntime-cpu", as_exported=True) as matcher:
        half = matcher.match(*pair)
    tensors = torch.cat([torch.from_numpy(x).permute(2, 0, 1)[None].float() / 255 for x in pair])
    with torch.inference_mode():
        keypoints, scores, _ = network("t16", 300)(tensors)
    for number, found in enumerate((half.keypoints0, half.keypoints1)):
        wanted = keypoints[number][scores[number] > 0].numpy()
        distance = np.linalg.norm(found[:, None] - wanted, axis=2).min(axis=1)
        assert len(found) > 50 and np.mean(distance < 1) >= 0.97
    rtx = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    from matchanything_tools.make_plan import build_engine

    assert rtx and memoryview(build_engine(bundle, target="sm_86").data).nbytes > 1000


@pytest.mark.full
def test_five_thousand_keypoints(tmp_path: Path) -> None:
    """More than one TopK of TensorRT may take: the matches of fewer keypoints are among those of all."""
    found = {}
    for count in (500, 5000):
        out = tmp_path / f"{count}.onnx"
        words = f"export aliked --variant t16 --weights {WEIGHTS / 'aliked-t16.pth'} --size 320x416 --keypoints {count}"
        assert cli.main([*words.split(), "--matching", "mutual", "--out", str(out)]) == 0
        bundle = load_bundle(out)
        golden = np.load(bundle.golden)
        inputs = {s.name: prepare(golden[s.name], bundle.manifest.preprocess, s)[0] for s in bundle.manifest.inputs}
        found[count] = as_matches(open_engine(bundle, "onnxruntime-cpu").run(inputs))
    assert len(found[500]) > 100 and len(found[5000]) > 2 * len(found[500])
    # With more to choose from, a keypoint may find a better partner.
    assert len(found[500].keys() & found[5000].keys()) > 0.7 * len(found[500])
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    from matchanything_tools.make_plan import build_engine

    assert memoryview(build_engine(bundle, target="sm_86").data).nbytes > 1000


@pytest.mark.full
def test_deform_conv_is_the_same_network(tmp_path: Path) -> None:
    out = tmp_path / "t16.onnx"
    words = f"export aliked --variant t16 --weights {WEIGHTS / 'aliked-t16.pth'} --size 192x256 --keypoints 300"
    assert cli.main([*words.split(), "--deform-conv", "--out", str(out)]) == 0
    bundle = load_bundle(out)
    assert b"DeformConv" in out.read_bytes()
    golden = np.load(bundle.golden)  # of the PyTorch network, which samples
    inputs = {s.name: prepare(golden[s.name], bundle.manifest.preprocess, s)[0] for s in bundle.manifest.inputs}
    found = as_matches(open_engine(bundle, "onnxruntime-cpu").run(inputs))
    wanted = as_matches({key: golden[key] for key in ("keypoints0", "keypoints1", "scores")})
    assert len(wanted) > 50 and len(found.keys() & wanted.keys()) >= 0.99 * len(wanted)


def test_narrow_range_of_dynamic_sizes_can_be_traced() -> None:
    """torch.export fails on a range with fewer than two multiples of what the network divides by."""
    specs = tuple(InputSpec(f"image{i}", i, (64, 64), (96, 96), (128, 128)) for i in (0, 1))
    aliked = Aliked(VARIANTS["t16"], 32).eval()
    aliked.fuse()
    pair = SparsePair(aliked, "mutual", 32, one_batch=False)
    example = tuple(torch.rand(1, 3, 96, 96) for _ in specs)
    with torch.inference_mode():
        traced = torch.export.export(
            pair, example, dynamic_shapes=dynamic_shapes(specs), prefer_deferred_runtime_asserts_over_guards=True
        )
    assert len(traced.range_constraints) == 4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--keypoints 6000", "choose 1 to 5000"),
        ("--keypoints 100 --max-matches 200", "choose 1 to --keypoints"),
        ("--size 16x64", "at least 32 pixels"),
        ("--detection-threshold 3", "0 to 1"),
        ("--min 32x32 --opt 64x64 --max 128x128", "at least 33 pixels"),
        ("--variant t16", "is ALIKED n16 or n16rot, not t16: add --variant n16"),
        ("--min 64x64 --opt 480x640 --max 480x320", "must not decrease"),
    ],
)
def test_bad_wishes_get_one_sentence(
    words: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = f"export aliked --weights {WEIGHTS / 'aliked-n16.pth'} --out {tmp_path / 'x.onnx'}"
    assert cli.main(f"{base} {words}".split()) == 1
    told = capsys.readouterr().err
    assert re.search(sentence, told) and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_weights_of_no_known_network_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"one.weight": torch.zeros(3), "two.weight": torch.zeros(3)}, tmp_path / "other.pth")
    assert cli.main(f"export aliked --weights {tmp_path / 'other.pth'} --out {tmp_path / 'x.onnx'}".split()) == 1
    assert "is not the checkpoint of ALIKED n16" in capsys.readouterr().err
