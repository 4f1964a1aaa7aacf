"""A dense matcher in the node: two passes from one image, fp16, hundreds of megabytes of weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dds import answer_of_a_node
from numpy.testing import assert_allclose

from matchanything_ros import Matcher
from matchanything_ros.bundle import Bundle
from matchanything_ros.messages import read_correspondences

pytestmark = pytest.mark.ros


def test_roma_answers_what_the_library_answers(shallow_roma: Bundle, tmp_path: Path) -> None:
    roma_case = pytest.importorskip("roma_case", reason="torch makes the test's network")
    image0, image1 = roma_case.pictures()
    with Matcher(shallow_roma, backend="onnxruntime-cpu") as matcher:
        expected = matcher.match(image0, image1)
    points, homography = answer_of_a_node({"bundle": shallow_roma.onnx}, tmp_path / "log", image0, image1)
    assert points.matcher == homography.matcher == "roma-shallow"
    matches, _ = read_correspondences(points)
    assert len(matches) == len(expected) > 100
    # The same arithmetic, but perhaps in another order on another thread; random weights match badly, yet repeatably.
    assert_allclose(matches.scores, expected.scores, atol=1e-3)
    same = np.abs(matches.keypoints1 - expected.keypoints1).max(1) < 0.1
    assert same.mean() > 0.95
