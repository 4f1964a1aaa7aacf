"""A stand-in for a network on a real GPU: TensorRT's double, whose execution is a device-to-device copy.

Everything around it is real: context, stream, copies, preprocessing kernels. Each output is the beginning of an input.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from tensorrt_double import TensorRTDouble, plan_bytes
from tiny_bundle import LARGEST, MATCHES, SIZE, SMALLEST, write_bundle

from matchanything_ros.engines.flavour import Flavour
from matchanything_ros.engines.tensorrt import TensorRTEngine
from matchanything_ros.preprocess import prepare

OUTPUTS = {"keypoints0": (MATCHES, 2), "keypoints1": (MATCHES, 2), "scores": (MATCHES,)}
STEP = 1.001 / 255  # one gray level
SOURCES = {"keypoints0": "image0", "keypoints1": "image1", "scores": "image1"}


def device_copy(inputs: dict[str, Any], outputs: dict[str, Any], stream: int) -> None:
    """The stand-in for execute_async_v3: asynchronous device-to-device copies on the stream."""
    cuda = ctypes.CDLL("libcuda.so.1")
    for name, (address, shape) in outputs.items():
        source, size = inputs[SOURCES[name]][0], 4 * int(np.prod(shape))
        error = cuda.cuMemcpyDtoDAsync_v2(
            ctypes.c_uint64(address), ctypes.c_uint64(source), ctypes.c_size_t(size), ctypes.c_void_p(stream)
        )
        assert error == 0, f"cuMemcpyDtoDAsync failed: {error}"


def expected(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs for these inputs."""
    return {
        name: inputs[SOURCES[name]].reshape(-1)[: int(np.prod(shape))].reshape(shape) for name, shape in OUTPUTS.items()
    }


def open_stand_in(folder: Path, dynamic: bool = False) -> TensorRTEngine:
    """The engine with the stand-in, on the real GPU."""
    bundle = write_bundle(folder, dynamic=dynamic)
    sizes = (SMALLEST, SIZE, LARGEST) if dynamic else (SIZE, SIZE, SIZE)
    shapes = tuple((1, 3, *size) for size in sizes)
    plan = folder / "tiny.stand-in.plan"
    plan.write_bytes(plan_bytes({"image0": shapes, "image1": shapes}, OUTPUTS))
    return TensorRTEngine(bundle, plan, Flavour("tensorrt", "10.3.0", TensorRTDouble(device_copy)))


def pictures(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(seed))
    return [rng.integers(0, 256, shape, np.uint8) for shape in shapes]


def check(engine: Any, images: list[np.ndarray]) -> None:
    outputs, _, _ = engine.run_images((images[0], images[1]))
    specs, preprocess = engine.bundle.manifest.inputs, engine.bundle.manifest.preprocess
    wanted = expected({spec.name: prepare(images[spec.image], preprocess, spec)[0] for spec in specs})
    for name, value in wanted.items():
        np.testing.assert_allclose(outputs[name], value, atol=STEP)
