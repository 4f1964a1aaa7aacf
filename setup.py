"""What pyproject.toml cannot say: the messages, generated and compiled by CMake with ROS 2 from wheels.

pip runs `build_py`; it runs CMake (CMakeLists.txt, the same that colcon uses) into build/ros/stage and puts
- the generated Python package of the messages beside our files (in editable mode: into the source tree, git-ignored),
- the message libraries, the node's script and the share folder into the environment, as `data_files`.
Without the generators (no wheels for this platform) everything else is installed, and one line says what is missing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NAME = "matchanything_ros"
BUILD = ROOT / "build" / "ros"


def generators() -> Path | None:
    """The prefix of the ROS wheels, if the message generators are in it."""
    spec = importlib.util.find_spec("ament_package")
    if spec is None or spec.origin is None:
        return None
    prefix = Path(spec.origin).resolve().parents[4]  # PREFIX/lib/pythonX.Y/site-packages/ament_package/__init__.py
    needed = ("rosidl_default_generators", "ament_cmake", "rmw_fastrtps_cpp", "std_msgs")
    return prefix if all((prefix / "share" / name).is_dir() for name in needed) else None


def installed_ros() -> Path | None:
    """A ROS 2 installation that this shell has sourced: messages from wheels would not fit it."""
    for prefix in filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)):
        path = Path(prefix)
        if (path / "share" / "rosidl_default_generators").is_dir() and not (path / "pyvenv.cfg").exists():
            return path
    return None


def why_no_messages() -> str | None:
    """One sentence, or None if the messages can be built."""
    if (ros := installed_ros()) is not None:
        return f"the ROS 2 installation {ros} is sourced: build the messages and the node with colcon"
    if generators() is None:
        return "no ROS 2 message generators here (wheels exist for x86-64): build the messages and the node with colcon"
    return None


def stage_messages() -> Path:
    """Configure, build and install with CMake; the folder it was installed to.

    Raises SystemExit with one sentence if CMake fails (its own output stands above it).
    """
    prefix = generators()
    assert prefix is not None
    stage = BUILD / "stage"
    # pip's isolated environment has another path each time; a CMake cache that points into the last one fails.
    stamp, here = BUILD / "prefix.txt", f"{prefix}\n{sys.executable}\n{ROOT}\n"
    if BUILD.exists() and (not stamp.exists() or stamp.read_text() != here):
        shutil.rmtree(BUILD)
    BUILD.mkdir(parents=True, exist_ok=True)
    stamp.write_text(here)
    shutil.rmtree(stage, ignore_errors=True)  # a message that was removed must not be installed again
    env = dict(os.environ, AMENT_PREFIX_PATH=str(prefix), CMAKE_PREFIX_PATH=str(prefix))
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(BUILD / "cmake"), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_INSTALL_PREFIX={stage}", "-DPYTHON_INSTALL_DIR=python", "-DBUILD_TESTING=OFF",
        f"-DPython3_EXECUTABLE={sys.executable}", f"-DPYTHON_EXECUTABLE={sys.executable}",
        f"-DCMAKE_PROJECT_INCLUDE={ROOT / 'cmake' / 'wheels_fix.cmake'}",
    ]  # fmt: skip
    try:
        subprocess.run(configure, env=env, check=True)
        subprocess.run(["cmake", "--build", str(BUILD / "cmake"), "--target", "install"], env=env, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        stamp.unlink(missing_ok=True)  # start afresh next time
        raise SystemExit(
            f"{NAME}: building the ROS 2 messages failed ({error}). It needs a C++ compiler and the Python headers: "
            "on Debian and Ubuntu, apt install build-essential python3-dev."
        ) from error
    return stage


def environment_files(stage: Path) -> list[tuple[str, list[str]]]:
    """(folder in the environment, files) for what lies outside the Python packages, as setuptools wants it.

    Left out: headers and CMake files (C++ users have a ROS installation and colcon), shell hooks, bin/ (pip makes it).
    """
    wanted = ["lib/*.so", f"lib/{NAME}/*", "share/ament_index/**/*"]
    share = ("package.xml", "launch/**/*", "config/**/*", "msg/*.msg", "msg/*.idl")
    wanted += [f"share/{NAME}/{part}" for part in share]
    folders: dict[str, list[str]] = {}
    for pattern in wanted:
        for file in sorted(stage.glob(pattern)):
            if file.is_file():
                folder = file.parent.relative_to(stage).as_posix()
                folders.setdefault(folder, []).append(file.relative_to(ROOT).as_posix())
    return sorted(folders.items())


class BuildWithMessages(build_py):
    """build_py, then the messages."""

    editable_mode = False

    def run(self) -> None:
        if not self.editable_mode:
            # pip builds in the source tree: a module that was deleted would live on in here.
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if not self.editable_mode:  # for readers and writers of bags without ROS; an editable install finds msg/ itself
            self.copy_tree("msg", str(Path(self.build_lib) / NAME / "interfaces"))
        if (reason := why_no_messages()) is not None:
            print(f"{NAME}: installed without ROS messages and node: {reason}", file=sys.stderr)
            self.distribution.data_files = []
            return
        stage = stage_messages()
        target = ROOT / NAME if self.editable_mode else Path(self.build_lib) / NAME
        generated = stage / "python" / NAME
        shutil.rmtree(target / "msg", ignore_errors=True)
        shutil.copytree(generated / "msg", target / "msg", ignore=shutil.ignore_patterns("__pycache__", "*.c"))
        for old in target.glob("*.so"):
            old.unlink()
        for library in generated.glob("*.so"):
            shutil.copy2(library, target)
        self.distribution.data_files = environment_files(stage)
        if self.editable_mode:  # setuptools leaves data_files out of an editable wheel: no message libraries
            self.run_command("install_data")


class PlatformDistribution(Distribution):
    """With compiled messages the wheel belongs to one platform and Python; setuptools cannot see them."""

    def has_ext_modules(self) -> bool:
        return why_no_messages() is None


def packages(folder: str, name: str) -> list[str]:
    """`name` and the packages below `folder`; without the messages that an editable install left there."""
    return [name, *(f"{name}.{sub}" for sub in find_packages(folder, exclude=["msg", "msg.*"]))]


setup(
    packages=packages(NAME, NAME) + packages("tools", "matchanything_tools"),
    package_dir={NAME: NAME, "matchanything_tools": "tools"},
    data_files=[("share", [])],  # a placeholder: without one setuptools never runs install_data
    cmdclass={"build_py": BuildWithMessages},
    distclass=PlatformDistribution,
)
