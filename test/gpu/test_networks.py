"""Every kind of network in fp16 through ONNX Runtime CUDA, against the same bundle on the CPU.

A kernel of a library can be wrong for one kind of layer only: cuDNN 9.19 was, for 1x9 convolutions with bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from matchanything_ros import cli
from matchanything_ros.bundle import Bundle, load_bundle
from matchanything_ros.engines import open_engine
from matchanything_ros.engines.parity import compare
from matchanything_tools.validate import golden_images, network_inputs

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "test" / "data" / "weights"


@pytest.fixture(scope="module", autouse=True)
def cuda(gpu: object) -> Iterator[None]:
    ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    yield


def check(bundle: Bundle) -> None:
    """Against the CPU with the same roundings: the order of sums differs, and with it who is at the end of a top-K."""
    inputs, _ = network_inputs(bundle, *golden_images(bundle))
    results = []
    for backend in ("onnxruntime-cpu", "onnxruntime-cuda"):
        engine = open_engine(bundle, backend, as_exported=True)
        results.append({name: array.copy() for name, array in engine.run(inputs).items()})
        engine.close()
    parity = compare(results[0], results[1], bundle.manifest.score_threshold, bundle.manifest.precision)
    assert parity.passed, parity.summary


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("name", ["aliked-t16", "aliked-n16", "kestrel"])
def test_with_real_weights(name: str, precision: str, tmp_path: Path) -> None:
    family, _, variant = name.partition("-")
    weights = WEIGHTS / f"{name}.pth" if variant else ROOT / "matchanything_ros" / "bundles" / "kestrel.pt"
    words = ["export", family, "--weights", str(weights), "--size", "480x640", "--precision", precision]
    words += ["--variant", variant, "--keypoints", "1000"] if variant else []
    assert cli.main([*words, "--out", str(tmp_path / "network.onnx")]) == 0
    check(load_bundle(tmp_path / "network.onnx"))


def test_dedode(small_dedode: Bundle) -> None:
    check(small_dedode)


def test_eloftr(small_eloftr: tuple[object, Bundle]) -> None:
    check(small_eloftr[1])


def test_roma(shallow_roma: Bundle) -> None:
    check(shallow_roma)
