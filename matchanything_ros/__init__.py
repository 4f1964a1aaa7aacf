"""Correspondences between two images of the same place, however different the cameras.

from matchanything_ros import Matcher, estimate_homography

This side runs on a robot: numpy, OpenCV and one inference runtime, never torch, and ROS only in the
files that speak ROS (node, messages).
"""

from matchanything_ros.bundle import Bundle, load_bundle
from matchanything_ros.errors import UserError
from matchanything_ros.homography import HomographyEstimate, Status, estimate_homography
from matchanything_ros.matcher import Matcher, Matches

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "HomographyEstimate",
    "Matcher",
    "Matches",
    "Status",
    "UserError",
    "__version__",
    "estimate_homography",
    "load_bundle",
]
