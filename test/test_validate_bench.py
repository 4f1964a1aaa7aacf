"""validate, bench and inspect, on a small network with its real weights (ALIKED-t16)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from matchanything_ros.bundle import sha256_of
from matchanything_ros.cli import main
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
