"""validate, bench and inspect, on a small network with its real weights (ALIKED-t16)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import seeded

from matchanything_ros.bundle import Bundle, WeightsInfo, load_bundle, sha256_of
from matchanything_ros.cli import main
from matchanything_tools.deviation import GOLDEN_LIMITS, LIMITS, Deviation, compare, corner_distance, judge, summarise
from matchanything_tools.rebuild import rebuild
from matchanything_tools.validate import read_images

DATA = Path(__file__).parent / "data"
WEIGHTS = DATA / "weights" / "aliked-t16.pth"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "small.onnx"
    words = f"export aliked --variant t16 --weights {WEIGHTS} --size 160x192 --keypoints 300 --out {out}"
    words += " --score-threshold 0.02"
    assert main(words.split()) == 0
    return out


def test_validate_equal(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, out = tmp_path / "pairs", tmp_path / "validation.json"
    shutil.copytree(DATA / "pairs" / "zoom_caliterra_30", pairs / "zoom")
    words = ["validate", str(bundle), "--weights", str(WEIGHTS), "--pairs", str(pairs), "--out", str(out)]
    assert main([*words, "--backend", "onnxruntime-cpu"]) == 0
    report = json.loads(out.read_text())
    assert report["backend"] == "onnxruntime-cpu" and set(report["against"]) == {"golden result", "PyTorch, fp32"}
    for figures in report["against"].values():
        assert figures["matches_expected"] > 10
        assert figures["mean_px"] < 0.01 and figures["score_correlation"] > 0.999 and not figures["problems"]
    assert "within 0.1 px" in capsys.readouterr().out


@pytest.fixture
def moved(bundle: Path, tmp_path: Path) -> Path:
    """The bundle with a golden result that is 0.3 px to the right of and below the network's."""
    for suffix in (".onnx", ".json", ".golden.npz"):
        shutil.copy(bundle.with_suffix(suffix), tmp_path)
    moved = tmp_path / bundle.name
    golden = moved.with_suffix(".golden.npz")
    arrays = dict(np.load(golden))
    np.savez(golden, **{**arrays, "keypoints1": arrays["keypoints1"] + np.float32(0.3)})
    manifest = json.loads(moved.with_suffix(".json").read_text())
    moved.with_suffix(".json").write_text(json.dumps(manifest | {"golden_sha256": sha256_of(golden)}))
    return moved


def test_validate_fails_past_the_tolerance(moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["validate", str(moved), "--out", str(tmp_path / "validation.json")]
    assert main(words) == 1
    assert "keypoints are 0.424 px off (limit 0.02)" in capsys.readouterr().err  # 0.3 px in x and in y
    assert main([*words, "--tolerance", "0.5"]) == 0


def test_validate_needs_the_same_checkpoint(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(bundle), "--weights", str(DATA / "weights" / "aliked-n16.pth")]) == 1
    assert "was exported from aliked-t16.pth" in capsys.readouterr().err
    assert main(["validate", str(bundle), "--pairs", str(DATA / "pairs")]) == 1
    assert "--pairs needs --weights" in capsys.readouterr().err


def test_bench(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    words = f"bench {bundle} --against original pytorch --weights {WEIGHTS} --runs 3 --warm-up 1 --out {out}"
    assert main(words.split()) == 0
    report = json.loads(out.read_text())
    assert report["machine"]["cpu"] and report["machine"]["versions"]["numpy"] == np.__version__
    original, plain, ours = report["results"]
    assert [entry["name"].split()[1] for entry in (original, plain)] == ["original", "pytorch"]
    assert original["speedup"] == {"network": 1.0, "total": 1.0}
    assert ours["speedup"]["total"] == pytest.approx(
        original["stages"]["total"]["median_ms"] / ours["stages"]["total"]["median_ms"]
    )
    for entry in report["results"]:
        stages = entry["stages"]
        assert {"preprocess", "network", "homography", "total"} <= set(stages)
        for figures in stages.values():
            assert 0 <= figures["min_ms"] <= figures["median_ms"] <= figures["p95_ms"]
        # A total holds its stages; a bound from above would fail whenever another program takes the processor.
        parts = sum(stages[name]["min_ms"] for name in stages if name != "total")
        assert parts <= stages["total"]["min_ms"] + 1e-6
        assert entry["host_peak_mib"] >= 0 and entry["golden"]["passed"] and entry["golden"]["found"] > 0.95
    printed = capsys.readouterr().out
    assert "speedup" in printed and "not the golden result" not in printed
    assert main(["bench", str(bundle), "--against", "original"]) == 1
    assert "--against needs --weights" in capsys.readouterr().err


def test_bench_of_two_files_of_one_name(
    bundle: Path, moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is compared with itself, and told apart by its folder; the one with a wrong result says so."""
    out = tmp_path / "bench.json"
    assert main(f"bench {bundle} {moved} --runs 1 --warm-up 0 --out {out}".split()) == 0
    one, other = json.loads(out.read_text())["results"]
    assert one["speedup"] == other["speedup"] == {"network": 1.0, "total": 1.0}
    assert [entry["name"].split("/")[0] for entry in (one, other)] == [bundle.parent.name, moved.parent.name]
    printed = capsys.readouterr().out
    assert f"not the golden result: {moved.parent.name}/small onnxruntime-cpu: matches are 0.42 px off" in printed


def test_inspect(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["inspect", str(WEIGHTS)]) == 0
    text = capsys.readouterr().out
    assert "ALIKED t16" in text and sha256_of(WEIGHTS) in text and "float32" in text
    assert "keys        76" in text
    assert main(["inspect", str(bundle)]) == 0
    text = capsys.readouterr().out
    assert "aliked, t16, fp32" in text and "image0: 160x192" in text and sha256_of(WEIGHTS) in text
    plan = tmp_path / "small.gpu.plan"
    plan.write_bytes(b"plan")
    plan.with_name("small.gpu.plan.json").write_text(json.dumps({"plan_sha256": sha256_of(plan), "version": "10.3"}))
    assert main(["inspect", str(plan)]) == 0
    assert "as its manifest says" in capsys.readouterr().out
    plan.write_bytes(b"other")
    assert main(["inspect", str(plan)]) == 0
    assert "build again" in capsys.readouterr().out
    plan.with_name("small.gpu.plan.json").write_text("[1]")
    assert main(["inspect", str(plan)]) == 1
    assert "no readable manifest" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nothing.ckpt")]) == 1
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "kestrel").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "kestrel"]) == 0  # the packaged one, as everywhere
    assert "kestrel.onnx" in capsys.readouterr().out


def arrays(keypoints: np.ndarray, scores: np.ndarray) -> dict[str, np.ndarray]:
    return {"keypoints0": keypoints.astype(np.float32), "keypoints1": keypoints.astype(np.float32), "scores": scores}


def test_deviation() -> None:
    rng = np.random.default_rng(0)
    keypoints, scores = rng.uniform(0, 500, (400, 2)), np.linspace(1, 0.1, 400).astype(np.float32)
    same = summarise([compare(arrays(keypoints, scores), arrays(keypoints, scores), 0.2)])
    assert same["mean_px"] == 0 and same["within_0.1_px"] == 1 and same["score_correlation"] == pytest.approx(1)
    assert not judge(same, LIMITS["fp32"])

    moved = summarise([compare(arrays(keypoints, scores), arrays(keypoints + np.array([0.4, 0]), scores), 0.2)])
    assert moved["mean_px"] == pytest.approx(0.4, abs=1e-4) and moved["within_0.1_px"] == 0
    assert any("px off" in problem for problem in judge(moved, LIMITS["fp16"]))

    # Twelve scores fall below the threshold: fewer matches, but none of them is lost.
    lower = scores.copy()
    lower[300:312] *= 0.6
    fewer = summarise([compare(arrays(keypoints, scores), arrays(keypoints, lower), 0.2)])
    assert fewer["matches_expected"] - fewer["matches"] == 12 and fewer["within_1_px"] == 1
    assert any("matches instead of" in problem for problem in judge(fewer, LIMITS["fp16"]))

    # Twenty of the matches are gone: the share within 1 px says so, the mean distance of the others does not.
    gone = compare(arrays(keypoints, scores), arrays(keypoints[20:], scores[20:]), 0.2)
    assert (gone.distances[:20] > 1).all() and (gone.distances[20:] == 0).all()
    summary = summarise([gone])
    assert summary["mean_px"] < 0.1 and any("within 1 px" in problem for problem in judge(summary, LIMITS["fp16"]))

    only = {name: x[:1] for name, x in arrays(keypoints, scores).items()}
    lost = summarise([compare(only, {**only, "keypoints1": only["keypoints1"] + 9}, 0.2)])
    assert any("within 1 px" in problem for problem in judge(lost, LIMITS["fp16"]))  # the only one must be there

    assert summarise([Deviation(0, 0, np.zeros(0, np.float32), np.zeros((0, 2), np.float32))])["mean_px"] is None


def test_deviation_of_a_dense_warp() -> None:
    """One pixel in fifty of one direction goes elsewhere: the typical one does not say so, the share does."""
    cert = np.ones((1, 1, 100, 200), np.float32)
    cert[..., 60:, :] = 0.4  # not certain
    warp = np.zeros((1, 4, 100, 200), np.float32)
    other = warp.copy()
    other[0, 0, 58:, 100:] = 2 * 5 / 100  # 5 px of 100, two rows of sixty that are certain
    matches = arrays(np.zeros((1, 2)), np.ones(1, np.float32))
    one = compare({**matches, "warp": warp, "cert": cert}, {**matches, "warp": other, "cert": cert}, 0.1)
    summary = summarise([one, one])
    assert summary["warp_pixels"] == 2 * 12000 and summary["warp_median_px"] == 0
    assert summary["warp_mean_px"] == pytest.approx(5 / 60) and summary["warp_within_1_px"] == pytest.approx(59 / 60)
    assert judge(summary, LIMITS["fp16"]) == ["only 98.3% of the certain warp is within 1 px (limit 99%)"]
    assert not judge(summary, GOLDEN_LIMITS["fp16"])
    one_wrong = compare({**matches, "warp": warp, "cert": cert}, {**matches, "warp": warp, "cert": cert * 0.8}, 0.1)
    assert judge(summarise([one_wrong]), LIMITS["fp16"]) == ["the certainty is 0.200 off (limit 0.1)"]
    half = warp.copy()
    half[..., 100:] = np.nan
    not_a_number = summarise(
        [compare({**matches, "warp": warp, "cert": cert}, {**matches, "warp": half, "cert": cert}, 0.1)]
    )
    assert judge(not_a_number, GOLDEN_LIMITS["fp16"]) == ["not all values are finite (1 image pairs)"]
    other[0, 0, :, 100:] = 2 * 0.7 / 100
    moved = summarise([compare({**matches, "warp": warp, "cert": cert}, {**matches, "warp": other, "cert": cert}, 0.1)])
    assert judge(moved, GOLDEN_LIMITS["fp16"]) == ["the warp is 0.700 px off where it is certain (limit 0.5)"]


def test_corner_distance() -> None:
    shift = np.array([[1, 0, 3], [0, 1, 4], [0, 0, 1.0]])
    assert corner_distance(np.eye(3), shift, (640, 480)) == pytest.approx(5)
    assert corner_distance(np.eye(3), 2 * shift, (640, 480)) == pytest.approx(5)  # scale is no difference


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


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--tolerance -1", "--tolerance is -1"),
        ("--tolerance nan", "--tolerance is nan"),
        ("--out no/x.json", "folder that exists"),
    ],
)
def test_wrong_flags_of_validate_are_found_before_the_work(
    flags: str, sentence: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(bundle), *flags.split()]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_validate_reads_images_as_match_does(tmp_path: Path) -> None:
    """16 bits stretched, gray with one channel, pixels as stored: what is validated is what runs."""
    deep = np.random.default_rng(0).integers(20_000, 21_000, (12, 16), np.uint16)
    files = (tmp_path / "0.png", tmp_path / "1.png")
    for file in files:
        cv2.imwrite(str(file), deep)
    for image in read_images(files):
        assert image.shape == (12, 16) and image.min() == 0 and image.max() == 255
