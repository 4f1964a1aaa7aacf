"""`matchanything build`: a bundle -> a TensorRT plan beside it, checked against the golden result.

This runs on the robot: it imports neither torch nor ONNX.
"""

from __future__ import annotations

from matchanything_ros.engines.builder import build_engine

__all__ = ["build_engine"]
