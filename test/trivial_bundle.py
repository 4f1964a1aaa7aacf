"""A bundle that needs no weights and costs almost nothing to run: what surrounds the network is tested with it.

Its matches are a fixed grid in image 0, and the same grid moved by `shift` in image 1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from matchanything_ros.bundle import InputSpec, Manifest, Preprocess, WeightsInfo, sha256_of

GRID = (8, 10)  # rows, columns


def write_trivial_bundle(
    onnx_path: Path,
    size: tuple[int, int] = (120, 160),
    shift: tuple[float, float] = (6.0, -4.0),
    work: int = 0,
) -> Path:
    """Write the bundle to `onnx_path` (NAME.onnx). size: (height, width) of the input; shift: (x, y) in its pixels.

    work: side of a square matrix product that is computed for nothing, for a network that takes its time.
    """
    onnx = pytest.importorskip("onnx", reason="onnx makes the test's network")
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = GRID
    ys = np.linspace(0.2, 0.8, rows) * (size[0] - 1)
    xs = np.linspace(0.2, 0.8, columns) * (size[1] - 1)
    points = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2).astype(np.float32)
    # The collapsed images enter as zeros, so that no runtime can drop the inputs as unused.
    constants = {
        "grid": points,
        "moved": points + np.array(shift, np.float32),
        "falling": np.linspace(0.95, 0.5, len(points), dtype=np.float32),
        "zero": np.zeros(1, np.float32),
    }
    nodes = []
    for index in (0, 1):
        nodes += [
            helper.make_node("ReduceMax", [f"image{index}"], [f"top{index}"], keepdims=0),
            helper.make_node("Mul", [f"top{index}", "zero"], [f"none{index}"]),
        ]
    nodes += [
        helper.make_node("Add", ["grid", "none0"], ["keypoints0"]),
        helper.make_node("Add", ["moved", "none1"], ["keypoints1"]),
        helper.make_node("Add", ["falling", "none0"], ["scores"]),
    ]
    if work:
        constants["square"] = np.array([work, work], np.int64)
        nodes[1:1] = [
            helper.make_node("Expand", ["top0", "square"], ["wide"]),
            helper.make_node("MatMul", ["wide", "wide"], ["product"]),
            helper.make_node("ReduceMax", ["product"], ["heavy0"], keepdims=0),
        ]
        nodes[4].input[0] = "heavy0"
    shapes = {"keypoints0": points.shape, "keypoints1": points.shape, "scores": points.shape[:1]}
    graph = helper.make_graph(
        nodes,
        "trivial",
        [helper.make_tensor_value_info(f"image{k}", TensorProto.FLOAT, [1, 1, *size]) for k in (0, 1)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(onnx_path))
    manifest = Manifest(
        name=onnx_path.stem,
        family="trivial",
        variant="grid",
        precision="fp32",
        weights=(WeightsInfo("none", "0" * 64, "Apache-2.0"),),
        inputs=tuple(InputSpec(f"image{k}", k, size, size, size) for k in (0, 1)),
        preprocess=Preprocess(channels="gray"),
        outputs=("keypoints0", "keypoints1", "scores"),
        max_matches=len(points),
        score_threshold=0.1,
        onnx_sha256=sha256_of(onnx_path),
    )
    onnx_path.with_suffix(".json").write_text(manifest.to_json())
    return onnx_path
