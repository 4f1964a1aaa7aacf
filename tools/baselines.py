"""Classical matchers to compare with."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from matchanything_ros.matcher import Matches


def sift(image0: npt.NDArray[Any], image1: npt.NDArray[Any], features: int = 2000, ratio: float = 0.8) -> Matches:
    """SIFT with the ratio test (Lowe, IJCV 2004) on RGB or gray images (uint8, or float32 in [0, 1]).

    Matches are in the order of image 0's features (not sorted), scores are 1 - distance ratio.
    """
    size0, size1 = ((image.shape[1], image.shape[0]) for image in (image0, image1))
    detector = cv2.SIFT.create(features)
    (points0, descriptors0), (points1, descriptors1) = (
        detector.detectAndCompute(_gray(image), None) for image in (image0, image1)
    )
    nothing = np.zeros((0, 2), np.float32)
    if len(points0) < 1 or len(points1) < 2:
        return Matches(nothing, nothing, np.zeros(0, np.float32), size0, size1)
    pairs = cv2.BFMatcher().knnMatch(descriptors0, descriptors1, k=2)
    kept = [(best, second) for best, second in pairs if best.distance < ratio * second.distance]
    return Matches(
        keypoints0=np.array([points0[best.queryIdx].pt for best, _ in kept], np.float32).reshape(-1, 2),
        keypoints1=np.array([points1[best.trainIdx].pt for best, _ in kept], np.float32).reshape(-1, 2),
        scores=np.array([1 - best.distance / second.distance for best, second in kept], np.float32),
        size0=size0,
        size1=size1,
    )


def _gray(image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if image.dtype != np.uint8:
        image = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.asarray(image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)
