"""ONNX Runtime on CUDA before, beside and after the engine of pycuda, in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from gpu.stand_in import check, open_stand_in, pictures

Report = Callable[[str], None]


def test_onnx_runtime_on_cuda_in_the_same_process(drv: Any, tmp_path: Path, report: Report) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    weight = np.random.Generator(np.random.PCG64(1)).random((8, 3, 3, 3), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        "conv",
        [helper.make_tensor_value_info("x", float32, [1, 3, 48, 64])],
        [helper.make_tensor_value_info("y", float32, [1, 8, 48, 64])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()
    x = np.random.Generator(np.random.PCG64(2)).random((1, 3, 48, 64), np.float32)
    wanted = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]

    def session() -> Any:
        made = ort.InferenceSession(model, providers=["CUDAExecutionProvider"])
        assert made.get_providers()[0] == "CUDAExecutionProvider"
        return made

    def compare(which: Any) -> None:
        np.testing.assert_allclose(which.run(None, {"x": x})[0], wanted, atol=5e-2)  # TF32 is on by default there

    before = session()
    compare(before)
    engine = open_stand_in(tmp_path)
    beside = session()
    stop = threading.Event()
    failures: list[BaseException] = []

    def keep_running() -> None:
        try:
            while not stop.is_set():
                compare(beside)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=keep_running)
    thread.start()
    for seed in range(200):
        check(engine, pictures(seed, (60, 80, 3), (90, 50)))
    stop.set()
    thread.join()
    engine.close()
    for which in (before, beside, session()):
        compare(which)  # closing the engine took nothing away
    engine = open_stand_in(tmp_path)
    check(engine, pictures(1, (60, 80, 3), (90, 50)))
    engine.close()
    assert failures == []
    report(f"onnxruntime {ort.__version__} before, beside and after the engine, all results right")
