"""RoMa as a bundle: equal to the original through ONNX Runtime, accepted by TensorRT, finite in fp16 on any image."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import roma_case
import seeded
import torch
from recordings import TOPICS, record
from roma_case import SIDE

from matchanything_ros.bundle import Bundle, load_bundle
from matchanything_ros.cli import main
from matchanything_ros.engines import open_engine
from matchanything_ros.matcher import Matcher
from matchanything_tools.networks.roma import RomaMatcher, correlation

Arrays = dict[str, npt.NDArray[np.float32]]
COARSE, FINE = 224, 320  # of the golden result


def pair(first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> Arrays:
    """Inputs of the shallow network from two images [3, 128, 128]; the first pass sees all but the last 16."""
    cut = slice(roma_case.SIDE_COARSE)
    images = {"image0": first[None], "image1": second[None]}
    return images | {f"{name}_coarse": np.ascontiguousarray(image[..., cut, cut]) for name, image in images.items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The seeded checkpoints as files: 1.7 GB."""
    folder = tmp_path_factory.mktemp("checkpoints")
    weights, dinov2 = folder / "roma.pth", folder / "dinov2.pth"
    torch.save({"state_dict": {f"matcher.model.{key}": value for key, value in seeded.state("roma").items()}}, weights)
    torch.save(seeded.state("dinov2"), dinov2)
    yield weights, dinov2
    weights.unlink()
    dinov2.unlink()


@pytest.fixture(scope="module")
def golden_bundle(checkpoints: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """The whole network at the size of the golden result, exported by the command."""
    folder = tmp_path_factory.mktemp("roma")
    weights, dinov2 = checkpoints
    words = ["export", "roma", "--weights", str(weights), "--dinov2", str(dinov2), "--licence", "none stated"]
    assert main([*words, "--coarse", str(COARSE), "--upsample", str(FINE), "--out", str(folder / "roma.onnx")]) == 0
    yield load_bundle(folder / "roma.onnx", verify=False)
    shutil.rmtree(folder)


def test_onnx_runtime_equals_the_original(golden_bundle: Bundle) -> None:
    """Through preprocessing, engine and matcher as on the robot."""
    wanted, _ = roma_case.golden("small")
    with Matcher(golden_bundle, backend="onnxruntime-cpu") as matcher:
        matches = matcher.match(*roma_case.pictures(), dense=True)
    assert matches.warp is not None and matches.cert is not None
    warp, cert = np.moveaxis(matches.warp, 0, 2)[::4, ::4], matches.cert[::4, ::4]
    error = roma_case.pixel_error(warp, wanted["warp"], FINE)[wanted["certainty"] > 0.05]
    # What users may rely on is 0.05 px on average; float32 in another order gives a hundredth of that.
    assert error.mean() < 5e-4 and error.max() < 5e-3
    assert np.abs(cert - wanted["certainty"]).max() < 5e-4
    # Matches are rows of the warp, in pixels of the 640 x 480 images.
    assert len(matches) == 5000 and matches.scores.min() > 0.05
    scale = np.array([640, 480]) / FINE
    column, row = np.round((matches.keypoints0[:500] + 0.5) / scale - 0.5).astype(int).T
    x1, y1 = matches.warp[2:, row, column]
    predicted = (np.stack((x1, y1), 1) + 1) / 2 * [640, 480] - 0.5
    own = np.abs((matches.keypoints0[:500] + 0.5) / scale - 0.5 - np.stack((column, row), 1)).max(1) < 1e-3
    assert own.sum() > 100 and np.abs(predicted - matches.keypoints1[:500])[own].max() < 1e-2


def test_manifest_says_what_is_in(golden_bundle: Bundle) -> None:
    manifest = golden_bundle.manifest
    assert [weights.name for weights in manifest.weights] == ["roma.pth", "dinov2.pth"]
    assert len({weights.sha256 for weights in manifest.weights}) == 2
    assert [weights.licence for weights in manifest.weights] == ["none stated", "Apache-2.0"]
    assert {"gaussian_process", "refiner_16", "refiner_1", "upsample_refiner_1"} <= set(manifest.stages)
    assert manifest.preprocess.interpolation == "bicubic_antialias" and manifest.dense
    json.loads(golden_bundle.onnx.with_suffix(".json").read_text())


@pytest.mark.parametrize("which", ["shallow_roma", pytest.param("golden_bundle", marks=pytest.mark.full)])
def test_tensorrt_builds(which: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    from matchanything_ros.engines.builder import build_engine

    bundle: Bundle = request.getfixturevalue(which)
    built = build_engine(bundle, target="sm_86")
    assert memoryview(built.data).nbytes > 100 << 20  # the weights are in


def test_half_precision_is_close_and_finite(shallow_roma: Bundle) -> None:
    first, second = roma_case.batch(SIDE).numpy()
    with torch.inference_mode():
        item = roma_case.shallow_item(torch.float32)
        inputs = pair(first, second)
        exact = item.module(*(torch.from_numpy(inputs[spec.name]) for spec in item.inputs))
    wanted, certainty = (x[0].movedim(0, -1).numpy() for x in exact[3:])
    engine = open_engine(shallow_roma, "onnxruntime-cpu", as_exported=True)
    found = engine.run(inputs)
    error = roma_case.pixel_error(np.moveaxis(found["warp"][0], 0, 2), wanted, SIDE)[certainty[..., 0] > 0.05]
    # Of random weights and little depth, whose near ties between anchors fp16 may decide otherwise: the typical pixel
    # tells whether the graph is right. How close the whole network stays is measured in the test below.
    assert np.median(error) < 0.1

    rng = np.random.default_rng(5)
    noise = rng.random((3, SIDE, SIDE), dtype=np.float32)
    odd = {
        "black": np.zeros_like(noise),
        "white": np.ones_like(noise),
        "constant": np.full_like(noise, 0.37),
        "noise": noise,
        "saturated": (noise > 0.5).astype(np.float32),
    }
    for name, image in odd.items():
        outputs = engine.run(pair(image, first if name == "black" else image))
        assert all(np.isfinite(value).all() for value in outputs.values()), name
        assert outputs["keypoints0"].min() >= -0.5 and outputs["keypoints0"].max() <= SIDE - 0.5, name
    engine.close()


def test_match_and_replay_show_warp_and_certainty(shallow_roma: Bundle, tmp_path: Path) -> None:
    """The commands on a dense bundle of several inputs: files, and pictures in the report."""
    files = [roma_case.GOLDEN / f"coffee_{i}.png" for i in (0, 1)]
    flags = ["--bundle", str(shallow_roma.onnx), "--backend", "onnxruntime-cpu"]
    assert main(["match", *map(str, files), *flags, "--dense", "--out", str(tmp_path / "match")]) == 0
    with np.load(tmp_path / "match" / "dense.npz") as dense, np.load(tmp_path / "match" / "matches.npz") as sparse:
        assert dense["warp"].shape == (4, SIDE, 2 * SIDE) and dense["cert"].shape == (SIDE, 2 * SIDE)
        assert np.isfinite(dense["warp"]).all() and np.ptp(dense["cert"]) > 0.1
        assert len(sparse["scores"]) > 100
    assert cv2.imread(str(tmp_path / "match" / "dense.jpg")).shape[1] >= 1200

    frames = [(camera, 0, image) for camera, image in enumerate(roma_case.pictures())]
    bag = record(tmp_path / "bag", "mcap", frames)
    topics = ["--image0", TOPICS[0], "--image1", TOPICS[1]]
    assert main(["replay", str(bag), *topics, *flags, "--out", str(tmp_path / "replay")]) == 0
    report = (tmp_path / "replay" / "report.html").read_text()
    # One pair is the best and the worst: each time its matches, then its warp.
    assert report.count("data:image/jpeg;base64,") == 4
    assert report.count("<figcaption>Warp and certainty of pair 1") == 2


@pytest.mark.full
def test_half_precision_of_the_whole_network(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["export", "roma", "--weights", str(checkpoints[0]), "--dinov2", str(checkpoints[1]), "--precision", "fp16"]
    assert main([*words, "--coarse", str(COARSE), "--upsample", str(FINE), "--out", str(tmp_path / "roma.onnx")]) == 0
    wanted, _ = roma_case.golden("small")
    with Matcher(tmp_path / "roma.onnx", backend="onnxruntime-cpu", as_exported=True) as matcher:
        matches = matcher.match(*roma_case.pictures(), dense=True)
    assert matches.warp is not None
    warp = np.moveaxis(matches.warp, 0, 2)[::4, ::4]
    error = roma_case.pixel_error(warp, wanted["warp"], FINE)[wanted["certainty"] > 0.05]
    assert error.mean() < 0.25 and (error < 1).mean() > 0.99  # what users are promised of fp16


class Correlation(torch.nn.Module):
    def forward(self, features: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
        return correlation.local_correlation(features, flow, 2)


def test_bands_of_products_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime must be done with the products of one band before it makes the next: together they are gigabytes."""
    side = 24
    monkeypatch.setattr(correlation, "BAND_BYTES", side**4)  # four bands of fp32
    arrays = {"features": torch.rand(2, side, side, 16), "flow": 2 * torch.rand(2, 2, side, side) - 1}
    path = tmp_path / "correlation.onnx"
    torch.onnx.export(Correlation(), tuple(arrays.values()), path, input_names=list(arrays), dynamo=True, verbose=False)
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.run(None, {name: value.numpy() for name, value in arrays.items()})
    events = json.loads(Path(session.end_profiling()).read_text())
    run = [event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")]
    order = "".join({"MatMul": "M", "FusedMatMul": "M", "Gather": "g"}.get(kind, "") for kind in run)
    assert order.endswith("MgMgMgMg") and order.count("M") == 4


@pytest.mark.parametrize(("finest", "side"), [(1, 154), (8, 168)])
def test_one_pass_variants(finest: int, side: int) -> None:
    """fast and coarse; 154 = 11 x 14 leaves a rest in the strides of VGG."""
    module = RomaMatcher(roma_case.shallow(finest).bake(side, side), 600, dense=True, normalize=True)
    with torch.inference_mode():
        keypoints0, keypoints1, scores, warp, cert = module(*roma_case.batch(side)[:, None])
    assert warp.shape == (1, 4, side // finest, 2 * (side // finest)) and cert.shape[2:] == warp.shape[2:]
    for keypoints in (keypoints0, keypoints1):
        assert keypoints.shape == (600, 2) and keypoints.min() >= -0.5 and keypoints.max() <= side - 0.5
    # A cell of the map is `finest` input pixels wide: own coordinates are the centres of such cells.
    own = (keypoints0 + 0.5) / finest - 0.5
    forward = ((own - own.round()).abs() < 1e-3).all(1)
    assert 100 < int(forward.sum()) < 500 and bool((scores > 0.05).any())


@pytest.mark.full
@pytest.mark.parametrize(
    "flags", [["--variant", "fast", "--coarse", "266"], ["--variant", "coarse", "--coarse", "224"]]
)
def test_one_pass_variants_export(flags: list[str], checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["export", "roma", "--weights", str(checkpoints[0]), "--dinov2", str(checkpoints[1]), *flags]
    assert main([*words, "--out", str(tmp_path / "roma.onnx")]) == 0
    bundle = load_bundle(tmp_path / "roma.onnx", verify=False)
    assert "upsample_refiner_8" not in bundle.manifest.stages
    with Matcher(bundle, backend="onnxruntime-cpu") as matcher, np.load(bundle.golden) as golden:
        matches = matcher.match(golden["image0"], golden["image1"], dense=True)
        assert matches.cert is not None
        assert np.abs(matches.cert[::4, ::4] - golden["cert"][0, 0]).max() < 2e-3  # stored in fp16
