"""A double of pycuda.driver: host memory instead of a GPU, every call recorded, every wrong call refused.

Refused with WrongCall: a call without a current context or in another thread than its owner's, copies past the end
of memory or from host memory that is not page-locked, freed memory, another context's stream. Work on a stream happens
only when the stream is synchronised: whoever reads a result earlier reads zeros. Kernels run as C++ on the CPU.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from compiled_kernels import compiled_kernels


class WrongCall(BaseException):
    """The code under test uses the API wrongly. Not an Exception: nothing may catch it on its way."""


def _error(name: str) -> type[Exception]:
    return type(name, (Exception,), {"__module__": "pycuda._driver"})


class Memory:
    """Device memory: host memory that only this double touches."""

    def __init__(self, cuda: PycudaDouble, size: int) -> None:
        self.cuda, self.array = cuda, np.zeros(size, np.uint8)
        self.freed = False
        cuda.memory.append(self)

    def __int__(self) -> int:
        if self.freed:
            raise WrongCall("address of freed device memory")
        return int(self.array.ctypes.data)

    __index__ = __int__

    def free(self) -> None:
        self.cuda.check("free")
        if self.freed:
            raise WrongCall("device memory freed twice")
        self.freed = True
        self.cuda.memory.remove(self)


class PageLocked:
    """Page-locked host memory; arrays over it have it as their base."""

    def __init__(self, cuda: PycudaDouble, size: int) -> None:
        self.cuda, self.array, self.freed = cuda, np.zeros(size, np.uint8), False
        self.__array_interface__ = self.array.__array_interface__
        cuda.page_locked.append(self)

    def free(self) -> None:
        self.cuda.check("free page-locked")
        if self.freed:
            raise WrongCall("page-locked memory freed twice")
        self.freed = True
        self.cuda.page_locked.remove(self)


class Stream:
    def __init__(self, cuda: PycudaDouble) -> None:
        cuda.check("Stream")
        self.cuda, self.work = cuda, []
        self.handle = id(self)
        cuda.streams[self.handle] = self

    work: list[Callable[[], None]]

    def synchronize(self) -> None:
        self.cuda.check("synchronize")
        work, self.work = self.work, []
        for item in work:
            item()


class Context:
    def __init__(self, cuda: PycudaDouble) -> None:
        self.cuda, self.thread, self.detached = cuda, threading.get_ident(), False
        cuda.retained += 1

    def push(self) -> None:
        self.cuda.record("push")
        self.cuda.stack().append(self)

    def detach(self) -> None:
        self.cuda.record("detach")
        if self.detached or threading.get_ident() != self.thread:
            raise WrongCall("detach twice, or in another thread")
        if self in self.cuda.stack():
            raise WrongCall("detach of a context that is still pushed: pycuda aborts at exit")
        self.detached = True
        self.cuda.retained -= 1


class PycudaDouble:
    """Put this where pycuda.driver would be.

    fail: name of a call -> the exception that it raises, once. lost: what every call raises from now on, as CUDA does
    after an illegal memory access; only leaving the context still works (seen on a real GPU).
    """

    Error, LogicError, MemoryError, LaunchError = (
        _error(name) for name in ("Error", "LogicError", "MemoryError", "LaunchError")
    )

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: dict[str, Exception] = {}
        self.lost: Exception | None = None
        self.memory: list[Memory] = []
        self.page_locked: list[PageLocked] = []
        self.streams: dict[int, Stream] = {}
        self.retained = 0
        self.initialised = False
        self._stacks = threading.local()
        double = self

        class ContextCalls:
            @staticmethod
            def pop() -> None:
                double.record("pop")
                if not double.stack():
                    raise WrongCall("pop without a context")
                double.stack().pop()

        class Device:
            def __init__(self, index: int) -> None:
                if not double.initialised:
                    raise WrongCall("Device before init")
                self.index = index

            def retain_primary_context(self) -> Context:
                double.record("retain_primary_context")
                return Context(double)

        class Event:
            def record(self, stream: Stream) -> None:
                double.check("Event.record")

            def time_till(self, other: Any) -> float:
                double.check("Event.time_till")
                return 1.0

        self.Context, self.Device, self.Event = ContextCalls, Device, Event
        self.Stream = lambda: Stream(double)

    def stack(self) -> list[Context]:
        """The contexts pushed in this thread."""
        if not hasattr(self._stacks, "contexts"):
            self._stacks.contexts = []
        return self._stacks.contexts

    def record(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            raise self.fail.pop(name)
        if self.lost is not None and name not in ("init", "retain_primary_context", "push", "pop", "detach"):
            raise type(self.lost)(*self.lost.args)  # a new one: a traceback would keep what it went through

    def check(self, name: str) -> None:
        """Record a call that needs a current context."""
        if not self.stack():
            raise WrongCall(f"{name} in a thread without a context")
        self.record(name)

    def init(self) -> None:
        self.initialised = True
        self.record("init")

    def mem_alloc(self, size: int) -> Memory:
        self.check("mem_alloc")
        return Memory(self, size)

    def pagelocked_empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        self.check("pagelocked_empty")
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return (
            np.asarray(PageLocked(self, size)).view(dtype).reshape(shape)
            if dtype != np.uint8
            else np.asarray(PageLocked(self, size))
        )

    def memcpy_htod(self, device: Memory, host: np.ndarray) -> None:
        self.check("memcpy_htod")
        self._copy(self._device(device, host.nbytes), host)

    def memcpy_htod_async(self, device: Memory, host: np.ndarray, stream: Stream) -> None:
        self.check("memcpy_htod_async")
        self._page_locked(host)
        target = self._device(device, host.nbytes)
        self._on(stream, lambda: self._copy(target, host))

    def memcpy_dtoh_async(self, host: np.ndarray, device: Memory, stream: Stream) -> None:
        self.check("memcpy_dtoh_async")
        self._page_locked(host)
        source = self._device(device, host.nbytes)
        self._on(stream, lambda: self._copy(host.reshape(-1).view(np.uint8), source))

    def module_from_buffer(self, code: bytes) -> Any:
        self.check("module_from_buffer")
        if b".visible .entry" not in code:
            raise WrongCall("module_from_buffer wants PTX")
        library = compiled_kernels()
        if library is None:
            raise self.LogicError("module_from_buffer failed: no C++ compiler for the double")
        return type("Module", (), {"get_function": lambda _, name: Kernel(self, library, name)})()

    def find(self, address: int, size: int) -> np.ndarray:
        """The bytes behind an address that was given out; past the end is refused."""
        for memory in self.memory:
            offset = address - int(memory)
            if 0 <= offset < len(memory.array):
                if offset + size > len(memory.array):
                    raise WrongCall(f"{size} bytes at an allocation of {len(memory.array)}")
                return memory.array[offset : offset + size]
        raise WrongCall("an address that is no device memory")

    def _device(self, memory: Memory, size: int) -> np.ndarray:
        return self.find(int(memory), size)

    @staticmethod
    def _copy(target: np.ndarray, source: np.ndarray) -> None:
        target[: source.nbytes] = np.ascontiguousarray(source).reshape(-1).view(np.uint8)

    @staticmethod
    def _page_locked(array: np.ndarray) -> None:
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        if not isinstance(base, PageLocked) or base.freed:
            raise WrongCall("an asynchronous copy with host memory that is not page-locked")

    def _on(self, stream: Stream, work: Callable[[], None]) -> None:
        if self.streams.get(getattr(stream, "handle", 0)) is not stream:
            raise WrongCall("not a stream of this context")
        stream.work.append(work)


class Kernel:
    """A kernel of kernels.cu that runs on the CPU when its stream is synchronised."""

    def __init__(self, cuda: PycudaDouble, library: ctypes.CDLL, name: str) -> None:
        self.cuda, self.function = cuda, getattr(library, f"launch_{name}")
        self.types: str = ""

    def prepare(self, types: str) -> None:
        self.types = types

    def prepared_async_call(
        self, grid: tuple[int, int], block: tuple[int, int, int], stream: Any, *values: Any
    ) -> None:
        self.cuda.check("kernel")
        if len(values) != len(self.types):
            raise WrongCall(f"{len(values)} arguments for a kernel of {len(self.types)}")
        sizes = [ctypes.c_int(side) for side in (*grid, block[0], block[1])]
        arguments: list[Any] = []
        for kind, value in zip(self.types, values, strict=True):
            if type(value) is not int:
                raise WrongCall(f"a kernel's argument of type {kind} is {value!r}")
            if kind == "P":
                self.cuda.find(value, 1)
            arguments.append(ctypes.c_void_p(value) if kind == "P" else ctypes.c_int(value))
        self.cuda._on(stream, lambda: self.function(*sizes, *arguments))
