"""ONNX Runtime, on CUDA or on the CPU, with IO binding: device memory is allocated once for each shape seen."""

from __future__ import annotations

import os
import platform
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from matchanything_ros.bundle import Bundle
from matchanything_ros.engines.widen import widen
from matchanything_ros.errors import UserError

Arrays = dict[str, npt.NDArray[np.float32]]
WITHOUT_HALF = ("x86_64", "AMD64")  # machines on which ONNX Runtime has no fp16 kernels (on 64-bit ARM it has)


class OnnxRuntimeEngine:
    """Runs a bundle with ONNX Runtime.

    device: "auto" (CUDA where it works), "cuda" or "cpu". On CUDA a network of fixed shape is captured in a CUDA graph
    when all of its nodes run there. Precision is what the graph says: fp32 products are not rounded to TF32 unless the
    environment has NVIDIA_TF32_OVERRIDE=1, which PyTorch's convolutions do by default; without it cuDNN may choose
    Fourier transforms, which take gigabytes. A CPU without fp16 arithmetic computes in fp32 instead, which is faster;
    as_exported forbids that.

    Raises UserError where ONNX Runtime does: no CUDA, a graph that it refuses, no memory left.
    """

    def __init__(
        self, bundle: Bundle, device: str = "auto", cuda_graph: bool | None = None, as_exported: bool = False
    ) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise UserError("ONNX Runtime is not installed: pip install onnxruntime (or onnxruntime-gpu).") from error
        self._ort = ort
        self.bundle = bundle
        has_cuda = "CUDAExecutionProvider" in ort.get_available_providers()
        if device == "cuda" and not has_cuda:
            raise UserError(
                "This ONNX Runtime has no CUDA provider: pip install onnxruntime-gpu, or use onnxruntime-cpu."
            )
        self.timings_ms: dict[str, float] = {}  # of the last run on CUDA: upload, network, download
        self._bound: dict[str, Any] = {}
        self._as_exported = as_exported
        self._binding: Any = None
        self._session: Any = None
        self._searches = False  # whether the next run searches the kernels of a CUDA graph
        if device != "cpu" and has_cuda:
            wants_graph = bundle.manifest.fixed if cuda_graph is None else cuda_graph
            self._session = self._open_cuda(wants_graph, required=device == "cuda")
        if self._session is None:
            self._session = self._open(["CPUExecutionProvider"])
        on_cuda = self._session.get_providers()[0] == "CUDAExecutionProvider"
        self.backend = "onnxruntime-cuda" if on_cuda else "onnxruntime-cpu"
        self._outputs = [output.name for output in self._session.get_outputs()]
        expected = {spec.name for spec in bundle.manifest.inputs}
        found = {entry.name for entry in self._session.get_inputs()}
        if expected != found or not set(bundle.manifest.outputs) <= set(self._outputs):
            raise UserError(f"{bundle.onnx} has other inputs or outputs than its manifest: export the bundle again.")

    def run(self, inputs: Mapping[str, npt.NDArray[np.float32]]) -> Arrays:
        """See Engine.run."""
        if self._session is None:
            raise RuntimeError("the engine is closed")
        if self.backend == "onnxruntime-cpu":
            return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))
        start = time.perf_counter()
        self._bind(inputs)
        for name, array in inputs.items():
            self._bound[name].update_inplace(np.ascontiguousarray(array, np.float32))
        uploaded = time.perf_counter()
        try:
            if self._searches:
                self._search()
            self._session.run_with_iobinding(self._binding)  # returns when the device is done
        except Exception as error:  # ONNX Runtime raises many types, all of its own
            raise UserError(self._advice(error)) from error
        ran = time.perf_counter()
        outputs = dict(zip(self._outputs, self._binding.copy_outputs_to_cpu(), strict=True))
        done = time.perf_counter()
        moments = {"upload": uploaded - start, "network": ran - uploaded, "download": done - ran}
        self.timings_ms = {stage: 1e3 * seconds for stage, seconds in moments.items()}
        return outputs

    def close(self) -> None:
        """See Engine.close."""
        self._binding, self._session = None, None
        self._bound.clear()

    def _search(self) -> None:
        """A run outside the CUDA graph, in which cuDNN tries kernels and whose memory is given back: a graph would keep
        it (measured for RoMa: 3310 instead of 1930 MiB)."""
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", "-1")
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")
        self._session.run_with_iobinding(self._binding, options)
        self._searches = False

    def _advice(self, error: Exception) -> str:
        sentence = f"ONNX Runtime cannot run {self.bundle.onnx}: {_first_line(error)}"
        if "alloc" not in sentence.lower() and "out of memory" not in sentence.lower():
            return sentence
        if self.bundle.manifest.precision == "fp32":
            return f"{sentence}. Export it with --precision fp16, or allow TF32: NVIDIA_TF32_OVERRIDE=1."
        return f"{sentence}. Close what else uses the GPU, or export a smaller --size."

    def _bind(self, inputs: Mapping[str, npt.NDArray[np.float32]]) -> None:
        shapes = {name: tuple(array.shape) for name, array in inputs.items()}
        if self._binding is not None and shapes == {name: tuple(v.shape()) for name, v in self._bound.items()}:
            return
        self._binding = self._session.io_binding()
        for name, array in inputs.items():
            self._bound[name] = self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cuda", 0)
            self._binding.bind_ortvalue_input(name, self._bound[name])
        fixed = self.bundle.manifest.fixed
        for output in self._session.get_outputs():
            if fixed and all(isinstance(side, int) for side in output.shape):
                value = self._ort.OrtValue.ortvalue_from_shape_and_type(output.shape, np.float32, "cuda", 0)
                self._binding.bind_ortvalue_output(output.name, value)
            else:
                self._binding.bind_output(output.name, "cuda", 0)

    def _open_cuda(self, wants_graph: bool, required: bool) -> Any:
        # In fp16, use_tf32=0 would bar cuDNN from every tensor-core kernel (measured: 5 times slower). So it is allowed
        # there and forbidden one level below, where NVIDIA's libraries keep products of fp32 in fp32; unless something
        # else in this process, such as PyTorch, has loaded them before.
        half = self.bundle.manifest.precision == "fp16"
        rounding = forbid_tf32() == "1"
        common = {
            "device_id": "0",
            "cudnn_conv_algo_search": "EXHAUSTIVE",
            "use_tf32": "1" if half or rounding else "0",
            "enable_skip_layer_norm_strict_mode": "1",  # otherwise fused layer norms sum in fp16 and overflow
            "prefer_nhwc": "1",
            "fuse_conv_bias": "1",  # otherwise a slow kernel of cuDNN adds each bias (measured: a third of the time)
            "arena_extend_strategy": "kSameAsRequested",  # the default doubles: gigabytes for a network of megabytes
        }
        reason: Exception | None = None
        for graph in (True, False) if wants_graph else (False,):
            options = {**common, "enable_cuda_graph": "1" if graph else "0"}
            try:
                # A graph is captured only where no node falls back to the CPU; otherwise creation fails and we go on.
                providers: list[Any] = [("CUDAExecutionProvider", options)]
                session = self._open(providers if graph else [*providers, "CPUExecutionProvider"])
            except UserError as error:
                reason = error
                continue
            if session.get_providers()[0] == "CUDAExecutionProvider":
                self._searches = graph
                return session
        if required:
            raise UserError(
                "ONNX Runtime cannot use CUDA here"
                + (f" ({reason})" if reason else "")
                + ": check the driver, CUDA and cuDNN with 'matchanything doctor'."
            )
        return None

    def _open(self, providers: list[Any]) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        threads = os.environ.get("OMP_NUM_THREADS", "")
        if threads.isdigit():
            options.intra_op_num_threads = int(threads)
        on_cpu = providers == ["CPUExecutionProvider"]
        # MatMul + Add as one Gemm first writes the bias to the whole output with a slow kernel; Add alone is faster.
        unwanted = [] if on_cpu else ["MatMulAddFusion"]
        # Numbers below 1e-38 are handled by microcode there, a hundred times slower. (ONNX Runtime then makes them 0 in
        # this thread for good, also outside of the network.)
        if on_cpu:
            options.add_session_config_entry("session.set_denormal_as_zero", "1")
        model: bytes | None = None
        half = self.bundle.manifest.precision == "fp16"
        if on_cpu and half and not self._as_exported and platform.machine() in WITHOUT_HALF:
            model = widen(self.bundle.onnx.read_bytes())
        try:
            return self._ort.InferenceSession(
                model or str(self.bundle.onnx),
                options,
                providers=providers,
                disabled_optimizers=unwanted,
            )
        except Exception as error:  # ONNX Runtime raises many types, all of its own
            raise UserError(f"ONNX Runtime refuses {self.bundle.onnx}: {_first_line(error)}") from error


def forbid_tf32() -> str:
    """Set NVIDIA_TF32_OVERRIDE=0 for this process unless the environment has a value; the value. A RuntimeWarning if
    PyTorch has loaded NVIDIA's libraries, which read it only then: RoMa's Gaussian process needs fp32 (roma.md)."""
    if "NVIDIA_TF32_OVERRIDE" not in os.environ and "torch" in sys.modules:
        warnings.warn(
            "PyTorch was imported before a network was opened on CUDA, so that ONNX Runtime may round fp32 to TF32: "
            "start this process with NVIDIA_TF32_OVERRIDE=0, or open the network first.",
            RuntimeWarning,
            stacklevel=2,
        )
    return os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
