"""Engines: what runs a bundle's network on arrays. One protocol; TensorRT or ONNX Runtime behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from matchanything_ros.bundle import Bundle
from matchanything_ros.errors import UserError
from matchanything_ros.preprocess import Image, ToOriginal

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


class ImageEngine(Engine, Protocol):
    """An engine that also prepares images, on the GPU."""

    @property
    def takes_images(self) -> bool: ...

    def run_images(
        self, images: tuple[Image, Image], dense: bool = True
    ) -> tuple[dict[str, npt.NDArray[np.float32]], dict[str, ToOriginal], float]:
        """Prepare two uint8 images, gray [H, W] or RGB [H, W, 3], and run the network on them.

        Returns the outputs (without the dense ones unless `dense`), for each input the map from its pixels to the
        image's, and the milliseconds that the preparation took.
        """
        ...


def open_engine(bundle: Bundle, backend: str = "auto", as_exported: bool = False) -> Engine:
    """Open a bundle with a backend of BACKENDS.

    "auto" takes TensorRT where a plan beside the bundle fits this machine, else ONNX Runtime, on CUDA where its build
    and the machine have it. "onnxruntime" leaves TensorRT out, "onnxruntime-cuda" and "tensorrt" insist.
    as_exported: round to fp16 where the network says so also on a CPU that would be faster and more exact without,
    for measuring what fp16 does.
    Raises UserError when the backend is not there or refuses the network.
    """
    if backend not in BACKENDS:
        raise UserError(f"There is no backend '{backend}': use one of {', '.join(BACKENDS)}.")
    if backend in ("auto", "tensorrt"):
        from matchanything_ros.engines.open_plan import open_plan, open_plan_if_fitting

        engine = open_plan(bundle) if backend == "tensorrt" else open_plan_if_fitting(bundle)
        if engine is not None:
            return engine
    from matchanything_ros.engines.onnxruntime import OnnxRuntimeEngine

    device = {"onnxruntime-cuda": "cuda", "onnxruntime-cpu": "cpu"}.get(backend, "auto")
    opened = OnnxRuntimeEngine(bundle, device, as_exported=as_exported)
    if opened.backend == "onnxruntime-cuda" and bundle.manifest.fixed:
        # Also the warm-up. A dynamic network would search kernels for the golden images' size only.
        from matchanything_ros.engines.parity import warn_if_wrong

        warn_if_wrong(opened)
    return opened
