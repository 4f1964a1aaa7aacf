"""A large network in the running node: a small ELoFTR bundle answers over real DDS what it answers in a process."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from dds import answer_of_a_node

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
    settings = {"bundle": bundle.onnx, "score_threshold": 0.01}
    points, _ = answer_of_a_node(settings, tmp_path / "log", *images)
    matches, _ = read_correspondences(points)
    assert points.bundle_sha256 == bundle.manifest.onnx_sha256
    for name in ("keypoints0", "keypoints1", "scores"):
        np.testing.assert_allclose(getattr(matches, name), getattr(expected, name), atol=1e-3)
