"""`matchanything match`: what it writes, and one sentence for everything that is no pair of images."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from trivial_bundle import write_trivial_bundle

from matchanything_ros import Matcher, estimate_homography
from matchanything_ros.bundle import sha256_of
from matchanything_ros.cli import main
from matchanything_ros.images import Stretch, stretch_to_8_bits
from matchanything_ros.match_files import read_image
from matchanything_ros.outputs import new_folder

PAIR = Path(__file__).parent / "data" / "pairs" / "garfield_rgb_nir_0123"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trivial_bundle(tmp_path_factory.mktemp("bundle") / "trivial.onnx")


def test_the_files_hold_what_the_library_returns(tmp_path: Path, bundle: Path) -> None:
    files = [PAIR / "0.jpg", PAIR / "1.jpg"]
    out = tmp_path / "deep" / "out"
    assert main(["match", *map(str, files), "--bundle", str(bundle), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["matches.jpg", "matches.npz", "result.json"]
    with Matcher(bundle) as matcher:
        matches = matcher.match(*(read_image(file) for file in files))
        digest, backend = matcher.bundle.manifest.onnx_sha256, matcher.engine.backend
    estimate = estimate_homography(matches.keypoints0, matches.keypoints1, matches.size0, matches.size1)
    with np.load(out / "matches.npz") as arrays:
        assert set(arrays) == {"keypoints0", "keypoints1", "scores", "inliers"}
        for name in ("keypoints0", "keypoints1", "scores"):
            np.testing.assert_array_equal(arrays[name], getattr(matches, name))
            assert arrays[name].dtype == np.float32
        np.testing.assert_array_equal(arrays["inliers"], estimate.inliers)
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "OK" and result["num_inliers"] == estimate.num_inliers == len(matches)
    np.testing.assert_array_equal(result["homography"], estimate.matrix)
    assert (result["bundle_sha256"], result["backend"]) == (digest, backend)
    assert set(result["timings_ms"]) == {"preprocess", "network", "postprocess", "homography"}
    assert cv2.imread(str(out / "matches.jpg")).shape[1] >= 1200


def test_no_match_is_an_answer(tmp_path: Path, bundle: Path) -> None:
    flags = ["--bundle", str(bundle), "--score-threshold", "1"]
    assert main(["match", str(PAIR / "0.jpg"), str(PAIR / "1.jpg"), *flags, "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["status"] == "TOO_FEW_MATCHES" and result["homography"] is None
    assert result["num_matches"] == 0 and result["reprojection_error_px"] is None


def write_inputs(folder: Path) -> None:
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no picture")
    data = (PAIR / "0.jpg").read_bytes()
    (folder / "cut.png").write_bytes(cv2.imencode(".png", np.zeros((9, 9), np.uint8))[1].tobytes()[:40])
    (folder / "good.jpg").write_bytes(data)
    hole = np.ones((20, 20), np.float32)
    hole[3, 4] = np.nan
    cv2.imwrite(str(folder / "nan.tiff"), hole)
    cv2.imwrite(str(folder / "pixel.png"), np.zeros((1, 1), np.uint8))
    (folder / "file").touch()


@pytest.mark.parametrize(
    ("image", "more", "sentence"),
    [
        ("missing.png", [], "does not exist"),
        (".", [], "is a folder"),
        ("empty.png", [], "is empty"),
        ("text.png", [], "no image"),
        ("cut.png", [], "no image"),
        ("nan.tiff", [], "not finite"),
        ("pixel.png", [], "1x1 pixels"),
        ("good.jpg", ["--dense"], "no dense output"),
        ("good.jpg", ["--bundle", "nowhere.onnx"], "does not exist"),
        ("good.jpg", ["--bundle", "nothing"], "There is no bundle"),
        ("good.jpg", ["--max-matches", "0"], "positive number"),
        ("good.jpg", ["--ransac-threshold", "-3"], "positive number of pixels"),
        ("good.jpg", ["--score-threshold", "nan"], "from 0 to 1"),
        ("good.jpg", ["--out", "file"], "is a file"),
        ("good.jpg", ["--out", "file/below"], "cannot be made"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(
    tmp_path: Path,
    bundle: Path,
    image: str,
    more: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    flags = ["--bundle", str(bundle), "--out", "out", *more]
    for images in ((image, "good.jpg"), ("good.jpg", image)):
        assert main(["match", *images, *flags]) == 1
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1 and "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["match", "a.png"]) == 2
    assert main(["match", "a.png", "b.png", "--out", "x", "--backend", "magic"]) == 2
    assert "usage" in capsys.readouterr().err


def test_pixels_of_every_kind_of_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (12, 16, 3), np.uint8)
    deep = rng.integers(20_000, 21_000, (12, 16), np.uint16)
    depth = rng.uniform(1, 30, (12, 16)).astype(np.float32)
    cv2.imwrite(str(tmp_path / "rgb.png"), rgb[..., ::-1])
    cv2.imwrite(str(tmp_path / "rgba.png"), np.dstack([rgb[..., ::-1], np.full((12, 16), 7, np.uint8)]))
    cv2.imwrite(str(tmp_path / "gray.png"), rgb[..., 0])
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    cv2.imwrite(str(tmp_path / "depth.tiff"), depth)
    deep_rgb = rng.integers(20_000, 21_000, (12, 16, 3), np.uint16)
    for name, opaque in (("deep_rgb.png", ()), ("deep_rgba.png", (np.full((12, 16), 65535, np.uint16),))):
        cv2.imwrite(str(tmp_path / name), np.dstack([deep_rgb, *opaque]))
    np.testing.assert_array_equal(read_image(tmp_path / "deep_rgba.png"), read_image(tmp_path / "deep_rgb.png"))
    np.testing.assert_array_equal(read_image(tmp_path / "rgb.png"), rgb)
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), rgb)
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png"), rgb[..., 0])
    # As the node shows a thermal or depth camera to the network.
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), stretch_to_8_bits(deep, Stretch()))
    np.testing.assert_array_equal(read_image(tmp_path / "depth.tiff"), stretch_to_8_bits(depth, Stretch()))


def test_a_result_folder_is_complete_or_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    with pytest.raises(RuntimeError), new_folder(out) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    (out / "mine").write_text("keep")
    assert (out / "a").read_text() == "1" and sorted(os.listdir(tmp_path)) == ["out"]
    with new_folder(out) as folder:
        assert folder.parent == out  # it may be a volume of its own, whose parent is another or cannot be written
        (folder / "a").write_text("3")
    assert (out / "a").read_text() == "3" and (out / "mine").read_text() == "keep"
    assert sorted(os.listdir(tmp_path)) == ["out"] and sorted(os.listdir(out)) == ["a", "mine"]


@pytest.mark.parametrize(
    ("happens", "status", "sentence"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, ""),
        (lambda: os.kill(os.getpid(), signal.SIGINT), 1, "interrupted"),
        (lambda: fail(OSError(errno.ENOSPC, "No space left on device")), 1, "no space is left on the disk"),
    ],
)
def test_whatever_stops_a_command_nothing_is_left(
    happens: Callable[[], None],
    status: int,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    inherited = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell ignores it for jobs in the background
    monkeypatch.setattr("matchanything_ros.match_files.write_picture", lambda *_: (happens(), time.sleep(1)))
    flags = ["--bundle", str(write_trivial_bundle(tmp_path / "trivial.onnx")), "--out", str(tmp_path / "out" / "r")]
    try:
        assert main(["match", str(PAIR / "0.jpg"), str(PAIR / "1.jpg"), *flags]) == status
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert sentence in capsys.readouterr().err and signal.getsignal(signal.SIGTERM) is before
    assert list((tmp_path / "out").iterdir()) == []


def fail(error: Exception) -> None:
    raise error


def write_dense_bundle(path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """The trivial bundle with two more outputs, both constant: warp [1, 4, 12, 16] and cert [1, 1, 12, 16]."""
    onnx = pytest.importorskip("onnx")
    write_trivial_bundle(path)
    rng = np.random.default_rng(0)
    dense = {
        "warp": rng.uniform(-1, 1, (1, 4, 12, 16)).astype(np.float32),
        "cert": rng.uniform(0, 1, (1, 1, 12, 16)).astype(np.float32),
    }
    model = onnx.load(path)
    for name, value in dense.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, f"{name}_value"))
        model.graph.node.append(onnx.helper.make_node("Add", [f"{name}_value", "none0"], [name]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, value.shape))
    onnx.save(model, path)
    manifest = json.loads(path.with_suffix(".json").read_text())
    manifest |= {"outputs": [*manifest["outputs"], "warp", "cert"], "onnx_sha256": sha256_of(path)}
    path.with_suffix(".json").write_text(json.dumps(manifest))
    return path, dense["warp"][0], dense["cert"][0, 0]


def test_a_dense_network_also_leaves_its_warp(tmp_path: Path) -> None:
    bundle, warp, cert = write_dense_bundle(tmp_path / "dense.onnx")
    flags = ["--bundle", str(bundle), "--out", str(tmp_path / "out")]
    images = [str(PAIR / "0.jpg"), str(PAIR / "1.jpg")]
    assert main(["match", *images, *flags, "--dense"]) == 0
    with np.load(tmp_path / "out" / "dense.npz") as arrays:
        np.testing.assert_array_equal(arrays["warp"], warp)
        np.testing.assert_array_equal(arrays["cert"], cert)
    assert cv2.imread(str(tmp_path / "out" / "dense.jpg")) is not None
    assert main(["match", *images, "--bundle", str(bundle), "--out", str(tmp_path / "plain")]) == 0
    assert not (tmp_path / "plain" / "dense.npz").exists()
