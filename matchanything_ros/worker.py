"""The one thread that owns the matcher: images go in from any thread, pairs are worked on here, the newest first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from matchanything_ros.matcher import Matcher
from matchanything_ros.pairing import Pair, Pairing

PATIENCE = 0.1  # seconds without a new image after which no nearer partner is waited for


class Worker:
    """Opens a matcher in a thread of its own, hands it every pair there, and closes it there.

    Engines are not thread-safe, and a CUDA context belongs to one thread: so the whole life of the matcher is here.
    work(matcher, pair) must not raise. The constructor returns when the matcher is open, or raises what opening raised.
    """

    def __init__(
        self, open_matcher: Callable[[], Matcher], pairing: Pairing, work: Callable[[Matcher, Pair], None]
    ) -> None:
        self.pairing = pairing
        self.lock = threading.Condition()  # held whenever the pairing is touched
        self.matcher: Matcher | None = None
        self._open_matcher, self._work = open_matcher, work
        self._error: BaseException | None = None
        self._opened = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="matcher", daemon=True)
        self._thread.start()
        self._opened.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error

    def add(self, camera: int, stamp: int, image: Any) -> None:
        """See Pairing.add."""
        with self.lock:
            self.pairing.add(camera, stamp, image)
            self.lock.notify()

    def clear(self) -> None:
        """See Pairing.clear."""
        with self.lock:
            self.pairing.clear()

    def stop(self) -> None:
        """Finish the pair in work, close the matcher, end the thread."""
        with self.lock:
            self._stopping = True
            self.lock.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            self.matcher = self._open_matcher()
        except BaseException as error:
            self._error = error
            return
        finally:
            self._opened.set()
        try:
            while (pair := self._next()) is not None:
                self._work(self.matcher, pair)
        finally:
            self.matcher.close()

    def _next(self) -> Pair | None:
        with self.lock:
            while not self._stopping:
                pair = self.pairing.take()
                if pair is None and not self.lock.wait(PATIENCE if any(self.pairing.waiting) else None):
                    pair = self.pairing.take(wait=False)
                if pair is not None:
                    return pair
        return None
