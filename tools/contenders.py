"""What `bench` compares: a bundle in a backend, or the PyTorch network that the bundle came from. One image pair in,
milliseconds by stage out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from matchanything_ros.bundle import Bundle
from matchanything_ros.engines import open_engine
from matchanything_ros.homography import estimate_homography
from matchanything_ros.preprocess import Image, prepare

STAGES = ("preprocess", "upload", "network", "download", "homography")
Inputs = dict[str, np.ndarray]
Times = dict[str, float]

# How the authors run their network on a GPU: RoMa and DeDoDe under autocast to fp16, ALIKED and ELoFTR (FP16=False in
# the published configuration) in fp32.
AUTOCAST = {"roma", "dedode"}
MODES = ("original", "original-autocast", "original-compiled", "pytorch", "pytorch-graph", "pytorch-compiled")


class Contender(Protocol):
    """name and bundle for the report; run: a network's outputs and the milliseconds of upload, network, download."""

    name: str
    bundle: Bundle

    def run(self, inputs: Inputs) -> tuple[Inputs, Times]: ...

    def close(self) -> None: ...


class BundleContender:
    """A bundle in a backend."""

    def __init__(self, bundle: Bundle, backend: str) -> None:
        self._engine = open_engine(bundle, backend)
        self.bundle = self._engine.bundle  # a plan may take fewer sizes
        self.name = f"{bundle.onnx.stem} {self._engine.backend}"

    def run(self, inputs: Inputs) -> tuple[Inputs, Times]:
        start = time.perf_counter()
        outputs = self._engine.run(inputs)
        whole = 1e3 * (time.perf_counter() - start)
        return outputs, dict(getattr(self._engine, "timings_ms", None) or {"network": whole})

    def close(self) -> None:
        self._engine.close()


class TorchContender:
    """The PyTorch network of a bundle, on the GPU if there is one.

    mode: "original" (in the precision in which its authors run it), "original-autocast" (fp32 weights under autocast to
    fp16) or "pytorch" (in the bundle's precision); with "-graph", captured in a CUDA graph; with "-compiled", through
    torch.compile in its mode for low latency (inductor's own kernels, captured in CUDA graphs where they can be), for
    which the first pair takes minutes. All are our own arrangement of the network, run without ONNX.
    """

    def __init__(self, bundle: Bundle, weights: list[Path], mode: str) -> None:
        import torch

        from matchanything_tools.rebuild import rebuild

        self._torch = torch
        self.bundle = bundle
        self.name = f"{bundle.onnx.stem} {mode}"
        authors = mode.startswith("original")
        self._item = rebuild(bundle, weights, "fp32" if authors else bundle.manifest.precision)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._autocast = mode == "original-autocast" or (mode == "original" and self._item.family in AUTOCAST)
        self._module: Any = self._item.module.eval().to(self._device)
        if mode.endswith("-compiled"):
            self._module = torch.compile(self._module, dynamic=False, mode="reduce-overhead")
        self._captured: tuple[Any, list[Any], Any] | None = None
        self._capture = mode == "pytorch-graph" and self._device.type == "cuda"

    def run(self, inputs: Inputs) -> tuple[Inputs, Times]:
        torch = self._torch
        moments = [time.perf_counter()]
        tensors = [torch.from_numpy(inputs[spec.name]).to(self._device) for spec in self._item.inputs]
        self._tick(moments)
        outputs = self._graph(tensors) if self._capture else self._forward(tensors)
        self._tick(moments)
        arrays = {name: value.float().cpu().numpy() for name, value in zip(self._item.outputs, outputs, strict=True)}
        self._tick(moments)
        stages = (b - a for a, b in itertools.pairwise(moments))
        return arrays, {
            name: 1e3 * spent for name, spent in zip(("upload", "network", "download"), stages, strict=True)
        }

    def close(self) -> None:
        self._module = self._captured = None
        if self._device.type == "cuda":
            self._torch.cuda.empty_cache()

    def _tick(self, moments: list[float]) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()
        moments.append(time.perf_counter())

    def _forward(self, tensors: list[Any]) -> Any:
        torch = self._torch
        # `with device`: constants that a network makes while it runs are made there, too.
        with torch.inference_mode(), self._device, torch.autocast(self._device.type, torch.float16, self._autocast):
            return self._module(*tensors)

    def _graph(self, tensors: list[Any]) -> Any:
        torch = self._torch
        if self._captured is None:
            static = [tensor.clone() for tensor in tensors]
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._forward(static)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = self._forward(static)
            self._captured = graph, static, outputs
        graph, static, outputs = self._captured
        for old, new in zip(static, tensors, strict=True):
            old.copy_(new)
        graph.replay()
        return outputs


def measure(contender: Contender, image0: Image, image1: Image) -> Times:
    """One image pair from pixels to homography: milliseconds of STAGES and of "total"."""
    manifest = contender.bundle.manifest
    start = time.perf_counter()
    prepared = {s.name: prepare((image0, image1)[s.image], manifest.preprocess, s) for s in manifest.inputs}
    ready = time.perf_counter()
    outputs, times = contender.run({name: entry[0] for name, entry in prepared.items()})
    ran = time.perf_counter()
    keep = (outputs["scores"] > 0) & (outputs["scores"] >= manifest.score_threshold)
    points = [prepared[f"image{i}"][1](outputs[f"keypoints{i}"][keep]) for i in (0, 1)]
    sizes = [(image.shape[1], image.shape[0]) for image in (image0, image1)]
    estimate_homography(points[0], points[1], sizes[0], sizes[1])
    done = time.perf_counter()
    return {
        "preprocess": 1e3 * (ready - start),
        **times,
        "homography": 1e3 * (done - ran),
        "total": 1e3 * (done - start),
    }


Opener = Callable[[], Contender]
