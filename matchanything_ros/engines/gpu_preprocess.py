"""`preprocess.prepare` on the GPU: one upload of the 8-bit image, two small kernels for each input of the network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matchanything_ros.bundle import InputSpec, Preprocess
from matchanything_ros.engines.cuda import CudaWorker
from matchanything_ros.preprocess import Image, ToOriginal, content_size, input_size, scaled
from matchanything_ros.resample import resize_matrix

# PTX, which any driver from CUDA 11.8 on compiles for its own GPU: no nvcc is needed on the robot.
PTX = Path(__file__).with_name("kernels.ptx")
BLOCK = (32, 8, 1)
MOST_TABLES = 16
_ROWS = "PiiiiPPiiP"
_COLUMNS = "PiiiPPiiiiiiP"


@dataclass(frozen=True)
class Axis:
    """Resizing along one axis: target pixel i is the sum over t of weights[t, i] * source[first[i] + t]."""

    first: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]

    @property
    def taps(self) -> int:
        return len(self.weights)


def axes(height: int, width: int, preprocess: Preprocess, content: tuple[int, int]) -> tuple[Axis, Axis]:
    """The tables (rows' axis: vertical, columns' axis: horizontal) that take an image to `content` (height, width)."""
    stages = []
    sizes = (height, width)
    limit = preprocess.long_side_limit
    if limit is not None and max(sizes) > limit:
        smaller = scaled(height, width, limit / max(sizes))
        stages.append((sizes, smaller, "area"))
        sizes = smaller
    stages.append((sizes, content, preprocess.interpolation))
    tables = []
    for axis in (0, 1):
        matrix: npt.NDArray[np.float64] | None = None
        for source, target, kernel in stages:
            if kernel == "area" and (target[0] > source[0] or target[1] > source[1]):
                kernel = "linear"  # as resample.resize does
            stage = _matrix(source[axis], target[axis], kernel)
            matrix = stage if matrix is None else stage @ matrix
        assert matrix is not None
        tables.append(_band(matrix))
    return tables[0], tables[1]


def _matrix(source: int, target: int, kernel: str) -> npt.NDArray[np.float64]:
    """The matrix [target, source] of one axis, edges kept: OpenCV's area, linear and cubic, or resample's own."""
    if kernel in ("bicubic_antialias", "lanczos"):
        return resize_matrix(source, target, kernel).astype(np.float64)
    matrix = np.zeros((target, source))
    index = np.arange(target)
    scale = source / target
    if kernel == "area":
        edges = np.arange(source)
        overlap = np.minimum(edges + 1, (index[:, None] + 1) * scale) - np.maximum(edges, index[:, None] * scale)
        return np.asarray(np.maximum(overlap, 0) / scale)
    centre = (index + 0.5) * scale - 0.5
    base = np.floor(centre).astype(int)
    part = centre - base
    if kernel == "linear":
        taps = {0: 1 - part, 1: part}
    else:
        a = -0.75  # OpenCV's cubic
        near, far = (
            (lambda x: ((a + 2) * x - (a + 3)) * x * x + 1),
            (lambda x: ((a * x - 5 * a) * x + 8 * a) * x - 4 * a),
        )
        taps = {-1: far(part + 1), 0: near(part), 1: near(1 - part), 2: far(2 - part)}
    for offset, weight in taps.items():
        np.add.at(matrix, (index, np.clip(base + offset, 0, source - 1)), weight)
    return matrix


def _band(matrix: npt.NDArray[np.float64]) -> Axis:
    used = np.abs(matrix) > 1e-9
    first = used.argmax(1)
    last = matrix.shape[1] - used[:, ::-1].argmax(1)
    taps = int((last - first).max())
    columns = np.minimum(first[None] + np.arange(taps)[:, None], matrix.shape[1] - 1)
    inside = first[None] + np.arange(taps)[:, None] < last[None]
    weights = np.where(inside, np.take_along_axis(matrix, columns.T, 1).T, 0.0)
    return Axis(first.astype(np.int32), np.ascontiguousarray(weights, np.float32))


class GpuPreprocessor:
    """Fills device inputs from 8-bit images. Every method runs in the worker's thread.

    Memory grows with the largest image seen and is never given back before the end: cameras do not change size.
    """

    def __init__(self, worker: CudaWorker) -> None:
        self._worker = worker
        self._module = worker.drv.module_from_buffer(PTX.read_bytes())
        self._rows = self._module.get_function("resize_rows")
        self._columns = self._module.get_function("resize_columns")
        self._rows.prepare(_ROWS)
        self._columns.prepare(_COLUMNS)
        self._images: dict[int, tuple[Any, Any, int]] = {}  # image 0 or 1 -> page-locked, device, bytes
        self._between: tuple[Any, int] | None = None
        self._tables: dict[Any, list[tuple[Any, Any, int]]] = {}

    def upload(self, index: int, image: Image) -> None:
        """Start copying uint8 image `index`, gray [H, W] or RGB [H, W, 3], to the device."""
        size = image.size
        if index not in self._images or self._images[index][2] < size:
            if index in self._images:
                self._worker.free(*self._images.pop(index)[:2])
            self._images[index] = (self._worker.host_memory(size), self._worker.device_memory(size), size)
        host, device, _ = self._images[index]
        np.copyto(host[:size].reshape(image.shape), image)
        self._worker.drv.memcpy_htod_async(device, host[:size], self._worker.stream)

    def size(self, image: Image, preprocess: Preprocess, spec: InputSpec) -> tuple[tuple[int, int], ToOriginal]:
        """The input's (height, width) for an image, and the map from its pixels to the image's."""
        content = content_size(image.shape[0], image.shape[1], preprocess, spec)
        back = ToOriginal(image.shape[1] / content[1], image.shape[0] / content[0])
        return input_size(content, preprocess, spec), back

    def fill(self, image: Image, preprocess: Preprocess, spec: InputSpec, out: Any) -> None:
        """Make one input in device memory `out` from the uploaded image; see preprocess.prepare."""
        source_height, source_width = image.shape[:2]
        content = content_size(source_height, source_width, preprocess, spec)
        height, width = input_size(content, preprocess, spec)
        channels = 3 if image.ndim == 3 else 1
        gray = preprocess.channels == "gray"
        eight_bits = gray and preprocess.gray == "pil_l_first"
        luma = 2 if eight_bits else int(gray and channels == 3 and preprocess.gray == "luma")
        planes = 1 if luma else channels
        (first_y, weights_y, taps_y), (first_x, weights_x, taps_x) = self._axis(
            source_height, source_width, preprocess, content
        )
        between = self._between_buffer(source_height * content[1] * planes * 4)
        stream = self._worker.stream
        self._rows.prepared_async_call(
            _grid(content[1], source_height), BLOCK, stream,
            int(self._images[spec.image][1]), source_height, source_width, channels, luma,
            first_x, weights_x, taps_x, content[1], int(between),
        )  # fmt: skip
        pil = 2 if eight_bits else int(gray and preprocess.gray == "pil_l")
        self._columns.prepared_async_call(
            _grid(width, height), BLOCK, stream,
            int(between), source_height, content[1], planes, first_y, weights_y, taps_y, content[0], pil,
            1 if gray else 3, height, width, int(out),
        )  # fmt: skip

    def _between_buffer(self, size: int) -> Any:
        if self._between is None or self._between[1] < size:
            if self._between is not None:
                self._worker.stream.synchronize()  # a kernel of this frame may still read it
                self._worker.free(self._between[0])
            self._between = (self._worker.device_memory(size), size)
        return self._between[0]

    def _axis(self, height: int, width: int, preprocess: Preprocess, content: tuple[int, int]) -> list[tuple[int, ...]]:
        """For both axes: the addresses of the table's two arrays, and its taps."""
        key = (height, width, preprocess, content)
        if key not in self._tables:
            if len(self._tables) == MOST_TABLES:  # images of ever new sizes: forget, rather than fill the device
                self._worker.stream.synchronize()
                self._worker.free(*(buffer for pair in self._tables.values() for axis in pair for buffer in axis[:2]))
                self._tables.clear()
            self._tables[key] = [self._upload_axis(axis) for axis in axes(height, width, preprocess, content)]
        return [(int(first), int(weights), taps) for first, weights, taps in self._tables[key]]

    def _upload_axis(self, axis: Axis) -> tuple[Any, Any, int]:
        first, weights = (self._worker.device_memory(array.nbytes) for array in (axis.first, axis.weights))
        self._worker.drv.memcpy_htod(first, axis.first)
        self._worker.drv.memcpy_htod(weights, axis.weights)
        return first, weights, axis.taps


def _grid(width: int, height: int) -> tuple[int, int]:
    return -(-width // BLOCK[0]), -(-height // BLOCK[1])
