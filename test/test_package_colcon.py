"""`colcon build` of a workspace, with the ROS 2 that this shell has sourced, or else with ROS 2 from wheels."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from installing import PYPROJECT, ROOT, copy_sources, make_venv, run

pytestmark = [pytest.mark.full, pytest.mark.ros]
SOURCED = os.environ.get("ROS_DISTRO") and shutil.which("ros2")


@pytest.fixture(scope="module")
def ros(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[str]]:
    """Environment and CMake arguments for colcon."""
    if SOURCED:
        return {name: os.environ[name] for name in ("AMENT_PREFIX_PATH", "PYTHONPATH", "LD_LIBRARY_PATH")}, []
    prefix = tmp_path_factory.mktemp("wheels") / "venv"
    bin_folder = make_venv(prefix)
    project = PYPROJECT
    needs = project["build-system"]["requires"] + project["project"]["optional-dependencies"]["ros"]
    needs += [*project["project"]["dependencies"], "colcon-common-extensions"]
    run(bin_folder / "pip", "install", "-q", *needs)
    python = bin_folder / "python"
    fix = ROOT / "cmake" / "wheels_fix.cmake"
    arguments = [f"-DPython3_EXECUTABLE={python}", f"-DPYTHON_EXECUTABLE={python}", f"-DCMAKE_PROJECT_INCLUDE={fix}"]
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    return {"AMENT_PREFIX_PATH": str(prefix), "CMAKE_PREFIX_PATH": str(prefix), "PATH": path}, ["-GNinja", *arguments]


@pytest.mark.parametrize("mode", [(), ("--symlink-install",)], ids=["copy", "symlink"])
def test_workspace(mode: tuple[str, ...], ros: tuple[dict[str, str], list[str]], tmp_path: Path) -> None:
    env, cmake = ros
    source = copy_sources(tmp_path / "src" / "matchanything_ros")
    stale = source / "matchanything_ros" / "msg"  # as an older editable install leaves it behind
    stale.mkdir()
    (stale / "__init__.py").write_text("raise RuntimeError('a stale generated file was installed')\n")
    (stale / "_homography.py").write_text("raise RuntimeError('a stale generated file was installed')\n")
    arguments = ["--cmake-args", *cmake] if cmake else []
    run("colcon", "build", *mode, *arguments, cwd=tmp_path, **env)

    share = tmp_path / "install" / "matchanything_ros" / "share"
    for name in ("launch/match.launch.py", "config/match.yaml", "config/fastdds_large_images.xml", "package.xml"):
        assert (share / "matchanything_ros" / name).is_file(), name
    assert (share / "ament_index" / "resource_index" / "packages" / "matchanything_ros").is_file()
    assert (share / "matchanything_ros" / "launch" / "match.launch.py").is_symlink() == bool(mode)
    node = tmp_path / "install" / "matchanything_ros" / "lib" / "matchanything_ros" / "match_node"
    assert os.access(node, os.X_OK)

    code = (
        "import rclpy; from matchanything_ros.msg import Homography; from matchanything_ros.bundle import load_bundle; "
        "import matchanything_ros.node, matchanything_tools; load_bundle(None); rclpy.init(); "
        "rclpy.create_node('n').create_publisher(Homography, 'h', 1).publish(Homography())"
    )
    sourced = f'. install/setup.sh && python3 -c "{code}" && matchanything doctor'
    run("sh", "-c", sourced, cwd=tmp_path, **env, ROS_AUTOMATIC_DISCOVERY_RANGE="LOCALHOST")
