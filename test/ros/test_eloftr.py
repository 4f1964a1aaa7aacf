"""A large network in the running node: a small ELoFTR bundle answers over real DDS what it answers in a process."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from dds import Client, NodeProcess, new_domain

from matchanything_ros import Matcher
from matchanything_ros.bundle import Bundle
from matchanything_ros.messages import read_correspondences

pytestmark = pytest.mark.ros

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def test_eloftr_in_the_node(small_eloftr: tuple[object, Bundle], tmp_path: Path) -> None:
    bundle = small_eloftr[1]
    images = [cv2.imread(str(GOLDEN / f"eloftr_832_gray{index}.png"), cv2.IMREAD_GRAYSCALE) for index in (0, 1)]
    with Matcher(bundle.onnx, score_threshold=0.01, backend="onnxruntime-cpu") as matcher:
        expected = matcher.match(*images)
    assert len(expected) > 10
    domain = new_domain()
    settings = {"bundle": bundle.onnx, "image_qos": "reliable", "backend": "onnxruntime-cpu", "score_threshold": 0.01}
    node = NodeProcess(domain, tmp_path / "log", settings, "image0:=/cam0/image", "image1:=/cam1/image")
    client = Client(domain, node, topics=("/cam0/image", "/cam1/image"))
    try:
        client.connected(900.0)
        points, _ = client.match(1000.0, *images)
    finally:
        client.close()
        status = node.stop()
    assert status == 0 and "Traceback" not in node.log, node.log
    matches, _ = read_correspondences(points)
    assert points.bundle_sha256 == bundle.manifest.onnx_sha256
    for name in ("keypoints0", "keypoints1", "scores"):
        np.testing.assert_allclose(getattr(matches, name), getattr(expected, name), atol=1e-3)
