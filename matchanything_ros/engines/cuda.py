"""One thread that owns a CUDA context, a stream and memory; everybody else hands it work.

A CUDA context is current in a thread, not in a process: callbacks of ROS run in any thread, so none of them may call
CUDA. The device's primary context is used, which ONNX Runtime and PyTorch in the same process share.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import queue
import threading
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from matchanything_ros.engines.cuda_errors import CudaFailure, explain, is_cuda_error
from matchanything_ros.errors import UserError

Result = TypeVar("Result")
_live: weakref.WeakSet[CudaWorker] = weakref.WeakSet()


class CudaWorker:
    """The thread. `call` runs a function in it with the context current; `close` always pops and releases the context.

    drv: pycuda.driver or its double in tests. Raises UserError where pycuda, the driver or a GPU is missing.
    """

    def __init__(self, index: int = 0, drv: Any = None) -> None:
        if drv is None:
            drv = import_pycuda()
        self.drv = drv
        self.stream: Any = None
        self._index = index
        self._context: Any = None
        self._buffers: list[Any] = []
        self._at_end: list[Callable[[], None]] = []
        self._broken: str | None = None  # a sentence: the exception would keep the images of every call it went through
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # between closing and handing in work: nothing is queued behind the end
        self._closed = False
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._main, args=(started,), name="cuda", daemon=True)
        self._thread.start()
        started.result()
        _live.add(self)

    def call(self, work: Callable[[], Result], doing: str) -> Result:
        """Run `work` in the thread and return its result. doing: what it is, for the sentence of an error."""
        if threading.current_thread() is self._thread:
            return work()
        future: Future[Result] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the CUDA worker is closed")
            if self._broken is not None:
                raise CudaFailure(self._broken, sticky=True)
            self._work.put((work, future))
        try:
            return future.result()
        except Exception as error:
            if not is_cuda_error(error):
                raise
            failure = explain(error, doing)
            if failure.sticky:
                self._broken = str(failure)
            raise failure from error

    def close(self) -> None:
        """Free all memory, pop and release the context, end the thread. Calling it twice is harmless."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._work.put(None)
        self._thread.join()
        _live.discard(self)

    # Below: only inside the thread.

    def at_end(self, release: Callable[[], None]) -> None:
        """Have `release` called in the thread before the context goes, whatever happened."""
        self._at_end.append(release)

    def device_memory(self, size: int) -> Any:
        """Device memory of `size` bytes that lives until `free` or the end."""
        buffer = self.drv.mem_alloc(max(size, 1))
        self._buffers.append(buffer)
        return buffer

    def host_memory(self, size: int) -> Any:
        """Page-locked host memory, uint8 [size]: copies from and to it run beside the CPU."""
        array = self.drv.pagelocked_empty((max(size, 1),), np.uint8)
        self._buffers.append(array.base)
        return array

    def free(self, *buffers: Any) -> None:
        """Free memory from device_memory or host_memory before the end."""
        for buffer in buffers:
            allocation: Any = buffer.base if isinstance(buffer, np.ndarray) else buffer
            self._buffers = [entry for entry in self._buffers if entry is not allocation]
            allocation.free()

    def _main(self, started: Future[None]) -> None:
        try:
            self._open()
        except Exception as error:
            started.set_exception(explain(error, "opening the device") if is_cuda_error(error) else error)
            return
        started.set_result(None)
        try:
            while (item := self._work.get()) is not None:
                work, future = item
                try:
                    future.set_result(work())
                except BaseException as error:  # belongs to the caller
                    # Its traceback must not keep TensorRT's objects alive longer than the context.
                    traceback.clear_frames(error.__traceback__)
                    future.set_exception(error)
                del work, future, item  # what they hold must not outlive the context
        finally:
            self._end()

    def _open(self) -> None:
        self.drv.init()
        context = self.drv.Device(self._index).retain_primary_context()
        try:
            context.push()
        except Exception:
            context.detach()
            raise
        self._context = context
        try:
            self.stream = self.drv.Stream()
        except Exception:
            self._end()
            raise

    def _end(self) -> None:
        # After a sticky error freeing fails as well; the context must be left all the same, or pycuda aborts at exit.
        for release in (*self._at_end, *(buffer.free for buffer in self._buffers)):
            with contextlib.suppress(Exception):
                release()
        self._at_end.clear()
        self._buffers.clear()
        self.stream = None
        context, self._context = self._context, None
        with contextlib.suppress(Exception):
            self.drv.Context.pop()
        with contextlib.suppress(Exception):
            context.detach()


def import_pycuda() -> Any:
    """pycuda.driver, or UserError with what to install."""
    try:
        return importlib.import_module("pycuda.driver")
    except (ImportError, OSError) as error:
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({error})"
        raise UserError(
            f"pycuda {reason}: pip install pycuda (it needs the CUDA toolkit), or use the backend onnxruntime."
        ) from error


@atexit.register
def _close_all() -> None:
    """At exit the context must be off the thread's stack, otherwise pycuda aborts the process."""
    for worker in list(_live):
        worker.close()
