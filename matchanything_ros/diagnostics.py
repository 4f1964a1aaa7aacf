"""What the node reports about itself every second: rates, latencies by stage, drops by reason, and one sentence."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from matchanything_ros.homography import Status
from matchanything_ros.pairing import Drop, Pairing
from matchanything_ros.worker import Worker

WINDOW = 200  # pairs over which percentiles are taken
SPAN = 5.0  # seconds over which rates are taken, and without an image after which a camera is silent: some are slow


class Statistics:
    """Latencies and outcomes of the pairs that were matched; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: dict[str, deque[float]] = {}
        self._outcomes: Counter[str] = Counter()
        self._failure = ""
        self._looks: deque[tuple[float, tuple[int, ...]]] = deque()

    def record(self, timings_ms: Mapping[str, float], status: Status, failure: str = "") -> None:
        """Add a pair: milliseconds by stage, its status, and the sentence that says why it could not be matched."""
        with self._lock:
            for stage, value in timings_ms.items():
                self._stages.setdefault(stage, deque(maxlen=WINDOW)).append(value)
            self._outcomes[status.name] += 1
            self._failure = failure

    @property
    def failure(self) -> str:
        """Why the last pair could not be matched; empty if it could."""
        with self._lock:
            return self._failure

    @property
    def published(self) -> int:
        with self._lock:
            return sum(self._outcomes.values())

    def percentiles(self) -> dict[str, tuple[float, float]]:
        """Median and 95th percentile of each stage over the last pairs, milliseconds."""
        with self._lock:
            return {
                stage: (float(np.percentile(values, 50)), float(np.percentile(values, 95)))
                for stage, values in self._stages.items()
            }

    def rates(self, now: float, received: list[int]) -> tuple[float, ...]:
        """Images of camera 0 and 1, and pairs answered, per second over the last SPAN seconds, or since the first look
        if that was later; and how many seconds that is. To be called again and again, about every second."""
        counts = (*received, self.published)
        self._looks.append((now, counts))
        while len(self._looks) > 2 and now - self._looks[1][0] >= SPAN:
            self._looks.popleft()
        then, before = self._looks[0]
        seconds = now - then
        return (*((count - old) / max(seconds, 1e-9) for count, old in zip(counts, before, strict=True)), seconds)

    def start_over(self) -> None:
        """Forget the rates and the last failure: what comes next is another stretch of time."""
        self._looks.clear()
        with self._lock:
            self._failure = ""

    def values(self, pairing: Pairing) -> dict[str, str]:
        """All counters as the key-value pairs of a diagnostic status."""
        with self._lock:
            outcomes = sorted(self._outcomes.items())
        out = {f"pairs {name}": str(count) for name, count in outcomes}
        out["pairs published"] = str(self.published)
        for camera in (0, 1):
            out[f"image{camera} received"] = str(pairing.received[camera])
            for reason in Drop:
                out[f"image{camera} dropped {reason.value}"] = str(pairing.dropped[camera][reason])
        out["clock jumps"] = str(pairing.clock_jumps)
        for stage, (median, high) in self.percentiles().items():
            out[f"{stage} p50 [ms]"], out[f"{stage} p95 [ms]"] = f"{median:.2f}", f"{high:.2f}"
        return out


class Level(IntEnum):
    """The levels of diagnostic_msgs/DiagnosticStatus."""

    OK = 0
    WARN = 1
    ERROR = 2


@dataclass(frozen=True)
class Report:
    """One diagnostic status: how bad, one sentence, the matcher's name, and everything that was counted."""

    level: Level
    sentence: str
    matcher: str
    values: dict[str, str]


def describe(
    state: str, problem: str, worker: Worker | None, statistics: Statistics, inputs: Any | None, build: Any | None
) -> Report:
    """What to report now.

    state: of the lifecycle; problem: why it is not another one, or empty; inputs: the ImageInputs while active; build:
    the BackgroundBuild, if there is one.
    """
    level, sentence, matcher, values = Level.OK, state, "", {"state": state}
    if worker is not None and worker.matcher is not None:
        bundle = worker.matcher.bundle
        matcher = bundle.manifest.name
        values |= {"bundle": str(bundle.onnx), "bundle sha256": bundle.manifest.onnx_sha256}
        values |= {"backend": worker.matcher.engine.backend}
        with worker.lock:
            values |= statistics.values(worker.pairing)
            received = list(worker.pairing.received)
            idle = worker.pairing.paired == statistics.published  # a slow network is no lack of pairs
        if inputs is None:
            statistics.start_over()
        else:
            *rates, seconds = statistics.rates(time.monotonic(), received)
            for name, rate in zip(("image0", "image1", "pairs"), rates, strict=True):
                values[f"{name} rate [Hz]"] = f"{rate:.2f}"
            values |= {f"image{camera} lost on the way": str(inputs.lost[camera]) for camera in (0, 1)}
            sentence = f"{rates[2]:.1f} pairs a second" if seconds else sentence
            silent = [inputs.silence(camera) for camera in (0, 1) if rates[camera] == 0]
            if seconds >= SPAN and (silent or (rates[2] == 0 and idle)):
                level = Level.WARN
                sentence = " ".join(silent) or (
                    "Images come but none pair: compare their stamps with the tolerance; "
                    "if one camera's come much later than the other's, raise queue_size."
                )
            elif statistics.failure:  # of the last pair, while pairs come
                level, sentence = Level.ERROR, statistics.failure
    if build is not None:
        values["TensorRT plan"] = build.status()
        if build.failed and level != Level.ERROR:
            level, sentence = Level.WARN, build.status()
    if problem:
        level, sentence = Level.ERROR, problem
    return Report(level, sentence, matcher, values)
