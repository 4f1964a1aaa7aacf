"""The README does not lie: its example runs, its table is the node's, its files and commands exist."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from matchanything_ros.cli import COMMANDS
from matchanything_ros.parameters import Parameters

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_finds_a_homography(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    out = capsys.readouterr().out
    matches, inliers = (int(number) for number in re.findall(r"\d+", out.splitlines()[0])[:2])
    assert ", OK" in out.splitlines()[0] and 8 <= inliers <= matches


def test_the_parameters_are_the_nodes() -> None:
    rows = re.findall(r"^\| `(\w+)`( \*)? \| `([^`]*)` \| (.*) \|$", README, flags=re.M)
    expected = []
    for field in dataclasses.fields(Parameters):
        value = field.default
        text = (
            str(list(value)) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else value
        )
        shown = '""' if text == "" else str(text)
        expected.append((field.name, " *" if field.metadata["run_time"] else "", shown))
    assert [row[:3] for row in rows] == expected
    for row, field in zip(rows, dataclasses.fields(Parameters), strict=True):
        assert row[3].startswith(field.metadata["description"])


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    assert (ROOT / "docs" / "matches.jpg").stat().st_size <= 300_000


def test_commands_exist() -> None:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S) for line in block.splitlines()]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] == "matchanything":
            assert words[1] in COMMANDS, line
        elif words[0] == "match_node":
            assert 'match_node = "matchanything_ros.' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, flags=re.M), line
        else:
            assert words[:2] == ["ros2", "launch"] and (ROOT / "launch" / words[3]).is_file(), line
