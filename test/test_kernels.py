"""The preprocessing kernels, compiled for the CPU, against `preprocess.prepare`: equal within 1/255 in every mode."""

from __future__ import annotations

import numpy as np
import pytest
from compiled_kernels import compiled_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from pycuda_double import PycudaDouble

from matchanything_ros.bundle import InputSpec, Preprocess
from matchanything_ros.engines.cuda import CudaWorker
from matchanything_ros.engines.gpu_preprocess import PTX, GpuPreprocessor
from matchanything_ros.preprocess import prepare

pytestmark = pytest.mark.skipif(compiled_kernels() is None, reason="no C++ compiler to run the kernels on the CPU")

INTERPOLATIONS = ("area", "linear", "bicubic", "bicubic_antialias", "lanczos")
PIL_MODES = [*(("pil_l", name) for name in ("area", "bicubic_antialias", "lanczos")), ("pil_l_first", "lanczos")]
PIL_MODES += [("pil_l_first", "bicubic_antialias")]
# One 8-bit step is the promise; without the truncation of pil_l, rounding of float32 is all that may differ.
ROUNDING = 2e-5


def on_device(image: np.ndarray, preprocess: Preprocess, spec: InputSpec) -> np.ndarray:
    """What the kernels make of an image, with memory that held something else before."""
    cuda = PycudaDouble()
    worker = CudaWorker(drv=cuda)
    channels = 3 if preprocess.channels == "rgb" else 1

    def work() -> np.ndarray:
        gpu = GpuPreprocessor(worker)
        size, back = gpu.size(image, preprocess, spec)
        assert back == prepare(image, preprocess, spec)[1]
        out = worker.device_memory(4 * channels * size[0] * size[1])
        out.array[:] = 255
        gpu.upload(spec.image, image)
        gpu.fill(image, preprocess, spec, out)
        worker.stream.synchronize()
        return out.array.view(np.float32).reshape(1, channels, *size).copy()

    try:
        return worker.call(work, "preparing")
    finally:
        worker.close()


def difference(image: np.ndarray, preprocess: Preprocess, spec: InputSpec) -> float:
    wanted, given_ = prepare(image, preprocess, spec)[0], on_device(image, preprocess, spec)
    assert given_.shape == wanted.shape
    return float(np.abs(given_ - wanted).max())


def picture(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    shape = (height, width, 3) if channels == 3 else (height, width)
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("target", [(24, 40), (60, 50), (150, 170)], ids=["smaller", "mixed", "larger"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_interpolation(interpolation: str, target: tuple[int, int], channels: int) -> None:
    spec = InputSpec("image1", 1, target, target, target)
    image = picture(50, 90, channels)
    assert difference(image, Preprocess(interpolation=interpolation), spec) < ROUNDING
    assert difference(image, Preprocess(channels="gray", interpolation=interpolation), spec) < ROUNDING
    assert difference(image, Preprocess(interpolation=interpolation, long_side_limit=60), spec) < ROUNDING


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("gray, interpolation", PIL_MODES)
@pytest.mark.parametrize("target", [(40, 64), (110, 120)], ids=["smaller", "mixed"])
def test_pil_gray_within_one_step(gray: str, interpolation: str, target: tuple[int, int], channels: int) -> None:
    """A value at a whole number (or a half) may fall to the next lower one: one step, and for few pixels."""
    spec = InputSpec("image0", 0, target, target, target)
    preprocess = Preprocess(channels="gray", gray=gray, interpolation=interpolation)
    image = picture(97, 131, channels)
    wanted, given_ = prepare(image, preprocess, spec)[0], on_device(image, preprocess, spec)
    off = np.abs(given_ - wanted)
    assert off.max() <= 1.001 / 255
    assert (off > ROUNDING).mean() < 0.01


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(2, 130),
    width=st.integers(2, 130),
    interpolation=st.sampled_from(INTERPOLATIONS),
    resize=st.sampled_from(["fit", "fit_down"]),
    channels=st.sampled_from([1, 3]),
    gray=st.booleans(),
)
def test_fitted_and_padded(height: int, width: int, interpolation: str, resize: str, channels: int, gray: bool) -> None:
    """Any image size into a dynamic shape: the size, the padding and every pixel."""
    spec = InputSpec("image0", 0, (32, 32), (64, 96), (96, 96))
    preprocess = Preprocess(channels="gray" if gray else "rgb", resize=resize, interpolation=interpolation, divisor=32)
    assert difference(picture(height, width, channels, height), preprocess, spec) < ROUNDING


def test_ptx_is_made_from_the_source() -> None:
    """If this fails: python -m matchanything_tools.compile_kernels, see there."""
    from matchanything_tools.compile_kernels import source_line

    text = PTX.read_text(encoding="utf-8")
    assert text.startswith(source_line())
    assert ".visible .entry resize_rows(" in text and ".visible .entry resize_columns(" in text
    version = next(line for line in text.splitlines() if line.startswith(".version")).split()[1]
    assert tuple(map(int, version.split("."))) <= (7, 8), "a driver for CUDA 12.6 (JetPack 6) must accept it"
