"""Long work in a library that holds up Python's signal handlers, made interruptible."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def interruptible(work: Callable[[], Any], stop: threading.Event) -> Any:
    """Run `work` in a thread, so that SIGINT and SIGTERM are seen while TensorRT is busy; they set `stop`."""
    result: list[Any] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            result.append(work())
        except BaseException as error:  # handed to the caller
            failure.append(error)

    thread = threading.Thread(target=body, name="tensorrt-build", daemon=True)
    with _signals_set(stop):
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
    if failure:
        raise failure[0]
    return result[0]


@contextmanager
def _signals_set(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop` meanwhile; a second one does what it did before. Only the main thread may do so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handler(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
