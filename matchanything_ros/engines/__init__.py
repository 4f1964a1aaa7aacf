"""Engines: what runs a bundle's network on arrays. One protocol; TensorRT or ONNX Runtime behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from matchanything_ros.bundle import Bundle
from matchanything_ros.errors import UserError

BACKENDS = ("auto", "tensorrt", "onnxruntime", "onnxruntime-cuda", "onnxruntime-cpu")


class Engine(Protocol):
    """A loaded network. Not thread-safe: one thread runs it, and the same thread closes it."""

    bundle: Bundle
    backend: str

    def run(self, inputs: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, npt.NDArray[np.float32]]:
        """Run on float32 inputs [1, C, H, W] by name; returns the outputs by name.

        The arrays returned may be reused by the next call: copy what is kept.
        """
        ...

    def close(self) -> None:
        """Release memory and threads; calling it twice is harmless."""
        ...


def open_engine(bundle: Bundle, backend: str = "auto") -> Engine:
    """Open a bundle with a backend of BACKENDS.

    "auto" takes ONNX Runtime, on CUDA where its build and the machine have it. "onnxruntime" does the same and
    "onnxruntime-cuda" insists. Raises UserError when the backend is not there or refuses the network.
    """
    if backend not in BACKENDS:
        raise UserError(f"There is no backend '{backend}': use one of {', '.join(BACKENDS)}.")
    if backend == "tensorrt":
        raise UserError("This version has no TensorRT engine yet: use the backend onnxruntime.")
    from matchanything_ros.engines.onnxruntime import OnnxRuntimeEngine

    device = {"onnxruntime-cuda": "cuda", "onnxruntime-cpu": "cpu"}.get(backend, "auto")
    return OnnxRuntimeEngine(bundle, device)
