"""A large network in the running node: a small ELoFTR bundle answers over real DDS what it answers in a process."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import pytest
from dds import Client, NodeProcess, new_domain

from matchanything_ros import Matcher
from matchanything_ros.messages import read_correspondences

pytestmark = pytest.mark.ros

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def test_eloftr_in_the_node(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import seeded

    from matchanything_tools.export import export, network

    args = dict.fromkeys(("min", "opt", "max", "pipeline"))
    args |= {"weights": seeded.save("eloftr", tmp_path / "eloftr.ckpt"), "size": (224, 256), "max_matches": 200}
    args |= {"precision": "fp32", "licence": "none: random", "score_threshold": 0.01}
    bundle = export(network("eloftr").exportable(argparse.Namespace(**args)), tmp_path / "eloftr.onnx")
    images = [cv2.imread(str(GOLDEN / f"eloftr_832_gray{index}.png"), cv2.IMREAD_GRAYSCALE) for index in (0, 1)]
    with Matcher(bundle.onnx, backend="onnxruntime-cpu") as matcher:
        expected = matcher.match(*images)
    assert len(expected) > 10
    domain = new_domain()
    settings = {"bundle": bundle.onnx, "image_qos": "reliable", "backend": "onnxruntime-cpu"}
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
