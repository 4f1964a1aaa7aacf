"""A sparse matcher of two networks, fp16, in the node."""

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


def test_dedode_answers_what_the_library_answers(small_dedode: Bundle, tmp_path: Path) -> None:
    images = [cv2.imread(str(GOLDEN / f"coffee_{number}.png"))[..., ::-1] for number in (0, 1)]
    image0, image1 = (
        np.ascontiguousarray(cv2.resize(image, (96, 64), interpolation=cv2.INTER_AREA)) for image in images
    )
    with Matcher(small_dedode, backend="onnxruntime-cpu") as matcher:
        expected = matcher.match(image0, image1)
    points, _ = answer_of_a_node({"bundle": small_dedode.onnx}, tmp_path / "log", image0, image1)
    matches, _ = read_correspondences(points)
    assert points.matcher == "dedode-BB" and len(matches) == len(expected) > 10
    found, wanted = (
        {(*map(tuple, (a, b)),) for a, b in zip(m.keypoints0.tolist(), m.keypoints1.tolist(), strict=True)}
        for m in (matches, expected)
    )
    assert len(found & wanted) >= 0.95 * len(wanted)
