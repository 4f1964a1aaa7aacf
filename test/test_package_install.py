"""The package as users get it: from a source distribution, by pip, into an empty environment; with and without ROS."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from installing import ROOT, copy_sources, make_venv, run

PAIR = [ROOT / "demo" / "sequence" / camera / "000008.jpg" for camera in ("cam0", "cam1")]


@pytest.fixture(scope="module")
def build_env(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment that has setuptools and no ROS: what pip finds where there are no ROS wheels."""
    bin_folder = make_venv(tmp_path_factory.mktemp("plain") / "venv")
    run(bin_folder / "pip", "install", "-q", "setuptools>=64,<80", "wheel")
    return bin_folder


@pytest.fixture(scope="module")
def sdist(build_env: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = copy_sources(tmp_path_factory.mktemp("sources"))
    out = tmp_path_factory.mktemp("sdist")
    run(
        build_env / "python",
        "-c",
        f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})",
        cwd=sources,
    )
    (archive,) = out.glob("*.tar.gz")
    return archive


def check_command_line(bin_folder: Path, out: Path) -> None:
    """`matchanything` there: tells what the machine has, and matches a real pair with the bundle in the package."""
    run(bin_folder / "matchanything", "doctor", cwd=out)
    run(bin_folder / "matchanything", "match", *PAIR, "--out", out / "match", cwd=out)
    result = json.loads((out / "match" / "result.json").read_text())
    matches = np.load(out / "match" / "matches.npz")
    assert result["status"] == "OK"
    # Frame 8 of demo/sequence/ground_truth.csv, where the truth is good to 2 px. A homography of the wrong direction or
    # of resized pixels is tens of pixels away in the middle of the image.
    truth = next(
        row for row in (ROOT / "demo/sequence/ground_truth.csv").read_text().splitlines() if row.startswith("000008")
    )
    expected = np.array(truth.split(",")[1:10], float).reshape(3, 3) @ (320, 240, 1)
    got = np.array(result["homography"]).reshape(3, 3) @ (320, 240, 1)
    assert np.linalg.norm(got[:2] / got[2] - expected[:2] / expected[2]) < 5
    assert matches["inliers"].sum() >= 20


def installed_files(bin_folder: Path) -> set[str]:
    """All files of the installed package, relative to site-packages, as pip recorded them."""
    code = "import importlib.metadata as m; print(*m.files('matchanything_ros'), sep='\\n')"
    return set(run(bin_folder / "python", "-I", "-c", code).stdout.split())


def source_files() -> set[str]:
    """Every file of both packages that git knows (bundles and their licences, GPU kernels), as it must be installed."""
    names = run("git", "ls-files", "-co", "--exclude-standard", "matchanything_ros", "tools", cwd=ROOT).stdout.split()
    return {re.sub("^tools/", "matchanything_tools/", name) for name in names}


def test_without_ros_everything_else_is_installed(build_env: Path, sdist: Path, tmp_path: Path) -> None:
    log = run(build_env / "pip", "install", "-v", "--no-build-isolation", f"{sdist}[replay]").stdout
    assert log.count("installed without ROS messages and node: no ROS 2 message generators here") >= 1
    files = installed_files(build_env)
    assert source_files() <= files
    run(build_env / "python", "-I", "-c", "from matchanything_ros.bags import typestore; typestore()", cwd=tmp_path)
    assert not any(name.startswith("matchanything_ros/msg") or name.endswith(".so") for name in files)
    check_command_line(build_env, tmp_path)
    # The robot side never needs torch, and the offline commands say so in one sentence.
    told = run(build_env / "matchanything", "export", "aliked", "--weights", "x.pth", "--out", "x.onnx", check=False)
    assert told.returncode == 1 and "pip install '.[tools]'" in told.stdout and "Traceback" not in told.stdout
    node = run(build_env / "match_node", check=False)
    assert node.returncode == 1 and "colcon" in node.stdout and "Traceback" not in node.stdout


@pytest.mark.full
@pytest.mark.ros
def test_with_ros_messages_node_and_share(sdist: Path, tmp_path: Path) -> None:
    bin_folder = make_venv(tmp_path / "venv")
    run(bin_folder / "pip", "install", "-q", f"{sdist}[ros]")
    site_packages = next((tmp_path / "venv").glob("lib/python3*/site-packages"))
    for name in (
        "lib/matchanything_ros/match_node",
        "share/ament_index/resource_index/packages/matchanything_ros",
        "share/matchanything_ros/package.xml",
        "share/matchanything_ros/launch/match.launch.py",
        "share/matchanything_ros/config/match.yaml",
        site_packages / "matchanything_ros" / "msg" / "_homography.py",
    ):
        assert (tmp_path / "venv" / name).is_file(), name
    check_command_line(bin_folder, tmp_path)
    code = (
        "import rclpy; from matchanything_ros.msg import Homography; rclpy.init(); "
        "p = rclpy.create_node('n').create_publisher(Homography, 'h', 1); "
        "p.publish(Homography(status=Homography.DEGENERATE))"
    )
    run(bin_folder / "python", "-I", "-c", code, ROS_AUTOMATIC_DISCOVERY_RANGE="LOCALHOST")
    prefix = "from ament_index_python.packages import get_package_prefix as p; print(p('matchanything_ros'))"
    found = run(bin_folder / "python", "-I", "-c", prefix, AMENT_PREFIX_PATH=str(tmp_path / "venv")).stdout
    assert found.strip() == str(tmp_path / "venv")
