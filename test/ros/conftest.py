"""One node process serves most of the tests here; starting one costs two seconds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from trivial_bundle import write_trivial_bundle

if TYPE_CHECKING:  # importing it skips where there is no ROS: the test modules do
    from dds import Client


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles: one that is fast, one that is slow, and damaged ones."""
    folder = tmp_path_factory.mktemp("bundles")
    made = {
        "fast": write_trivial_bundle(folder / "fast.onnx"),
        "slow": write_trivial_bundle(folder / "slow.onnx", work=1200),
        "truncated": write_trivial_bundle(folder / "truncated.onnx"),
        "future": write_trivial_bundle(folder / "future.onnx"),
        "missing": folder / "missing.onnx",
    }
    made["truncated"].write_bytes(made["truncated"].read_bytes()[:-20])
    manifest = made["future"].with_suffix(".json")
    manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 99'))
    return made


@pytest.fixture(scope="session")
def shared_client(tmp_path_factory: pytest.TempPathFactory, bundles: dict[str, Path]) -> Iterator[Client]:
    from dds import Client, NodeProcess, new_domain

    domain = new_domain()
    log = tmp_path_factory.mktemp("node") / "log"
    # Deep and reliable: what a busy machine would lose on the way is not what these tests are about.
    settings = {"bundle": bundles["fast"], "image_qos": "reliable", "queue_size": 100}
    node = NodeProcess(domain, log, settings, "image0:=/cam0/image", "image1:=/cam1/image")
    client = Client(domain, node, topics=("/cam0/image", "/cam1/image"))
    yield client
    client.close()
    status = node.stop()
    assert status == 0 and "Traceback" not in node.log, node.log


DEFAULTS = {"score_threshold": -1.0, "max_matches": 0, "ransac_threshold": 3.0, "use_sim_time": False}
_times = itertools.count(1000, 200)


@pytest.fixture
def now() -> float:
    """A time [s] at least a minute later than all that the tests before used."""
    return float(next(_times))


@pytest.fixture
def restart(shared_client: Client, now: float) -> Any:
    """Function that takes the shared node through cleanup, sets parameters, and activates it again."""

    def go(**values: object) -> None:
        if shared_client.state() == "active":
            assert shared_client.transition("deactivate", "cleanup") == [True, True]
        assert shared_client.set(**values) == ""
        assert shared_client.transition("configure", "activate") == [True, True]
        shared_client.connected(now - 30)

    return go


@pytest.fixture
def client(shared_client: Client, now: float) -> Client:
    """The shared node, active, with run-time parameters at their defaults."""
    assert shared_client.set(**DEFAULTS) == ""
    shared_client.connected(now - 60)
    return shared_client
