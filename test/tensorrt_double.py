"""A double of the TensorRT module that refuses wrong calls; the network itself is any function of device memory.

It has the classes and methods of TensorRT 10 that the engine uses, and no others: a test compares the names.
Refused with WrongCall: unknown tensor names, an execution before every shape and address is set, a call without a
current context. Refused as TensorRT does it, with False or None: shapes outside of the profile, a damaged plan.
A plan of the double is JSON, see `plan_bytes`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from enum import Enum
from types import SimpleNamespace
from typing import Any

from pycuda_double import WrongCall

Shape = tuple[int, ...]
# (inputs, outputs, stream handle): name -> (address, shape)
Enqueue = Callable[[dict[str, tuple[int, Shape]], dict[str, tuple[int, Shape]], int], None]


def plan_bytes(inputs: dict[str, tuple[Shape, Shape, Shape]], outputs: dict[str, Shape], **more: Any) -> bytes:
    """A plan: the inputs' smallest, best and largest shapes; the outputs', where -1 takes the side of image0."""
    return json.dumps({"inputs": inputs, "outputs": outputs, "dtype": "FLOAT", **more}).encode()


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class DataType(Enum):
    FLOAT = 0
    HALF = 1


class Severity(Enum):
    ERROR = 1
    WARNING = 2


class ILogger:
    def __init__(self) -> None:
        pass

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class TensorRTDouble:
    """Put this where the module `tensorrt` would be. `check` is called by everything that needs a context."""

    TensorIOMode, DataType, ILogger = TensorIOMode, DataType, ILogger
    __version__ = "10.3.0"

    def __init__(self, enqueue: Enqueue, check: Callable[[str], None] = lambda name: None) -> None:
        self.enqueue, self.check = enqueue, check
        self.fail: dict[str, str] = {}  # call -> TensorRT's error message
        self.alive: list[str] = []
        double = self

        class Runtime(_Runtime):
            def __init__(self, logger: ILogger) -> None:
                super().__init__(double, logger)

        self.Runtime = Runtime

    def failing(self, name: str, logger: ILogger) -> bool:
        self.check(name)
        if name not in self.fail:
            return False
        logger.log(Severity.ERROR, self.fail.pop(name))
        return True


class _Runtime:
    def __init__(self, trt: TensorRTDouble, logger: ILogger) -> None:
        trt.check("Runtime")
        self._trt, self._logger = trt, logger

    def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
        if self._trt.failing("deserialize_cuda_engine", self._logger):
            return None
        try:
            return ICudaEngine(self._trt, self._logger, json.loads(plan))
        except ValueError:
            self._logger.log(Severity.ERROR, "Magic tag does not match")
            return None


class _Counted:
    """Something whose destructor calls CUDA: it must go while the context is current."""

    def __init__(self, trt: TensorRTDouble) -> None:
        self._trt = trt
        trt.alive.append(type(self).__name__)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # TensorRT's destructors do not raise; WrongCall does
            self._trt.check(f"~{type(self).__name__}")
        self._trt.alive.remove(type(self).__name__)


class ICudaEngine(_Counted):
    def __init__(self, trt: TensorRTDouble, logger: ILogger, plan: dict[str, Any]) -> None:
        super().__init__(trt)
        self._logger, self._plan = logger, plan
        self._names = [*plan["inputs"], *plan["outputs"]]
        self.num_io_tensors = len(self._names)
        self.device_memory_size_v2 = 4096

    def _known(self, name: str) -> str:
        if name not in self._names:
            raise WrongCall(f"unknown tensor {name}")
        return name

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if self._known(name) in self._plan["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._plan["dtype"]] if self._known(name) else DataType.FLOAT

    def get_tensor_shape(self, name: str) -> Shape:
        if self._known(name) in self._plan["outputs"]:
            return tuple(self._plan["outputs"][name])
        least, _, most = self._plan["inputs"][name]
        return tuple(a if a == b else -1 for a, b in zip(least, most, strict=True))

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[Shape]:
        if self._known(name) not in self._plan["inputs"] or profile != 0:
            raise WrongCall("a profile shape of an output, or of another profile")
        return [tuple(shape) for shape in self._plan["inputs"][name]]

    def create_execution_context(self) -> IExecutionContext | None:
        if self._trt.failing("create_execution_context", self._logger):
            return None
        return IExecutionContext(self._trt, self)


class IExecutionContext(_Counted):
    def __init__(self, trt: TensorRTDouble, engine: ICudaEngine) -> None:
        super().__init__(trt)
        self._engine, self._shapes, self._addresses = engine, {}, {}
        for name in engine._plan["inputs"]:
            if -1 not in engine.get_tensor_shape(name):
                self._shapes[name] = engine.get_tensor_shape(name)

    _shapes: dict[str, Shape]
    _addresses: dict[str, int]

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        self._trt.check("set_input_shape")
        if self._engine.get_tensor_mode(name) is not TensorIOMode.INPUT:
            raise WrongCall(f"the shape of the output {name} cannot be set")
        least, _, most = self._engine._plan["inputs"][name]
        if len(shape) != len(least) or any(not a <= side <= b for a, side, b in zip(least, shape, most, strict=True)):
            self._engine._logger.log(Severity.ERROR, f"setInputShape: {name} {shape} is outside of the profile")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> Shape:
        if self._engine.get_tensor_mode(name) is TensorIOMode.INPUT:
            return self._shapes.get(name, self._engine.get_tensor_shape(name))
        shape = self._engine.get_tensor_shape(name)
        if len(self._shapes) < len(self._engine._plan["inputs"]):
            return shape
        return tuple(self._shapes["image0"][axis] if side == -1 else side for axis, side in enumerate(shape))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._trt.check("set_tensor_address")
        if not isinstance(address, int):
            raise WrongCall("an address must be an int")
        self._addresses[self._engine._known(name)] = address
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._trt.failing("execute_async_v3", self._engine._logger):
            return False
        inputs, outputs = {}, {}
        for name in self._engine._names:
            if name not in self._addresses:
                raise WrongCall(f"execution without an address for {name}")
            shape = self.get_tensor_shape(name)
            if -1 in shape:
                raise WrongCall(f"execution without a shape for {name}")
            side = inputs if self._engine.get_tensor_mode(name) is TensorIOMode.INPUT else outputs
            side[name] = (self._addresses[name], shape)
        self._trt.enqueue(inputs, outputs, stream_handle)
        return True


RECORDED = SimpleNamespace(Runtime=_Runtime, ICudaEngine=ICudaEngine, IExecutionContext=IExecutionContext)
