"""Helpers of the packaging tests: a clean copy of the sources, clean environments, commands in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # what pytest brings there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# The ROS wheels set the first two once per process tree, and a second environment started from here would load the
# libraries of this one; the others would make it see our source tree or our ROS.
NOT_INHERITED = (
    "LD_LIBRARY_PATH",
    "_ROS_WHEELS_BOOTSTRAP_COMPLETE",
    "PYTHONPATH",
    "AMENT_PREFIX_PATH",
    "CMAKE_PREFIX_PATH",
    "VIRTUAL_ENV",
)


def clean_env(**more: str) -> dict[str, str]:
    """This process's environment without what would leak one Python environment into another."""
    return {key: value for key, value in os.environ.items() if key not in NOT_INHERITED} | more


def run(
    *command: str | Path, cwd: Path | None = None, check: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command outside this environment; its output (both streams together) is shown if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean_env(**env),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if check and done.returncode != 0:
        pytest.fail(
            f"{' '.join(map(str, command))} exited with {done.returncode}:\n{done.stdout[-6000:]}", pytrace=False
        )
    return done


def copy_sources(folder: Path) -> Path:
    """The files that git would commit, without anything generated."""
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT, check=False)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout: which files are sources is git's to say")
    for name in listed.stdout.splitlines():
        if (source := ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    return folder


def make_venv(folder: Path) -> Path:
    """An empty environment; returns its bin folder."""
    run(sys.executable, "-m", "venv", folder)
    return folder / "bin"
