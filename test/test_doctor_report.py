"""`matchanything doctor` answers on any machine; the report draws any records."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from matchanything_ros import doctor
from matchanything_ros.cli import main
from matchanything_ros.plot import plot
from matchanything_ros.report import Figure, PairRecord, summarise, write_report


def test_doctor_names_every_topic_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for topic in ("System", "ROS 2", "ONNX Runtime", "GPU", "TensorRT", "Offline tools", "Bundles"):
        assert f"\n{topic}\n" in "\n" + out
    assert re.search(r"onnxruntime +\d+\.\d+", out) and "kestrel" in out


def test_doctor_survives_what_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "current_device", lambda: 1 / 0)
    (tmp_path / "bad.onnx").write_bytes(b"x")
    assert main(["doctor", str(tmp_path / "bad.onnx")]) == 0
    out = capsys.readouterr().out
    assert "ZeroDivisionError" in out and "Offline tools" in out
    monkeypatch.undo()
    assert main(["doctor", str(tmp_path / "bad.onnx")]) == 0
    assert "has no manifest" in capsys.readouterr().out


def test_doctor_says_what_a_half_installed_machine_lacks(tmp_path: Path) -> None:
    """rclpy and rosbags that cannot be loaded or are absent: hidden here by a folder that comes first."""
    for module in ("rclpy", "onnxruntime", "torch"):
        (tmp_path / f"{module}.py").write_text("raise ImportError('libmissing.so.7: no such file')\n")
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), str(root)])}
    code = "import sys; from matchanything_ros.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    missing = done.stdout.split("\nMissing\n")[1]
    assert "libmissing.so.7" in done.stdout
    assert "rclpy: the node does not run" in missing and "onnxruntime: the backend" in missing


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = "import sys; from matchanything_ros.cli import main; sys.exit(main(['doctor']))"
    command = [sys.executable, "-u", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=120) == 0
        assert process.stderr.read() == ""


def records(count: int) -> list[PairRecord]:
    return [
        PairRecord(
            time_s=index / 10,
            stamp0=index,
            stamp1=index,
            status="OK" if index % 3 else "TOO_FEW_MATCHES",
            num_matches=index,
            num_inliers=index // 2,
            inlier_ratio=0.5,
            reprojection_error_px=1.0 if index % 3 else math.nan,
            significance=9.0,
            latency_ms=100.0 + index,
            timings_ms={"network": 90.0} if index % 2 else {},
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, 7, 2000])
def test_report_of_any_length_is_whole(tmp_path: Path, count: int) -> None:
    path = tmp_path / "report.html"
    figures = [Figure("<best> & first", b"\xff\xd8jpeg")]
    write_report(path, "a <bag>", records(count), [(0.0, 0), (1.0, 4)], {"pairs & drops": 4}, {"topic": "/a"}, figures)
    text = path.read_text()
    assert "<bag>" not in text and "a &lt;bag&gt;" in text and "&lt;best&gt; &amp; first" in text
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        drawing = ElementTree.fromstring(svg)  # well-formed
        assert "nan" not in svg.lower() and "inf" not in svg.lower()
        assert len(drawing.findall(".//path")) > 0
    assert not re.search(r"https?:", text)


def test_plot_puts_values_where_they_belong() -> None:
    svg = plot("x", "ms", {"a": ([0.0, 1.0, 2.0, 3.0], [0.0, 50.0, math.nan, 100.0])}, marks=[(2.0, "lost")])
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    x, y = zip(*((float(a), float(b)) for a, b in circles), strict=True)
    assert len(circles) == 3  # NaN leaves a gap
    assert x[1] - x[0] == pytest.approx((x[2] - x[0]) / 3, abs=0.2)
    assert y[0] - y[1] == pytest.approx((y[0] - y[2]) / 2, abs=0.2) and y[2] < y[0]
    assert "lost" in svg and "1.000 s: 50 ms" in svg


def test_summary_by_hand() -> None:
    summary = summarise(records(7))
    assert summary["status"] == {"OK": 4, "TOO_FEW_MATCHES": 3}
    assert summary["median_matches"] == 3 and summary["times_ms"]["latency"]["p50"] == 103
    assert summary["times_ms"]["network"] == {"p50": 90, "p95": 90}
    assert summary["median_reprojection_error_px"] == 1
