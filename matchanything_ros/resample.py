"""Resizing an image as the networks' authors do, with numpy and OpenCV only.

Area and plain (not antialiased) linear and cubic resizing are OpenCV's. The antialiased kernels of PyTorch and PIL,
which OpenCV lacks, are two constant matrices, one for the rows and one for the columns: exact. Their bands are cached.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
# Target rows (or columns) at a time: the zeros beside their band are left out, and no product is large enough for BLAS
# to share it among threads, which wait for each other far longer than they work where processors are busy.
BLOCK = 16


def resize(image: Array, height: int, width: int, interpolation: str) -> Array:
    """Resize a float32 image [H, W] or [H, W, C] to (height, width), keeping its edges (not its corner pixels).

    interpolation: "area" (OpenCV's INTER_AREA when neither side grows, else linear: what the MatchAnything demo does),
    "linear", "bicubic" (a = -0.75), "bicubic_antialias" (PyTorch with antialias=True; a = -0.5, the kernel widened when
    shrinking) or "lanczos" (PIL's, three lobes). Cubic and Lanczos results may leave the input's range.
    """
    if image.shape[:2] == (height, width):
        return image
    if interpolation in ("bicubic_antialias", "lanczos"):
        planes = image[None] if image.ndim == 2 else np.moveaxis(image, 2, 0)
        wide = np.empty((len(planes), image.shape[0], width), np.float32)
        for target, source, weights in _bands(image.shape[1], width, interpolation):
            wide[:, :, target] = planes[:, :, source] @ weights.T
        out = np.empty((len(planes), height, width), np.float32)
        for target, source, weights in _bands(image.shape[0], height, interpolation):
            np.matmul(weights, wide[:, source], out=out[:, target])
        return out[0] if image.ndim == 2 else np.moveaxis(out, 0, 2)
    shrinks = height <= image.shape[0] and width <= image.shape[1]
    flag = {
        "area": cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
        "linear": cv2.INTER_LINEAR,
        "bicubic": cv2.INTER_CUBIC,
    }[interpolation]
    return np.asarray(cv2.resize(image, (width, height), interpolation=flag), np.float32)


def resize_matrix(source: int, target: int, kernel: str) -> Array:
    """The matrix [target, source] that resizes one axis with an antialiased kernel ("bicubic_antialias" or "lanczos").

    As in PIL and in PyTorch's antialiased interpolation: the kernel is stretched by source/target when shrinking, cut
    at the border and normalised there.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    radius = 3.0 if kernel == "lanczos" else 2.0
    support = radius * stretch
    matrix = np.zeros((target, source), np.float64)
    for row in range(target):
        centre = (row + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), source)
        x = np.asarray((np.arange(first, last) - centre + 0.5) / stretch, np.float64)
        weights = _lanczos(x) if kernel == "lanczos" else _cubic(x, -0.5)
        matrix[row, first:last] = weights / weights.sum()
    return matrix.astype(np.float32)


@lru_cache(maxsize=32)
def _bands(source: int, target: int, kernel: str) -> list[tuple[slice, slice, Array]]:
    """resize_matrix in blocks of rows without the zeros at their sides: (target rows, source rows, weights)."""
    matrix = resize_matrix(source, target, kernel)
    bands = []
    for start in range(0, target, BLOCK):
        rows = matrix[start : start + BLOCK]
        used = np.flatnonzero(rows.any(0))
        columns = slice(int(used[0]), int(used[-1]) + 1)
        bands.append((slice(start, start + len(rows)), columns, np.ascontiguousarray(rows[:, columns])))
    return bands


def _cubic(x: npt.NDArray[np.float64], a: float) -> npt.NDArray[np.float64]:
    """Keys' cubic convolution kernel (IEEE TASSP 1981)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
