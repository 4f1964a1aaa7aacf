"""A bundle with a network of four nodes, for tests of everything around networks; made with ONNX alone, no torch.

Match i lies at (8 + 4 i, 6 + 3 i) in image 0 and there plus 20 times the mean of image 1 in image 1, so that a result
from the wrong image or the wrong pixels is another result. Scores fall from 0.9.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from matchanything_ros.bundle import Bundle, InputSpec, Manifest, Preprocess, WeightsInfo, load_bundle, sha256_of
from matchanything_ros.preprocess import prepare

MATCHES = 12
SIZE = (48, 64)
SMALLEST, LARGEST = (32, 32), (96, 128)
DOMAINS = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
BASE = np.stack([8 + 4 * np.arange(MATCHES), 6 + 3 * np.arange(MATCHES)], 1).astype(np.float32)
SCORES = np.linspace(0.9, 0.3, MATCHES, dtype=np.float32)


def expected(image0: np.ndarray, image1: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs for inputs [1, C, H, W]."""
    shift = lambda image: np.float32(20) * image.mean(dtype=np.float64)  # noqa: E731
    one = np.ones_like(BASE)
    scores = (SCORES + 0 * image0.mean()).astype(np.float32)
    return {"keypoints0": BASE + 0 * shift(image0) * one, "keypoints1": BASE + shift(image1) * one, "scores": scores}


def write_bundle(
    folder: Path, name: str = "tiny", dynamic: bool = False, operator: str = "", **preprocess: object
) -> Bundle:
    """Write the bundle. operator: put a node of this type, named /bad/OPERATOR, before the outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = Preprocess(**{"divisor": 16, "resize": "fit" if dynamic else "stretch", **preprocess})  # type: ignore[arg-type]
    channels = 3 if settings.channels == "rgb" else 1
    path = folder / f"{name}.onnx"
    onnx.save(_network(channels, dynamic, operator), path)
    least, most = (SMALLEST, LARGEST) if dynamic else (SIZE, SIZE)
    specs = tuple(InputSpec(f"image{i}", i, least, SIZE, most) for i in (0, 1))
    rng = np.random.Generator(np.random.PCG64(3))
    images = [rng.integers(0, 256, (60, 80, 3), np.uint8), rng.integers(0, 200, (50, 90, 3), np.uint8)]
    inputs = [prepare(images[spec.image], settings, spec)[0] for spec in specs]
    golden = path.with_suffix(".golden.npz")
    np.savez_compressed(golden, image0=images[0], image1=images[1], **expected(*inputs))
    manifest = Manifest(
        name=name,
        family="tiny",
        variant="test",
        precision="fp32",
        weights=(WeightsInfo("none", "0" * 64, "Apache-2.0"),),
        inputs=specs,
        preprocess=settings,
        outputs=("keypoints0", "keypoints1", "scores"),
        max_matches=MATCHES,
        score_threshold=0.2,
        onnx_sha256=sha256_of(path),
        golden_sha256=sha256_of(golden),
    )
    path.with_suffix(".json").write_text(manifest.to_json(), encoding="utf-8")
    return load_bundle(path)


def _network(channels: int, dynamic: bool, operator: str) -> onnx.ModelProto:
    constants = {"base": BASE, "scores_": SCORES, "twenty": np.float32(20), "zero": np.float32(0)}
    nodes = []
    for index, factor in ((0, "zero"), (1, "twenty")):
        nodes += [
            helper.make_node("ReduceMean", [f"image{index}"], [f"mean{index}"], f"/mean{index}", keepdims=0),
            helper.make_node("Mul", [f"mean{index}", factor], [f"shift{index}"], f"/mul{index}"),
            helper.make_node("Add", ["base", f"shift{index}"], [f"keypoints{index}"], f"/add{index}"),
        ]
    before = "shift0"
    if operator:
        nodes.append(helper.make_node(operator, ["shift0"], ["bad"], f"/bad/{operator}", domain=_domain(operator)))
        before = "bad"
    nodes.append(helper.make_node("Add", ["scores_", before], ["scores"], "/scores"))
    side = ("height", "width") if dynamic else SIZE
    float32 = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(f"image{i}", float32, [1, channels, *side]) for i in (0, 1)],
        [helper.make_tensor_value_info(f"keypoints{i}", float32, [MATCHES, 2]) for i in (0, 1)]
        + [helper.make_tensor_value_info("scores", float32, [MATCHES])],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=DOMAINS, ir_version=10)


def _domain(operator: str) -> str:
    return "com.microsoft" if operator == "FusedThing" else ""
