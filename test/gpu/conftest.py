"""Tests that need an NVIDIA GPU: `make test-gpu`. At the end a report is printed, to paste into an issue."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import pytest

from matchanything_ros.engines.device import current_device
from matchanything_ros.engines.flavour import flavours

LINES: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/gpu/" in str(item.path):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Add a line to the report."""
    return lambda line: LINES.append(f"{request.node.name}: {line}")


@pytest.fixture(scope="session", autouse=True)
def gpu() -> Any:
    """The GPU; without one every test here is skipped."""
    device = current_device()
    if device is None:
        pytest.skip("there is no GPU here that CUDA can use")
    return device


@pytest.fixture(scope="session")
def drv(gpu: Any) -> Iterator[Any]:
    """pycuda.driver."""
    yield pytest.importorskip("pycuda.driver", reason="pycuda is not installed")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    device = current_device()
    if not LINES or device is None:
        return
    versions = []
    for name in ("matchanything_ros", "numpy", "onnxruntime-gpu", "onnxruntime", "pycuda"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    usable, unusable = flavours()
    terminalreporter.section("report, to paste into an issue")
    terminalreporter.write_line(
        f"{device.name}, compute capability {device.compute_capability}, CUDA {device.cuda}, driver {device.driver}; "
        f"{platform.machine()}, Python {platform.python_version()}"
    )
    terminalreporter.write_line(", ".join([*versions, *(flavour.title for flavour in usable), *unusable]))
    for line in LINES:
        terminalreporter.write_line(line)
