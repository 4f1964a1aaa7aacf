"""DeDoDe: equal to the original on the golden pair, exported whole and in parts, fixed and dynamic."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import pytest
import seeded
import torch
import torch.nn.functional as F
from recordings import TOPICS, record

from matchanything_ros import cli
from matchanything_ros.bundle import Bundle, load_bundle
from matchanything_ros.matcher import Matcher
from matchanything_tools.networks.batchnorm import fold_batch_norms
from matchanything_tools.networks.dedode import NormalisedDescriptor, load_descriptor, load_detector, normalise
from matchanything_tools.networks.dedode.decoder import Decoder
from matchanything_tools.networks.dedode.network import density_matrix, detect
from matchanything_tools.networks.mutual import match

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The seeded checkpoints in files, as published."""
    folder = tmp_path_factory.mktemp("dedode")
    names = ("detector_L", "detector_B", "descriptor_B")
    return {name: seeded.save(f"dedode_{name}", folder / f"{name}.pth") for name in names}


def coffee(number: int, size: int) -> torch.Tensor:
    """As PIL's bicubic resize gives it to the last bit, [1, 3, size, size] in [0, 1]."""
    pixels = cv2.imread(str(DATA / "golden" / f"coffee_{number}.png"))[..., ::-1].astype(np.float64)
    for axis in (1, 0):  # in fixed point with 22 bits, rounded to 8 bits after each axis
        weights = np.zeros((size, pixels.shape[axis]))
        scale = pixels.shape[axis] / size
        for row in range(size):
            centre = (row + 0.5) * scale
            x = np.arange(max(int(centre - 2 * scale + 0.5), 0), min(int(centre + 2 * scale + 0.5), pixels.shape[axis]))
            t = np.abs((x - centre + 0.5) / scale)
            near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
            cubic = np.where(t < 1, near, np.where(t < 2, far, 0))
            weights[row, x] = cubic / cubic.sum()
        fixed = np.trunc(weights * 2**22 + np.sign(weights) * 0.5)  # integers below 2^53: exact in float64
        pixels = np.floor((np.moveaxis(np.tensordot(fixed, pixels, (1, axis)), 0, axis) + 2**21) / 2**22)
        pixels = pixels.clip(0, 255)
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 255


def check_against_golden(case: str, detector: Any, descriptor: Any) -> None:
    golden = np.load(DATA / "golden" / f"{case}.npz")
    size = json.loads(str(golden["meta"]))["size"]
    keypoints, descriptors = [], []
    with torch.inference_mode():
        for number in (0, 1):
            image = coffee(number, size)
            logits = detector(normalise(image, detector))
            # Five times what 1e-6 of noise on the input changes.
            assert np.abs(logits[0, 0, ::4, ::4].numpy() - golden[f"logits{number}_s4"]).max() < 1.2e-3
            points, scores = detect(logits, 1024)
            wanted = as_pixels(golden[f"keypoints{number}"], size)
            rows = {tuple(row): i for i, row in enumerate(points[0].int().tolist())}
            assert len(rows.keys() & {tuple(row) for row in wanted.tolist()}) >= 0.995 * 1024
            confidence = golden[f"confidence{number}"]
            assert np.abs(scores[0].numpy() / confidence - 1).max() < 7e-4
            found = NormalisedDescriptor(descriptor)(image, points)[0]
            first = torch.from_numpy(golden[f"descriptions{number}_first256"])
            cosine = [
                float(found[rows[tuple(row)]] @ F.normalize(truth, dim=0))
                for row, truth in zip(wanted[: len(first)].tolist(), first, strict=True)
                if tuple(row) in rows
            ]
            assert min(cosine) > 0.9999 and len(cosine) >= 0.95 * len(first)
            keypoints.append(points[0])
            descriptors.append(found)
    everything = torch.ones(1024, dtype=torch.bool)
    index0, index1, scores = match(*descriptors, everything, everything, max_matches=1024)
    kept = scores > 0
    rows0, rows1 = (k[i][kept].int().tolist() for k, i in zip(keypoints, (index0, index1), strict=True))
    found_pairs = {(*a, *b) for a, b in zip(rows0, rows1, strict=True)}
    ij = golden["matches_ij"]
    pixels = [as_pixels(golden[f"keypoints{number}"], size)[ij[:, number]] for number in (0, 1)]
    wanted_pairs = {(*a, *b) for a, b in zip(pixels[0].tolist(), pixels[1].tolist(), strict=True)}
    assert len(found_pairs & wanted_pairs) >= 0.99 * len(wanted_pairs)


def as_pixels(normalised: np.ndarray, size: int) -> np.ndarray:
    """The original's [-1, 1] with edges at the ends -> whole pixels."""
    pixels = (normalised + 1) * size / 2 - 0.5
    assert np.abs(pixels - pixels.round()).max() < 1e-2
    return pixels.round().astype(int)


def test_golden_L_B(files: dict[str, Path]) -> None:
    check_against_golden(
        "dedode_L_B", load_detector(files["detector_L"]), load_descriptor(files["descriptor_B"], None, None)
    )


@pytest.mark.full  # 1.2 GB of seeded DINOv2
def test_golden_L_G(files: dict[str, Path], tmp_path: Path) -> None:
    giant = seeded.save("dedode_descriptor_G", tmp_path / "descriptor_G.pth")
    dinov2 = seeded.save("dinov2", tmp_path / "dinov2.pth")
    check_against_golden("dedode_L_G", load_detector(files["detector_L"]), load_descriptor(giant, dinov2, (224, 224)))


def test_density_is_the_separable_filter() -> None:
    """51 taps exp(-linspace(-2, 2, 51)^2) along both axes, zeros outside, also on maps shorter than the filter."""
    values = torch.rand(1, 1, 70, 40, generator=torch.Generator().manual_seed(0))
    taps = torch.exp(-(torch.linspace(-2, 2, 51) ** 2))
    wanted = F.conv2d(
        F.conv2d(values, taps[None, None, None], padding=(0, 25)), taps[None, None, :, None], padding=(25, 0)
    )
    found = density_matrix(70, values) @ values[0, 0] @ density_matrix(40, values)
    assert torch.allclose(found, wanted[0, 0], rtol=1e-5)


@pytest.mark.full  # symbolic shapes make the export slow
def test_dynamic_bundle_equals_pytorch(files: dict[str, Path], tmp_path: Path) -> None:
    """End to end with detector B, more keypoints than the pixels of the smaller image, two sizes at once."""
    out = tmp_path / "dedode.onnx"
    words = f"export dedode --weights {files['detector_B']} --descriptor {files['descriptor_B']} --keypoints 4500"
    assert (
        cli.main([*words.split(), *["--min", "64x64", "--opt", "96x128", "--max", "128x128", "--out"], str(out)]) == 0
    )
    bundle = load_bundle(out)
    assert bundle.manifest.variant == "BB" and bundle.manifest.max_matches == 4500
    assert len(bundle.manifest.weights) == 2
    images = [coffee(0, 128)[:, :, :96], coffee(1, 128)[:, :, 8:72, :64]]
    session = onnxruntime.InferenceSession(str(out))
    keypoints0, keypoints1, scores = session.run(None, {f"image{i}": x.numpy() for i, x in enumerate(images)})
    detector, descriptor = load_detector(files["detector_B"]), load_descriptor(files["descriptor_B"], None, None)
    points, descriptors, valid = [], [], []
    with torch.inference_mode():
        for image in images:
            found, values = detect(detector(normalise(image, detector)), 4500)
            points.append(found[0])
            valid.append(values[0] > 0)
            descriptors.append(NormalisedDescriptor(descriptor)(image, found)[0])
    assert valid[0].all() and valid[1].sum() == 64 * 64
    index0, index1, wanted = match(*descriptors, *valid, max_matches=4500)
    kept = wanted > 1e-3
    true = {(*a, *b) for a, b in zip(points[0][index0][kept].tolist(), points[1][index1][kept].tolist(), strict=True)}
    rows = np.concatenate((keypoints0, keypoints1), axis=1)[scores > 1e-3]
    common = true & {tuple(row) for row in rows.tolist()}
    assert len(true) > 20 and len(common) >= 0.99 * max(len(true), len(rows))
    assert (scores[:-1] >= scores[1:]).all()
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    from matchanything_tools.make_plan import build_engine

    assert build_engine(bundle, target="sm_86").profile["image0"][0] == (64, 64)


@pytest.mark.full
def test_ten_thousand_keypoints(files: dict[str, Path], tmp_path: Path) -> None:
    """More than one TopK of TensorRT may take, in both images; all of them distinct, and TensorRT accepts the graph."""
    out = tmp_path / "many.onnx"
    words = f"export dedode --weights {files['detector_B']} --descriptor {files['descriptor_B']} --keypoints 10000"
    assert cli.main([*words.split(), "--size", "128x128", "--precision", "fp16", "--out", str(out)]) == 0
    bundle = load_bundle(out)
    assert bundle.manifest.max_matches == 10000
    images = torch.cat([coffee(number, 128) for number in (0, 1)])
    session = onnxruntime.InferenceSession(str(out))
    keypoints0, keypoints1, scores = session.run(None, {f"image{i}": images[i : i + 1].numpy() for i in (0, 1)})
    assert keypoints0.shape == keypoints1.shape == (10000, 2)
    found = scores > 0
    assert found.sum() > 1000 and len(np.unique(keypoints0[found], axis=0)) == found.sum()
    assert len(np.unique(keypoints1[found], axis=0)) == found.sum()
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    from matchanything_tools.make_plan import build_engine

    assert memoryview(build_engine(bundle, target="sm_86").data).nbytes > 1000


def test_images_as_channels_change_nothing() -> None:
    """The finest scale of two images side by side in the channels of one."""
    torch.manual_seed(0)
    decoder = Decoder({2: (8, 4, 2), 1: (6 + 2, 4, 1)}, 3, 2).eval()
    for layer in decoder.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean)
            torch.nn.init.normal_(layer.bias)
    fold_batch_norms(decoder)
    decoder.fold()
    features = {2: torch.randn(2, 8, 5, 6), 1: torch.randn(2, 6, 10, 12)}
    with torch.inference_mode():
        wanted = decoder(features)[1]
        decoder.refiner(1).images_as_channels()
        found = decoder(features)[1]
    assert len(wanted) == len(found) == 2
    for one, other in zip(wanted, found, strict=True):
        assert other.shape == (1, 8, 10, 12) and one.std() > 0.1
        assert torch.allclose(torch.stack(other[0].chunk(2)), one, atol=1e-5)


COMMON = "--size 64x96 --keypoints 200"


@pytest.mark.full
def test_parts_are_the_halves(files: dict[str, Path], tmp_path: Path) -> None:
    """Detector and descriptor as plain ONNX with a dynamic batch: what the PyTorch networks give."""
    sessions = {}
    for part, weights in (("detector", "detector_B"), ("descriptor", "descriptor_B")):
        out = tmp_path / part / "part.onnx"
        assert cli.main(f"export dedode --parts {part} --weights {files[weights]} {COMMON} --out {out}".split()) == 0
        assert not out.with_suffix(".json").exists()
        sessions[part] = onnxruntime.InferenceSession(str(out))
    images = torch.cat([coffee(number, 96)[:, :, 16:80] for number in (0, 1, 0)])
    keypoints, scores = sessions["detector"].run(None, {"image": images.numpy()})
    (descriptors,) = sessions["descriptor"].run(None, {"image": images.numpy(), "keypoints": keypoints})
    detector, descriptor = load_detector(files["detector_B"]), load_descriptor(files["descriptor_B"], None, None)
    with torch.inference_mode():
        _, wanted_scores = detect(detector(normalise(images, detector)), 200)
        wanted = NormalisedDescriptor(descriptor)(images, torch.from_numpy(keypoints))
    assert np.allclose(scores, wanted_scores.numpy(), rtol=1e-3)
    assert (wanted * torch.from_numpy(descriptors)).sum(dim=2).min() > 0.9999


def pictures() -> list[np.ndarray]:
    """The golden pair in the size of `small_dedode`, uint8 RGB."""
    images = [coffee(number, 96)[0, :, 16:80] for number in (0, 1)]
    return [np.ascontiguousarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for image in images]


def test_fixed_fp16(small_dedode: Bundle, files: dict[str, Path]) -> None:
    """End to end in half precision: the matches of the fp32 network."""
    assert small_dedode.manifest.variant == "BB" and len(small_dedode.manifest.weights) == 2
    images = torch.cat([coffee(number, 96)[:, :, 16:80] for number in (0, 1)])
    detector, descriptor = load_detector(files["detector_B"]), load_descriptor(files["descriptor_B"], None, None)
    with torch.inference_mode():
        keypoints, _ = detect(detector(normalise(images, detector)), 200)
        descriptors = NormalisedDescriptor(descriptor)(images, keypoints)
    valid = torch.ones(200, dtype=torch.bool)
    index0, index1, scores = match(*descriptors, valid, valid, max_matches=200)
    true = torch.cat((keypoints[0][index0], keypoints[1][index1]), dim=1)[scores > 0.01].numpy()
    with Matcher(small_dedode, backend="onnxruntime-cpu", as_exported=True) as matcher:
        half = matcher.match(*pictures())
    found = np.concatenate((half.keypoints0, half.keypoints1), axis=1)
    nearest = np.abs(true[:, None] - found).max(axis=2).min(axis=1)
    # Random weights: keypoints near the 200th place change. The requirement of 97 % within 1 px is for real ones.
    assert len(true) > 10 and np.mean(nearest < 1) >= 0.85


@pytest.mark.tensorrt
def test_tensorrt_builds(small_dedode: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    from matchanything_tools.make_plan import build_engine

    assert memoryview(build_engine(small_dedode, target="sm_86").data).nbytes > 1000


def test_match_replay_and_validate(small_dedode: Bundle, tmp_path: Path) -> None:
    """As any other bundle: with two files, with a recording of the two, against the network that it came from."""
    names = [str(tmp_path / f"{number}.png") for number in (0, 1)]
    for name, image in zip(names, pictures(), strict=True):
        cv2.imwrite(name, image[..., ::-1])
    common = ["--bundle", str(small_dedode.onnx), "--backend", "onnxruntime-cpu"]
    assert cli.main(["match", *names, *common, "--out", str(tmp_path / "match")]) == 0
    direct = json.loads((tmp_path / "match" / "result.json").read_text())
    frames = [(camera, camera * 1_000_000, image) for camera, image in enumerate(pictures())]
    bag = record(tmp_path / "bag", "mcap", frames)
    topics = ["--image0", TOPICS[0], "--image1", TOPICS[1]]
    assert cli.main(["replay", str(bag), *topics, *common, "--out", str(tmp_path / "replay")]) == 0
    with (tmp_path / "replay" / "matches.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert int(row["num_matches"]) == direct["num_matches"] > 10
    checkpoints = [str(small_dedode.onnx.with_name(f"{part}.pth")) for part in ("detector_B", "descriptor_B")]
    words = ["validate", str(small_dedode.onnx), "--backend", "onnxruntime-cpu", "--weights", *checkpoints]
    assert cli.main([*words, "--out", str(tmp_path / "validation.json")]) == 0
    assert "golden result" in json.loads((tmp_path / "validation.json").read_text())["against"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--weights {detector_B}", "--descriptor"),
        ("--weights {descriptor_B} --descriptor {descriptor_B}", "descriptor_B|detector"),
        ("--weights {detector_B} --descriptor {descriptor_B} --size 60x64", "multiples of 8"),
        ("--weights {detector_B} --descriptor {descriptor_B} --keypoints 10001", "1 to 10000"),
    ],
)
def test_bad_wishes(
    words: str, sentence: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence each, and nothing written."""
    base = f"export dedode {words} --out {tmp_path / 'x.onnx'}".format(**files)
    assert cli.main(base.split()) == 1
    told = capsys.readouterr().err
    assert re.search(sentence, told) and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
