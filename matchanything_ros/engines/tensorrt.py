"""TensorRT: a plan run on the CUDA worker's stream, with memory allocated once for the largest shape of its profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matchanything_ros.bundle import Bundle
from matchanything_ros.engines.buildlog import BuildLog, trt_logger
from matchanything_ros.engines.cuda import CudaWorker
from matchanything_ros.engines.flavour import Flavour
from matchanything_ros.engines.gpu_preprocess import GpuPreprocessor
from matchanything_ros.engines.plan import rebuild_command
from matchanything_ros.errors import UserError
from matchanything_ros.preprocess import Image, ToOriginal

Arrays = dict[str, npt.NDArray[np.float32]]


@dataclasses.dataclass
class _Tensor:
    """One input or output: its memory on both sides, for the largest shape, and the shape of now."""

    name: str
    host: Any
    device: Any
    largest: tuple[int, ...]
    shape: tuple[int, ...] = ()

    def view(self) -> npt.NDArray[np.float32]:
        """The page-locked memory as an array of the present shape."""
        count = int(np.prod(self.shape))
        return np.asarray(self.host[: 4 * count].view(np.float32).reshape(self.shape))


class TensorRTEngine:
    """Runs a plan. See engines.Engine and engines.ImageEngine: it prepares images on the GPU.

    plan: a file that `plan.misfit` has found to fit. drv: pycuda.driver or its double. Raises UserError: pycuda is
    missing, the plan cannot be loaded, or (CudaFailure) the GPU has no memory for it.
    """

    backend = "tensorrt"

    def __init__(self, bundle: Bundle, plan: Path, flavour: Flavour, drv: Any = None) -> None:
        self.bundle = bundle
        self.plan = plan
        self.fallback: str | None = None  # why images are prepared on the CPU, if they are
        self._flavour = flavour
        self._log = BuildLog()
        self._again = rebuild_command(bundle)
        self._inputs: dict[str, _Tensor] = {}
        self._outputs: dict[str, _Tensor] = {}
        self._memory = 0
        self._engine: Any = None
        self._context: Any = None
        self._preprocessor: GpuPreprocessor | None = None
        self._events: tuple[Any, ...] = ()
        self._worker = CudaWorker(drv=drv)
        try:
            self._worker.call(self._open, f"loading {plan.name}")
        except BaseException:
            self.close()
            raise

    @property
    def takes_images(self) -> bool:
        """Whether `run_images` can be used."""
        return self._preprocessor is not None

    @property
    def device_memory(self) -> int:
        """Bytes of activations and scratch memory that TensorRT holds on the device."""
        return self._memory

    def run(self, inputs: Mapping[str, npt.NDArray[np.float32]]) -> Arrays:
        """See Engine.run."""
        return self._worker.call(lambda: self._run(inputs), "running the network")

    def run_images(
        self, images: tuple[Image, Image], dense: bool = True
    ) -> tuple[Arrays, dict[str, ToOriginal], float]:
        """See ImageEngine.run_images; only if `takes_images`."""
        return self._worker.call(lambda: self._run_images(images, dense), "preparing images and running the network")

    def close(self) -> None:
        """See Engine.close."""
        self._worker.close()

    # Everything below runs in the worker's thread.

    def _open(self) -> None:
        self._worker.at_end(self._release)
        trt = self._flavour.trt
        self._logger = trt_logger(trt, self._log)
        runtime = trt.Runtime(self._logger)
        # No name for the bytes: on a Jetson they would take the place of the network's own memory.
        self._engine = runtime.deserialize_cuda_engine(self.plan.read_bytes())
        if self._engine is None:
            raise UserError(
                f"{self._flavour.title} cannot load {self.plan.name} ({self._log.last_error()}): run '{self._again}'."
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise UserError(
                f"The GPU has no room to run {self.plan.name} ({self._log.last_error()}): "
                "close other programs that use it, or build a plan with a smaller --max."
            )
        self._memory = int(self._engine.device_memory_size_v2)
        self._allocate()
        try:
            self._preprocessor = GpuPreprocessor(self._worker)
            self._events = (self._worker.drv.Event(), self._worker.drv.Event())
        except Exception as error:  # a driver that refuses the kernels must not cost the network
            self.fallback = f"the preprocessing kernels cannot be loaded ({str(error).splitlines()[0][:120]})"

    def _allocate(self) -> None:
        trt, engine = self._flavour.trt, self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        manifest, sizes = self.bundle.manifest, []
        if set(inputs) != {spec.name for spec in manifest.inputs} or not set(manifest.outputs) <= set(names):
            raise UserError(f"{self.plan.name} has other inputs or outputs than its bundle: run '{self._again}'.")
        for name in names:
            if engine.get_tensor_dtype(name) != trt.DataType.FLOAT:
                raise UserError(f"{self.plan.name} has an input or output '{name}' that is not float32: export again.")
        for name in inputs:
            shape = tuple(engine.get_tensor_shape(name))
            profile = engine.get_tensor_profile_shape(name, 0) if -1 in shape else (shape, shape, shape)
            least, _, largest = (tuple(entry) for entry in profile)
            self._inputs[name] = self._tensor(name, largest)
            self._set_shape(self._inputs[name], largest)
            spec = manifest.input(name)
            sizes.append(dataclasses.replace(spec, min=least[2:], max=largest[2:]))
        # Images are brought to sizes that the plan takes, which may be fewer than the bundle's.
        self.bundle = dataclasses.replace(self.bundle, manifest=dataclasses.replace(manifest, inputs=tuple(sizes)))
        for name in names:
            if name not in inputs:
                largest = tuple(self._context.get_tensor_shape(name))
                if min(largest) < 0:
                    raise UserError(f"The output '{name}' of {self.plan.name} has no bounded size: export it again.")
                self._outputs[name] = self._tensor(name, largest)
        for tensor in (*self._inputs.values(), *self._outputs.values()):
            self._context.set_tensor_address(tensor.name, int(tensor.device))

    def _tensor(self, name: str, largest: tuple[int, ...]) -> _Tensor:
        size = 4 * int(np.prod(largest))
        return _Tensor(name, self._worker.host_memory(size), self._worker.device_memory(size), largest, ())

    def _set_shape(self, tensor: _Tensor, shape: tuple[int, ...]) -> None:
        if shape == tensor.shape:
            return
        if not self._context.set_input_shape(tensor.name, shape):
            text, most = "x".join(map(str, shape[2:])), "x".join(map(str, tensor.largest[2:]))
            raise UserError(
                f"The plan takes no {tensor.name} of {text} (up to {most}): "
                f"run '{self._again} --min … --opt … --max …' with sizes that include it."
            )
        tensor.shape = shape

    def _run(self, inputs: Mapping[str, npt.NDArray[np.float32]]) -> Arrays:
        if set(inputs) != set(self._inputs):
            raise ValueError(f"inputs {sorted(inputs)} given, {sorted(self._inputs)} wanted")
        for name, array in inputs.items():
            tensor = self._inputs[name]
            self._set_shape(tensor, tuple(array.shape))
            np.copyto(tensor.view(), array)
            count = 4 * array.size
            self._worker.drv.memcpy_htod_async(tensor.device, tensor.host[:count], self._worker.stream)
        self._execute(dense=True)
        self._worker.stream.synchronize()
        return self._results(dense=True)

    def _run_images(self, images: tuple[Image, Image], dense: bool) -> tuple[Arrays, dict[str, ToOriginal], float]:
        assert self._preprocessor is not None, "see takes_images"
        stream, manifest = self._worker.stream, self.bundle.manifest
        start, prepared = self._events
        back: dict[str, ToOriginal] = {}
        start.record(stream)
        for index, image in enumerate(images):
            self._preprocessor.upload(index, image)
        for spec in manifest.inputs:
            tensor = self._inputs[spec.name]
            size, back[spec.name] = self._preprocessor.size(images[spec.image], manifest.preprocess, spec)
            self._set_shape(tensor, (*tensor.largest[:2], *size))  # refuses before anything is written past the end
            self._preprocessor.fill(images[spec.image], manifest.preprocess, spec, tensor.device)
        prepared.record(stream)
        self._execute(dense)
        stream.synchronize()
        return self._results(dense), back, float(start.time_till(prepared))

    def _execute(self, dense: bool) -> None:
        if not self._context.execute_async_v3(self._worker.stream.handle):
            raise UserError(
                f"TensorRT refuses to run {self.plan.name} ({self._log.last_error()}): run '{self._again}'."
            )
        for tensor in self._wanted(dense):
            tensor.shape = tuple(self._context.get_tensor_shape(tensor.name))
            size = 4 * int(np.prod(tensor.shape))
            self._worker.drv.memcpy_dtoh_async(tensor.host[:size], tensor.device, self._worker.stream)

    def _wanted(self, dense: bool) -> list[_Tensor]:
        return [self._outputs[name] for name in self.bundle.manifest.outputs if dense or name not in ("warp", "cert")]

    def _results(self, dense: bool) -> Arrays:
        # Copies: page-locked memory must not be held by others when the context goes.
        return {tensor.name: tensor.view().copy() for tensor in self._wanted(dense)}

    def _release(self) -> None:
        # TensorRT's objects free device memory as they go: they go before the context does.
        self._preprocessor, self._events = None, ()
        self._context = None
        self._engine = None
        self._inputs.clear()
        self._outputs.clear()
