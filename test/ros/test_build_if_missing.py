"""The parameter build_if_missing: a build beside the node, told in the diagnostics, that never costs a match."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from dds import Client, NodeProcess, new_domain
from diagnostic_msgs.msg import DiagnosticStatus

from matchanything_ros.engines.device import current_device
from matchanything_ros.msg import Homography

pytestmark = [pytest.mark.ros, pytest.mark.skipif(current_device() is not None, reason="here the build would succeed")]

GRAY = np.random.default_rng(0).integers(0, 256, (120, 160), np.uint8)


def test_a_build_that_fails_is_a_warning_and_onnx_runtime_matches(tmp_path: Path, bundles: dict[str, Path]) -> None:
    """On a machine without a GPU no plan can be built; the node says so and works."""
    domain = new_domain()
    parameters = {"bundle": bundles["fast"], "build_if_missing": True, "backend": "tensorrt"}
    node = NodeProcess(domain, tmp_path / "log", parameters)
    client = Client(domain, node)
    try:
        client.connected()
        assert client.match(30.0, GRAY, GRAY)[1].status == Homography.OK
        _, status, values = client.status(
            lambda status, _: status.level == DiagnosticStatus.WARN and "plan" in status.message
        )
        assert "was not built: There is no" in status.message and values["TensorRT plan"] == status.message
        assert values["backend"].startswith("onnxruntime")
        assert client.match(40.0, GRAY, GRAY)[1].status == Homography.OK
        assert node.stop() == 0 and "Traceback" not in node.log, node.log
        assert "Building the TensorRT plan of fast.onnx" in node.log
    finally:
        client.close()
        node.stop(signal.SIGKILL)
