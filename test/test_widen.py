"""fp16 networks on the CPU: read as fp32, weight by weight, and left alone where that cannot be done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from matchanything_ros.bundle import BUNDLES, load_bundle
from matchanything_ros.engines import onnxruntime as engine_module
from matchanything_ros.engines import open_engine
from matchanything_ros.engines.widen import widen

KESTREL = BUNDLES / "kestrel.onnx"


def small_model() -> onnx.ModelProto:
    """fp16 in every place where it can be: a weight, a Constant, a Cast, the type of a value, a branch."""
    weight = numpy_helper.from_array(np.array([[1.5, -2.0]], np.float16), "weight")
    half = helper.make_tensor_value_info("product", TensorProto.FLOAT16, ["rows", 2])
    constant = numpy_helper.from_array(np.array(-0.25, np.float16))
    branch = helper.make_graph(
        [helper.make_node("Add", ["product", "c"], ["sum"])],
        "branch",
        [],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT16, None)],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
            helper.make_node("MatMul", ["half", "weight"], ["product"]),
            helper.make_node("Constant", [], ["c"], value=constant),
            helper.make_node("If", ["flag"], ["chosen"], then_branch=branch, else_branch=branch),
            helper.make_node("Cast", ["chosen"], ["y"], to=TensorProto.FLOAT),
        ],
        "small",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 1]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 2])],
        [weight],
        value_info=[half],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def test_every_fp16_becomes_fp32() -> None:
    widened = widen(small_model().SerializeToString())
    assert widened is not None
    model = onnx.load_from_string(widened)
    onnx.checker.check_model(model, full_check=True)
    assert "FLOAT16" not in str(model) and "data_type: 10" not in str(model) and "elem_type: 10" not in str(model)
    session = onnxruntime.InferenceSession(widened, providers=["CPUExecutionProvider"])
    got = session.run(None, {"x": np.array([[3.0], [1e-6]], np.float32), "flag": np.array(True)})[0]
    assert np.allclose(got, [[4.25, -6.25], [-0.25 + 1.5e-6, -0.25 - 2e-6]], rtol=0, atol=1e-7)  # fp16 has no 2e-6


def test_weights_of_the_shipped_network_keep_their_values() -> None:
    raw = KESTREL.read_bytes()
    before, after = onnx.load_from_string(raw), onnx.load_from_string(widen(raw) or b"")
    assert [node.op_type for node in before.graph.node] == [node.op_type for node in after.graph.node]
    count = 0
    for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True):
        assert (old.name, old.dims) == (new.name, new.dims)
        assert new.data_type == (TensorProto.FLOAT if old.data_type == TensorProto.FLOAT16 else old.data_type)
        assert np.array_equal(numpy_helper.to_array(old), numpy_helper.to_array(new))
        count += old.data_type == TensorProto.FLOAT16
    assert count > 50


def test_weights_in_a_file_of_their_own_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    onnx.save(small_model(), path, save_as_external_data=True, size_threshold=0)
    assert widen(path.read_bytes()) is None


def test_measuring_fp16_means_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """validate and evaluate ask for the network as exported: its rounding must be there, the faster fp32 must not."""
    monkeypatch.setattr(engine_module.platform, "machine", lambda: "x86_64")
    bundle = load_bundle("kestrel")
    inputs = {f"image{i}": np.random.default_rng(i).random((1, 1, 64, 96), np.float32) for i in (0, 1)}
    session = onnxruntime.InferenceSession(str(bundle.onnx), providers=["CPUExecutionProvider"])
    plain = dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True))
    faster, as_exported = [open_engine(bundle, "onnxruntime-cpu", exact).run(inputs) for exact in (False, True)]
    assert np.array_equal(as_exported["scores"], plain["scores"])
    assert not np.array_equal(faster["scores"], plain["scores"])
