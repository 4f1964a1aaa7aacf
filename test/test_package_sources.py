"""What must agree between files that no tool compares: versions, dependencies, messages, launch file and config."""

from __future__ import annotations

import ast
import dataclasses
import re
import xml.etree.ElementTree as ElementTree

from installing import PYPROJECT, ROOT

from matchanything_ros.homography import Status
from matchanything_ros.parameters import Parameters

PROJECT = PYPROJECT["project"]
MANIFEST = ElementTree.parse(ROOT / "package.xml").getroot()


def test_one_version_one_name_one_licence() -> None:
    for key, element in (("version", "version"), ("name", "name")):
        assert PROJECT[key] == MANIFEST.findtext(element)
    assert PROJECT["license"]["text"] == MANIFEST.findtext("license") == "Apache-2.0"


def test_changelog_has_this_version() -> None:
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_the_robot_gets_three_packages_and_no_torch() -> None:
    names = {re.split(r"[<>=;\[ ]", need)[0] for need in PROJECT["dependencies"]}
    assert names == {"numpy", "opencv-python-headless", "onnxruntime"}


def test_status_constants_of_the_message_are_those_of_the_library() -> None:
    text = (ROOT / "msg" / "Homography.msg").read_text()
    constants = {name: int(value) for name, value in re.findall(r"^uint8 ([A-Z_]+) = (\d+)", text, re.MULTILINE)}
    assert constants == {status.name: int(status) for status in Status}


def test_every_field_of_the_messages_is_explained() -> None:
    for path in sorted((ROOT / "msg").glob("*.msg")):
        explained = True
        for line in path.read_text().splitlines():
            if not line or line.startswith("#"):
                continue
            # height follows width, whose comment speaks of both
            explained = "#" in line or ("height" in line and explained)
            assert explained, f"{path.name}: {line}"


def test_ros_packages_that_are_imported_are_declared() -> None:
    declared = {element.text for tag in ("depend", "exec_depend") for element in MANIFEST.findall(tag)}
    known = {
        "rclpy",
        "sensor_msgs",
        "std_msgs",
        "diagnostic_msgs",
        "lifecycle_msgs",
        "rcl_interfaces",
        "builtin_interfaces",
    }
    for path in [*(ROOT / "matchanything_ros").glob("*.py"), *(ROOT / "launch").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for top in {module.split(".")[0] for module in modules} & (known | {"launch", "launch_ros"}):
                assert top in declared, f"{path.name} imports {top}: package.xml must declare it"


def test_robot_side_does_not_import_torch() -> None:
    for path in (ROOT / "matchanything_ros").rglob("*.py"):
        assert not re.search(
            r"^\s*(import|from) (torch|onnx|onnxscript|safetensors)\b", path.read_text(), re.MULTILINE
        ), path


def test_launch_file_passes_on_only_parameters_that_exist() -> None:
    overrides: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / "launch" / "match.launch.py").read_text())):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Dict)
            and ast.unparse(node.targets[0]) == "OVERRIDES"
        ):
            overrides = {ast.literal_eval(key) for key in node.value.keys if key is not None}
    known = {field.name for field in dataclasses.fields(Parameters)} | {"use_sim_time"}
    assert {"bundle", "backend"} <= overrides <= known


def test_config_file_has_every_parameter_with_its_default() -> None:
    text = (ROOT / "config" / "match.yaml").read_text()
    written = dict(re.findall(r"^    ([a-z_0-9]+): (.+)$", text, re.MULTILINE))
    defaults = {field.name: field.default for field in dataclasses.fields(Parameters)}
    assert written.keys() == defaults.keys()
    for name, default in defaults.items():
        value = written[name]
        got = (
            value
            if isinstance(default, str)
            else ast.literal_eval(value.capitalize() if value in ("true", "false") else value)
        )
        assert (got.strip('"') if isinstance(got, str) else tuple(got) if isinstance(got, list) else got) == default, (
            name
        )


def test_launch_and_config_folders_are_installed_and_the_node_is_executable() -> None:
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert "install(DIRECTORY launch config DESTINATION share/${PROJECT_NAME})" in cmake
    for name in ("match_node", "matchanything"):
        assert (ROOT / "scripts" / name).stat().st_mode & 0o111 == 0o111, f"scripts/{name} must be executable"
        assert f"scripts/{name} DESTINATION" in cmake


def test_every_file_that_make_runs_is_there() -> None:
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    recipes = "\n".join(line for line in lines if line.startswith("\t"))
    files = re.findall(r"\b(?:cmake|demo|scripts|test|tools)/[\w/]+\.(?:py|sh|cmake)\b", recipes)
    assert files and all((ROOT / file).is_file() for file in files), files
