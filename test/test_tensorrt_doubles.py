"""The doubles of TensorRT and pycuda refuse wrong calls, and have what the real ones have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorrt_double
from pycuda_double import PycudaDouble, WrongCall
from tensorrt_double import TensorRTDouble, plan_bytes


def test_the_double_refuses_what_it_says() -> None:
    """A double that lets everything pass proves nothing."""
    cuda = PycudaDouble()
    wrong: list[Callable[[], Any]] = [
        lambda: cuda.mem_alloc(4),
        lambda: cuda.Device(0),
        lambda: cuda.Context.pop(),
    ]
    for call in wrong:
        with pytest.raises(WrongCall):
            call()
    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    context.push()
    memory, stream = cuda.mem_alloc(8), cuda.Stream()
    with pytest.raises(WrongCall, match="page-locked"):
        cuda.memcpy_htod_async(memory, np.zeros(8, np.uint8), stream)
    with pytest.raises(WrongCall, match="allocation of 8"):
        cuda.memcpy_htod_async(memory, cuda.pagelocked_empty((9,), np.uint8), stream)
    with pytest.raises(WrongCall, match="still pushed"):
        context.detach()
    shapes = {"image0": ((1, 3, 4, 4), (1, 3, 4, 4), (1, 3, 8, 8))}
    trt = TensorRTDouble(lambda *_: None, cuda.check)
    engine = trt.Runtime(trt.ILogger()).deserialize_cuda_engine(plan_bytes(shapes, {"out": (2,)}))
    assert engine is not None
    run = engine.create_execution_context()
    assert run is not None
    with pytest.raises(WrongCall, match="unknown tensor"):
        run.set_tensor_address("image7", 0)
    with pytest.raises(WrongCall, match="without an address"):
        run.execute_async_v3(stream.handle)
    for name in ("image0", "out"):
        run.set_tensor_address(name, int(memory))
    with pytest.raises(WrongCall, match="without a shape"):
        run.execute_async_v3(stream.handle)
    del run, engine
    cuda.Context.pop()


def test_tensorrt_double_is_like_the_real_one() -> None:
    """Every method and property of the double exists under the same name in TensorRT's own module."""
    real = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    for name, double in vars(tensorrt_double.RECORDED).items():
        members = {member for member in vars(double) if not member.startswith("_")}
        assert members <= set(dir(getattr(real, name))), name
    assert {"num_io_tensors", "device_memory_size_v2"} <= set(dir(real.ICudaEngine))
    assert real.TensorIOMode.INPUT.name == "INPUT" and real.DataType.FLOAT.name == "FLOAT"
