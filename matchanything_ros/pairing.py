"""Stamped images of two cameras -> pairs, for a matcher that may be slower than they come. All drops are counted.

Per camera, always: received = paired + waiting + the sum over the reasons of `dropped`.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from enum import Enum
from typing import Any

NANOSECONDS = 1_000_000_000
LATE_IN_A_ROW = 3  # networks reorder two images at most times, and then one that is not late follows


class Drop(str, Enum):
    """Why an image never reached the matcher."""

    UNPAIRED = "unpaired"  # the other camera moved on without an image within the tolerance
    STALE = "stale"  # pushed out of a full queue: the other camera is silent or far behind
    BUSY = "busy"  # its pair was complete, but a newer pair came before the matcher was free
    OUT_OF_ORDER = "out_of_order"  # not newer than the image of the same camera before it
    CLOCK_RESET = "clock_reset"  # left over from before the clock jumped back
    CLEARED = "cleared"  # still waiting when the pairing was cleared (deactivation)


@dataclass(frozen=True)
class Pair:
    """Two images taken at (almost) the same time; stamps in nanoseconds."""

    image0: Any
    image1: Any
    stamp0: int
    stamp1: int


class Pairing:
    """Pairs images by their stamps; holds at most one finished pair, the newest. Not thread-safe.

    tolerance_seconds: largest difference of the stamps of a pair. exact: only equal stamps pair.
    queue_size: images of one camera that wait for the other. jump_seconds: a stamp this much older than the one before
    it is not a late image but a clock that was set back (a bag that starts again): what the old time left is dropped.
    So are several late images in a row, each newer than the one before (a bag shorter than that).

    An image pairs with the one nearest in time. Where the slower camera comes first, the nearest may still be on its
    way: then the pair waits for it, if the faster camera's recent rate promises one that is nearer. `take(wait=False)`
    gives up waiting.
    """

    def __init__(
        self,
        tolerance_seconds: float = 0.05,
        exact: bool = False,
        queue_size: int = 10,
        jump_seconds: float = 1.0,
    ) -> None:
        if not tolerance_seconds >= 0 or queue_size < 1:
            raise ValueError("the tolerance must not be negative and the queue must hold at least one image")
        self._tolerance = 0 if exact else round(tolerance_seconds * NANOSECONDS)
        self._jump = round(jump_seconds * NANOSECONDS)
        self._queue_size = queue_size
        self._queues: tuple[deque[tuple[int, Any]], deque[tuple[int, Any]]] = (deque(), deque())
        self._newest: list[int | None] = [None, None]
        # Stamps of the last images, if they all were late and in order.
        self._late: tuple[list[int], list[int]] = ([], [])
        self._intervals: tuple[deque[int], deque[int]] = (deque(maxlen=8), deque(maxlen=8))
        self._ready: Pair | None = None
        self.received = [0, 0]
        self.paired = 0
        self.dropped: tuple[Counter[Drop], Counter[Drop]] = (Counter(), Counter())
        self.clock_jumps = 0

    @property
    def waiting(self) -> tuple[int, int]:
        """Images of each camera that are held: for a partner, or in the finished pair."""
        finished = int(self._ready is not None)
        return len(self._queues[0]) + finished, len(self._queues[1]) + finished

    @property
    def ready(self) -> bool:
        """Whether `take` has a pair without giving up any wait."""
        return self._ready is not None

    def add(self, camera: int, stamp: int, image: Any) -> None:
        """Add an image of camera 0 or 1. stamp: time of exposure in nanoseconds; image: anything, handed through."""
        self.received[camera] += 1
        newest = self._newest[camera]
        if newest is not None and stamp <= newest:
            late = self._late[camera]
            if late and stamp <= late[-1]:
                late.clear()
            late.append(stamp)
            if newest - stamp < max(self._jump, 1) and len(late) < LATE_IN_A_ROW:
                self.dropped[camera][Drop.OUT_OF_ORDER] += 1
                return
            self._set_back(camera, stamp)
        elif newest is not None:
            self._intervals[camera].append(stamp - newest)
        self._late[camera].clear()
        self._newest[camera] = stamp
        self._queues[camera].append((stamp, image))
        self._match(wait=True)
        if len(self._queues[camera]) > self._queue_size:
            self._drop_first(camera, Drop.STALE)

    def take(self, wait: bool = True) -> Pair | None:
        """The newest finished pair, once. wait=False also finishes pairs that wait for a nearer image."""
        if not wait:
            self._match(wait=False)
        pair, self._ready = self._ready, None
        self.paired += pair is not None
        return pair

    def clear(self) -> None:
        """Drop what waits and forget all stamps; the counters stay."""
        self._discard((None, None), Drop.CLEARED)
        self._newest = [None, None]
        for late in self._late:
            late.clear()

    def _match(self, wait: bool) -> None:
        """Finish every pair that can be finished; drop the images that no image to come can pair with."""
        while self._queues[0] and self._queues[1]:
            early = 0 if self._queues[0][0][0] <= self._queues[1][0][0] else 1
            queue, other = self._queues[early], self._queues[1 - early]
            target = other[0][0]
            # Stamps rise: everything else the other camera has or will send is later still than `target`.
            if target - queue[0][0] > self._tolerance:
                self._drop_first(early, Drop.UNPAIRED)
                continue
            best = min(range(len(queue)), key=lambda index: abs(queue[index][0] - target))
            # A second image of the other camera ends the wait: the nearer one would have come by now.
            last = best == len(queue) - 1 and len(other) == 1
            if wait and last and self._nearer_expected(early, queue[best][0], target):
                return
            for _ in range(best):
                self._drop_first(early, Drop.UNPAIRED)
            first, second = (queue, other) if early == 0 else (other, queue)
            (stamp0, image0), (stamp1, image1) = first.popleft(), second.popleft()
            if self._ready is not None:
                self._drop_ready(Drop.BUSY)
            self._ready = Pair(image0, image1, stamp0, stamp1)

    def _nearer_expected(self, camera: int, stamp: int, target: int) -> bool:
        """Whether this camera's next image, at its recent rate, will be nearer to `target` than `stamp` is."""
        if not self._intervals[camera] or stamp >= target:
            return False
        upcoming = stamp + min(self._intervals[camera])
        return abs(upcoming - target) < target - stamp

    def _set_back(self, camera: int, now: int) -> None:
        """The clock jumped back to `now`: what is later than that belongs to the time before."""
        self.clock_jumps += 1
        # The other camera may already send the new time, a little ahead of this one.
        limits = (now, now + self._jump) if camera == 0 else (now + self._jump, now)
        self._discard(limits, Drop.CLOCK_RESET)
        for index, (newest, limit) in enumerate(zip(self._newest, limits, strict=True)):
            if newest is not None and newest >= limit:
                self._newest[index] = None
            self._intervals[index].clear()

    def _discard(self, limits: tuple[int | None, int | None], reason: Drop) -> None:
        """Drop what waits with a stamp at or after its camera's limit (None: all)."""
        for camera, limit in enumerate(limits):
            queue = self._queues[camera]
            while queue and (limit is None or queue[-1][0] >= limit):
                queue.pop()
                self.dropped[camera][reason] += 1
        pair = self._ready
        if pair is not None and any(
            limit is None or stamp >= limit for stamp, limit in zip((pair.stamp0, pair.stamp1), limits, strict=True)
        ):
            self._drop_ready(reason)

    def _drop_first(self, camera: int, reason: Drop) -> None:
        self._queues[camera].popleft()
        self.dropped[camera][reason] += 1

    def _drop_ready(self, reason: Drop) -> None:
        self._ready = None
        for dropped in self.dropped:
            dropped[reason] += 1
