"""A progress line for commands that take a while; silent where nobody watches (logs, pipes)."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Progress:
    """with Progress(total, "replay") as progress: progress.update(done, "3 dropped")"""

    def __init__(self, total: int, label: str) -> None:
        self._total, self._label = max(total, 1), label
        self._start = time.monotonic()
        self._shown = 0.0
        self._on = sys.stderr.isatty()

    def update(self, done: int, note: str = "") -> None:
        """Show `done` of the total, at most ten times a second."""
        now = time.monotonic()
        if not self._on or (now - self._shown < 0.1 and done < self._total):
            return
        self._shown = now
        share = min(done / self._total, 1.0)
        left = (now - self._start) * (1 - share) / share if share > 0 else 0.0
        bar = "#" * round(30 * share)
        line = f"{self._label} [{bar:30}] {done}/{self._total}, {left:.0f} s left {note}"
        sys.stderr.write(f"\r{line:100.100}")
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on:
            sys.stderr.write("\n")
