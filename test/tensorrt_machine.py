"""A machine with a GPU and TensorRT, all doubles, and a tiny bundle with a plan on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pycuda_double import PycudaDouble, WrongCall
from tensorrt_double import TensorRTDouble, plan_bytes
from tiny_bundle import LARGEST, MATCHES, SIZE, SMALLEST, expected, write_bundle

from matchanything_ros.engines.flavour import Flavour
from matchanything_ros.engines.tensorrt import TensorRTEngine


class Machine:
    """A machine with the doubles in it, and a bundle with a plan, for images up to `most` if it is dynamic."""

    def __init__(self, folder: Path, dynamic: bool = False, most: tuple[int, int] = LARGEST, **settings: Any) -> None:
        self.cuda = PycudaDouble()
        self.trt = TensorRTDouble(self._enqueue, self.cuda.check)
        self.bundle = write_bundle(folder, dynamic=dynamic, **settings)
        channels = 1 if settings.get("channels") == "gray" else 3
        sizes = (SMALLEST, SIZE, most) if dynamic else (SIZE, SIZE, SIZE)
        shapes = tuple((1, channels, *size) for size in sizes)
        self.plan = folder / "tiny.gpu.plan"
        outputs = {"keypoints0": (MATCHES, 2), "keypoints1": (MATCHES, 2), "scores": (MATCHES,)}
        self.plan.write_bytes(plan_bytes({"image0": shapes, "image1": shapes}, outputs))

    def open(self) -> TensorRTEngine:
        return TensorRTEngine(self.bundle, self.plan, Flavour("tensorrt", "10.3.0", self.trt), drv=self.cuda)

    def _enqueue(self, inputs: Any, outputs: Any, stream: int) -> None:
        def work() -> None:
            arrays = {}
            for name, (address, shape) in inputs.items():
                arrays[name] = self.cuda.find(address, 4 * int(np.prod(shape))).view(np.float32).reshape(shape)
            for name, value in expected(arrays["image0"], arrays["image1"]).items():
                address, shape = outputs[name]
                self.cuda.find(address, 4 * int(np.prod(shape)))[:] = (
                    value.astype(np.float32).view(np.uint8).reshape(-1)
                )

        if stream not in self.cuda.streams:
            raise WrongCall("not a stream")
        self.cuda.streams[stream].work.append(work)


def inputs_of(size: tuple[int, int], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(seed))
    return {name: rng.random((1, 3, *size), np.float32) for name in ("image0", "image1")}


def assert_same(outputs: dict[str, np.ndarray], inputs: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    for name, wanted in expected(inputs["image0"], inputs["image1"]).items():
        np.testing.assert_allclose(outputs[name], wanted, atol=tolerance)
