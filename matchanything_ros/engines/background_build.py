"""Building a missing plan beside a running node: in a process of its own, with lower priority, watched from here."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time

from matchanything_ros.bundle import Bundle
from matchanything_ros.engines.open_plan import look


def plan_is_missing(bundle: Bundle) -> bool:
    """Whether a build would help: no plan fits here, and none fits but for its parity (it would fail again)."""
    choice = look(bundle)[0]
    return choice.plan is None and not choice.bad


class BackgroundBuild:
    """`matchanything build BUNDLE`, running. Used from any thread.

    A process of its own: minutes of TensorRT do not hold up this one's threads, and its memory is given back after it.
    """

    def __init__(self, bundle: Bundle, command: list[str] | None = None) -> None:
        self._name = bundle.onnx.name
        self._start = time.monotonic()
        self._errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            command or [sys.executable, "-m", "matchanything_ros.cli", "build", str(bundle.onnx)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C in the node's terminal: we end it ourselves, once
        )
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, 10)

    @property
    def succeeded(self) -> bool:
        return self._process.poll() == 0

    @property
    def failed(self) -> bool:
        return self._process.poll() not in (None, 0)

    def status(self) -> str:
        """One sentence for the diagnostics."""
        if self.succeeded:
            return f"The TensorRT plan of {self._name} is built."
        if not self.failed:
            return f"Building the TensorRT plan of {self._name} for {time.monotonic() - self._start:.0f} s."
        return f"The TensorRT plan of {self._name} was not built: {self._last_line()}"

    def close(self) -> None:
        """End the build if it still runs; it removes what it has written so far."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._errors.close()

    def _last_line(self) -> str:
        if self._errors.closed:
            return "it was ended."
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1].removeprefix("matchanything: ") if lines else f"exit status {self._process.returncode}."
