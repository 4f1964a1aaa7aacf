"""Matches and HomographyEstimate <-> our messages, Correspondences and Homography.

The message class is an argument: rclpy's (`matchanything_ros.msg`) and those of rosbags, which needs no ROS, are
filled alike; they differ only in the type that an array field wants.
"""

from __future__ import annotations

import array
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from matchanything_ros.bundle import Bundle
from matchanything_ros.homography import HomographyEstimate, Status
from matchanything_ros.matcher import Matches

TYPECODES = {np.dtype(np.float32): "f", np.dtype(np.uint8): "B"}


def stamp_of(header: Any) -> int:
    """The stamp of a std_msgs/Header in nanoseconds."""
    return int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec)


def not_computed(size0: tuple[int, int], size1: tuple[int, int]) -> tuple[Matches, HomographyEstimate]:
    """The answer for a pair that could not be matched at all. Sizes are (width, height), zero where unknown."""
    none, scores = np.empty((0, 2), np.float32), np.empty(0, np.float32)
    estimate = HomographyEstimate(Status.NOT_COMPUTED, None, np.zeros(0, bool), 0, 0, 0.0, math.nan, 0.0)
    return Matches(none, none, scores, size0, size1), estimate


def correspondences(
    message_type: Any, header0: Any, header1: Any, matches: Matches, estimate: HomographyEstimate, bundle: Bundle
) -> Any:
    """Fill a Correspondences message. header0, header1: of the images, of the message type's own Header class."""
    return message_type(
        **_common(header0, header1, matches, bundle),
        points0=_sequence(message_type, matches.keypoints0, np.float32),
        points1=_sequence(message_type, matches.keypoints1, np.float32),
        scores=_sequence(message_type, matches.scores, np.float32),
        inliers=_sequence(message_type, estimate.inliers, np.uint8),
    )


def homography(
    message_type: Any, header0: Any, header1: Any, matches: Matches, estimate: HomographyEstimate, bundle: Bundle
) -> Any:
    """Fill a Homography message; without a matrix its nine values are zero."""
    matrix = np.zeros(9) if estimate.matrix is None else estimate.matrix
    return message_type(
        **_common(header0, header1, matches, bundle),
        status=int(estimate.status),
        # Generated code copies memory as it lies: a transposed matrix would arrive as it was before.
        homography=np.ascontiguousarray(matrix, np.float64).reshape(9),
        num_matches=int(estimate.num_matches),
        num_inliers=int(estimate.num_inliers),
        inlier_ratio=float(estimate.inlier_ratio),
        reprojection_error=float(estimate.reprojection_error_px),
        significance=float(estimate.significance),
    )


def image(message_type: Any, header: Any, picture: npt.NDArray[np.uint8]) -> Any:
    """A sensor_msgs/Image of an RGB picture [H, W, 3]."""
    height, width = picture.shape[:2]
    return message_type(
        header=header,
        height=height,
        width=width,
        encoding="rgb8",
        is_bigendian=0,
        step=3 * width,
        data=_sequence(message_type, picture, np.uint8),
    )


def read_correspondences(message: Any) -> tuple[Matches, npt.NDArray[np.bool_]]:
    """The matches in a Correspondences message, and which of them are inliers [N]."""
    points0, points1, scores = (_values(getattr(message, name)) for name in ("points0", "points1", "scores"))
    matches = Matches(
        points0.reshape(-1, 2),
        points1.reshape(-1, 2),
        scores,
        (message.width0, message.height0),
        (message.width1, message.height1),
    )
    return matches, np.array(message.inliers, bool)


def read_homography(message: Any) -> HomographyEstimate:
    """The estimate in a Homography message. `inliers` is empty: the mask is in Correspondences."""
    status = Status(message.status)
    return HomographyEstimate(
        status=status,
        matrix=np.array(message.homography, np.float64).reshape(3, 3) if status is Status.OK else None,
        inliers=np.zeros(0, bool),
        num_matches=int(message.num_matches),
        num_inliers=int(message.num_inliers),
        inlier_ratio=float(message.inlier_ratio),
        reprojection_error_px=float(message.reprojection_error),
        significance=float(message.significance),
    )


def _common(header0: Any, header1: Any, matches: Matches, bundle: Bundle) -> dict[str, Any]:
    return {
        "header": header0,
        "header0": header0,
        "header1": header1,
        "width0": int(matches.size0[0]),
        "height0": int(matches.size0[1]),
        "width1": int(matches.size1[0]),
        "height1": int(matches.size1[1]),
        "matcher": bundle.manifest.name,
        "bundle_sha256": bundle.manifest.onnx_sha256,
    }


def _sequence(message_type: Any, values: npt.NDArray[Any], dtype: Any) -> Any:
    """A flat array field. rclpy copies array.array at once, and all else element by element (100 times slower)."""
    flat = np.ascontiguousarray(values, dtype).reshape(-1)
    if hasattr(message_type, "get_fields_and_field_types"):
        return array.array(TYPECODES[flat.dtype], flat.tobytes())
    return flat


def _values(field: Any) -> npt.NDArray[np.float32]:
    return np.frombuffer(field, np.float32) if len(field) else np.empty(0, np.float32)
