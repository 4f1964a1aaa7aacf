"""Exported ELoFTR: ONNX Runtime gives what PyTorch gives, at fixed and dynamic sizes; TensorRT-RTX builds it."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeded
import torch
from recordings import TOPICS, record
from rosbags.highlevel import AnyReader
from test_eloftr import check_matches, gray

from matchanything_ros import Matcher
from matchanything_ros.bundle import Bundle, load_bundle
from matchanything_ros.cli import main
from matchanything_ros.engines import open_engine
from matchanything_ros.errors import UserError
from matchanything_ros.match_files import read_image
from matchanything_ros.messages import read_correspondences
from matchanything_tools.export import Exportable, export, network
from matchanything_tools.networks.attention import add_function_bodies
from matchanything_tools.networks.rotary import rotate

FIXED, DYNAMIC = {"size": (224, 256)}, {"min": (224, 224), "opt": (224, 288), "max": (1664, 1664)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seeded.save("eloftr", tmp_path_factory.mktemp("weights") / "eloftr.ckpt")


def exportable(weights: Path, **changed: Any) -> Exportable:
    args: dict[str, Any] = dict.fromkeys(("size", "min", "opt", "max", "score_threshold", "pipeline"))
    args |= {"weights": weights, "licence": "none: random", "precision": "fp32", "max_matches": 200}
    return network("eloftr").exportable(argparse.Namespace(**(args | changed)))


def pair(size0: tuple[int, int], size1: tuple[int, int]) -> dict[str, np.ndarray]:
    """Cut-outs of the golden images as inputs, mirrored where these end."""
    images = [
        np.pad(image.numpy()[:, :, 100:, 100:], ((0, 0), (0, 0), (0, 1000), (0, 1000)), "reflect")
        for image in gray("eloftr_832")
    ]
    return {
        f"image{index}": np.ascontiguousarray(image[:, :, :height, :width])
        for index, (image, (height, width)) in enumerate(zip(images, (size0, size1), strict=True))
    }


def check_equal(bundle: Bundle, module: torch.nn.Module, inputs: dict[str, np.ndarray]) -> int:
    """ONNX Runtime against PyTorch in fp32; returns the number of matches compared."""
    engine = open_engine(bundle, "onnxruntime-cpu")
    given = engine.run(inputs)
    engine.close()
    with torch.inference_mode():
        wanted = [value.numpy() for value in module(*map(torch.from_numpy, inputs.values()))]
    assert np.abs(given["scores"] - wanted[2]).max() < 1e-3
    # Those whose score stands apart from its neighbours': equal ones may swap places, and so may what follows.
    gaps = np.abs(np.diff(wanted[2], append=0.0))
    apart = (wanted[2] > 0.02) & (gaps > 1e-3) & (np.roll(gaps, 1) > 1e-3)
    apart[0] = bool(gaps[0] > 1e-3)
    for name, expected in zip(("keypoints0", "keypoints1"), wanted, strict=False):
        assert np.abs(given[name] - expected)[apart].max() < 0.02
    return int(apart.sum())


def build(bundle: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    from matchanything_ros.engines.builder import build_engine

    assert len(memoryview(build_engine(bundle, target="sm_86").data)) > 1_000_000


@pytest.mark.tensorrt
def test_fixed(small_eloftr: tuple[Exportable, Bundle]) -> None:
    item, bundle = small_eloftr
    assert bundle.onnx.with_name("small.onnx.data").stat().st_size > 50e6 > 10 * bundle.onnx.stat().st_size
    assert check_equal(bundle, item.module, pair((224, 256), (224, 256))) >= 5
    build(bundle)


def test_the_bundle_in_match_and_replay(small_eloftr: tuple[Exportable, Bundle], tmp_path: Path) -> None:
    """Nothing there knows this network: both give what the library gives."""
    onnx = small_eloftr[1].onnx
    files = [Path(__file__).parent / "data" / "golden" / f"eloftr_832_gray{index}.png" for index in (0, 1)]
    images = [read_image(file) for file in files]
    with Matcher(onnx, score_threshold=0.01) as matcher:
        expected = matcher.match(*images)
    assert len(expected) > 10
    common = ["--bundle", str(onnx), "--score-threshold", "0.01", "--out"]
    assert main(["match", *map(str, files), *common, str(tmp_path / "match")]) == 0
    with np.load(tmp_path / "match" / "matches.npz") as arrays:
        for name in ("keypoints0", "keypoints1", "scores"):
            np.testing.assert_allclose(arrays[name], getattr(expected, name), atol=1e-3)
    bag = record(tmp_path / "bag", "mcap", [(camera, camera, image) for camera, image in enumerate(images)])
    assert main(["replay", str(bag), "--image0", TOPICS[0], "--image1", TOPICS[1], *common, str(tmp_path / "out")]) == 0
    with AnyReader([tmp_path / "out" / "matches.mcap"]) as reader:
        [points] = [
            reader.deserialize(raw, connection.msgtype)
            for connection, _, raw in reader.messages()
            if connection.topic.endswith("correspondences")
        ]
    replayed, _ = read_correspondences(points)
    for name in ("keypoints0", "keypoints1", "scores"):
        np.testing.assert_allclose(getattr(replayed, name), getattr(expected, name), atol=1e-3)


def test_network_without_its_data(small_eloftr: tuple[Exportable, Bundle], tmp_path: Path) -> None:
    for suffix in (".onnx", ".json"):
        shutil.copy(small_eloftr[1].onnx.with_suffix(suffix), tmp_path)
    with pytest.raises(UserError, match=r"small\.onnx\.data.*missing"):
        load_bundle(tmp_path / "small.onnx")


@pytest.mark.tensorrt
def test_fixed_fp16(weights: Path, tmp_path: Path) -> None:
    """The fp16 graph: weights in fp16, inputs and outputs in fp32, and matches like those of fp32."""
    import onnx

    bundle = export(exportable(weights, precision="fp16", **FIXED), tmp_path / "half.onnx")
    graph = onnx.load(bundle.onnx, load_external_data=False).graph
    types = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert types == {onnx.TensorProto.FLOAT}
    sizes = {kind: sum(np.prod(e.dims) for e in graph.initializer if e.data_type == kind) for kind in (1, 10)}
    assert sizes[onnx.TensorProto.FLOAT16] > 14e6 > 50 * sizes[onnx.TensorProto.FLOAT]  # constants of geometry
    assert not {node.op_type for node in graph.node} & {"NonZero", "ScatterND", "GridSample", "Mod"}
    build(bundle)


@pytest.mark.full
@pytest.mark.tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_dynamic(weights: Path, tmp_path: Path, precision: str) -> None:
    """One file at three sizes, the two images of different ones; the smallest has fewer cells than rows asked for."""
    item = exportable(weights, precision=precision, max_matches=1000, **DYNAMIC)
    bundle = export(item, tmp_path / "dynamic.onnx")
    if precision == "fp32":
        for sizes in (((224, 224), (224, 224)), ((480, 640), (640, 480)), ((224, 1664), (1664, 256))):
            assert check_equal(bundle, item.module, pair(*sizes)) >= 5
    build(bundle)


def test_dynamic_network_equals_the_fixed_one(weights: Path) -> None:
    """Without the demo's padding the two differ in how they upsample and batch, not in what they compute."""
    inputs = [torch.from_numpy(image) for image in pair((224, 256), (224, 256)).values()]
    results = []
    for shape in (FIXED, {"min": (224, 224), "opt": (224, 256), "max": (512, 512)}):
        module = exportable(weights, pipeline="evaluation", **shape).module
        assert module.position_scale == 832 / 256
        with torch.inference_mode():
            results.append(module.eval()(*inputs))
    assert (results[0][2] - results[1][2]).abs().max() < 1e-4  # conditioning, see test_eloftr.py
    assert torch.equal(results[0][0][:3], results[1][0][:3])


@pytest.mark.full
@pytest.mark.parametrize("name", ["eloftr_640x480_mask", "eloftr_832"])
def test_golden_through_onnx_runtime(name: str, weights: Path, tmp_path: Path) -> None:
    """The whole way: exported at 480x640 with the demo's padding, or at 832x832, run, compared with the original."""
    images = gray(name)
    bundle = export(exportable(weights, max_matches=1024, size=tuple(images[0].shape[2:])), tmp_path / "demo.onnx")
    engine = open_engine(bundle, "onnxruntime-cpu")
    outputs = engine.run({f"image{index}": image.numpy() for index, image in enumerate(images)})
    engine.close()
    check_matches(name, [outputs[output] for output in ("keypoints0", "keypoints1", "scores")])


def test_rotation() -> None:
    """Pairs of channels turn like complex numbers: in PyTorch, in ONNX Runtime's operator, and in its function body."""
    import onnx.inliner
    import onnxruntime

    class Rotate(torch.nn.Module):
        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return rotate(x, cos, sin)

    generator = torch.Generator().manual_seed(8)
    x, angles = torch.randn(2, 7, 16, generator=generator), torch.randn(7, 8, generator=generator)
    inputs = (x, angles.cos(), angles.sin())
    turned = torch.view_as_complex(x.unflatten(2, (8, 2))) * torch.polar(torch.ones(()), angles)
    expected = torch.view_as_real(turned).flatten(2)
    assert torch.allclose(rotate(*inputs), expected, atol=1e-6)
    program = torch.onnx.export(Rotate(), inputs, dynamo=True, opset_version=20, verbose=False)
    assert program is not None
    add_function_bodies(program.model)
    model = program.model_proto
    assert [node.op_type for node in model.graph.node] == ["RotaryEmbedding"]
    feed = {value.name: tensor.numpy() for value, tensor in zip(model.graph.input, inputs, strict=True)}
    for form in (model, onnx.inliner.inline_local_functions(model)):
        [result] = onnxruntime.InferenceSession(form.SerializeToString()).run(None, feed)
        assert np.abs(result - expected.numpy()).max() < 1e-6


def test_impossible_sizes(weights: Path) -> None:
    for count in (0, -3):
        with pytest.raises(UserError, match=f"--max-matches is {count}"):
            exportable(weights, max_matches=count)
    with pytest.raises(UserError, match="multiples of 32 from 224 to 1664"):
        exportable(weights, size=(480, 650))
    with pytest.raises(UserError, match="multiples of 32 from 224 to 1664"):
        exportable(weights, size=(192, 640))
    with pytest.raises(UserError, match="--pipeline evaluation"):
        exportable(weights, pipeline="demo", **DYNAMIC)
    with pytest.raises(UserError, match="--min <= --opt <= --max"):
        exportable(weights, **(DYNAMIC | {"opt": (1696 - 32, 224), "max": (640, 640)}))
