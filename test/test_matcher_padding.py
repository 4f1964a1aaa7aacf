"""Letterbox preprocessing: matches between the paddings of two images are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tiny_bundle import write_bundle

from matchanything_ros.matcher import Matcher


def test_matches_in_the_padding_are_dropped(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, resize="fit")  # inputs of 48 x 64, matches at (8 + 4 i, 6 + 3 i), i < 12
    wide, black = np.zeros((24, 64, 3), np.uint8), np.zeros((48, 64, 3), np.uint8)
    with Matcher(bundle, backend="onnxruntime-cpu") as matcher:
        assert len(matcher.match(black, black)) == 12
        matches = matcher.match(wide, black)  # below its 24 rows image 0 is padding: y = 6 .. 21 stay, from 24 on not
        assert len(matches) == 6 and matches.keypoints0[:, 1].max() == 21
        assert len(matcher.match(black, wide)) == 6


def test_a_dynamic_input_is_padded_too(tmp_path: Path) -> None:
    """To multiples of the divisor, and to the least size."""
    rng = np.random.default_rng(0)
    for height, width in ((70, 95), (20, 60), (97, 33)):
        image = rng.integers(0, 256, (height, width), np.uint8)
        with Matcher("kestrel", backend="onnxruntime-cpu", score_threshold=0.0) as matcher:
            matches = matcher.match(image, image)
            matcher.max_matches = len(matches) - 1  # of those that lie on the images, not of all
            assert len(matcher.match(image, image)) == len(matches) - 1
        assert len(matches) > 10
        for keypoints in (matches.keypoints0, matches.keypoints1):
            assert np.all(keypoints >= -0.5) and np.all(keypoints <= np.array([width, height]) - 0.5)
