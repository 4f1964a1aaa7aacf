"""Recorded images through what the node uses: Pairing, answer, messages."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from matchanything_ros import messages
from matchanything_ros.answer import Answer, answer
from matchanything_ros.bags import CORRESPONDENCES, HOMOGRAPHY, McapRecording
from matchanything_ros.errors import UserError
from matchanything_ros.matcher import Matcher
from matchanything_ros.pairing import Pair, Pairing
from matchanything_ros.report import PairRecord
from matchanything_ros.worker import PATIENCE

NODE = "/match_node"
PICTURES = 3  # of the best and of the worst pairs


@dataclass(order=True)
class Kept:
    """A pair that may end as a picture in the report; ordered by `rank`."""

    rank: tuple[float, int]
    answer: Answer = field(compare=False)
    caption: str = field(compare=False)


class BagPlayer:
    """Plays stamped image messages through pairing, matcher and homography; keeps what reports need."""

    def __init__(self, matcher: Matcher, pairing: Pairing, recording: McapRecording, threshold_px: float) -> None:
        self.matcher, self.pairing, self.recording, self.threshold_px = matcher, pairing, recording, threshold_px
        self.records: list[PairRecord] = []
        self.drops: list[tuple[float, int]] = []
        self.errors: dict[str, int] = {}
        self.best: list[Kept] = []
        self.worst: list[Kept] = []
        self._start: int | None = None

    @property
    def dropped(self) -> int:
        """Images that reached no match, of both cameras."""
        return sum(sum(counter.values()) for counter in self.pairing.dropped)

    def play(self, stream: Iterator[tuple[Any, int, Any]], topics: tuple[str, str], live: bool) -> Iterator[int]:
        """Play (connection, time of receipt [ns], message); yields how many were played.

        live: the recording's clock runs on while a pair is matched (for as long as that took here), so the pairing
        drops what a live node would drop. Nothing waits for that clock: a machine faster than the recording is done
        sooner.
        """
        free = 0  # when the matcher is free again, on the recording's clock [ns]
        received = 0
        for count, (connection, now, message) in enumerate(stream):
            late = received + round(PATIENCE * 1e9)  # then the node's worker waits no longer for a nearer partner
            if 0 < received < late < now and (not live or free <= late):
                free = self._serve(self.pairing.take(wait=False), late)
            received = now
            self._start = received if self._start is None else self._start
            if live and free < received and self.pairing.ready:
                free = self._serve(self.pairing.take(), free)
            stamp = messages.stamp_of(message.header)
            self.pairing.add(topics.index(connection.topic), stamp, (received, message))
            if not live or free <= received:
                free = max(free, received) if live else received
                free = self._serve(self.pairing.take(), free)
            self._count_drops(received)
            yield count + 1
        free = self._serve(self.pairing.take(wait=False), max(free, received))
        self.pairing.clear()  # what still waits for a partner never gets one
        self._count_drops(received)

    def check(self, tolerance: float) -> None:
        """Raise UserError if nothing was matched: an empty report helps nobody."""
        if not self.records:
            counts = " and ".join(str(count) for count in self.pairing.received)
            raise UserError(
                f"No image pair: of {counts} images none has a partner with a stamp within {tolerance} s; check the "
                "header stamps or raise --approximate-sync-tolerance."
            )
        if sum(self.errors.values()) == len(self.records):
            raise UserError(f"No pair could be matched: {next(iter(self.errors))}")

    def _serve(self, pair: Pair | None, start: int) -> int:
        """Match a pair that the matcher takes at time `start` [ns]; returns when it is done."""
        if pair is None:
            return start
        (received0, message0), (received1, message1) = pair.image0, pair.image1
        begin = time.perf_counter()
        answered = answer(self.matcher, message0, message1, threshold_px=self.threshold_px)
        busy = round(1e9 * (time.perf_counter() - begin))
        arrival = max(received0, received1)
        first = start if self._start is None else self._start
        record = PairRecord.of(
            (arrival - first) * 1e-9,
            (pair.stamp0, pair.stamp1),
            answered.estimate,
            (max(start, arrival) - arrival + busy) * 1e-6,
            answered.timings_ms,
        )
        self.records.append(record)
        self._record(message0, message1, answered, arrival)
        if answered.failure:
            self.errors[answered.failure] = self.errors.get(answered.failure, 0) + 1
        else:
            self._keep(record, answered)
        return start + busy

    def _record(self, message0: Any, message1: Any, answered: Answer, time_ns: int) -> None:
        recording = self.recording
        headers = [recording.header(message.header) for message in (message0, message1)]
        arguments = (*headers, answered.matches, answered.estimate, self.matcher.bundle)
        types = recording.store.types
        recording.write(
            f"{NODE}/correspondences", messages.correspondences(types[CORRESPONDENCES], *arguments), time_ns
        )
        recording.write(f"{NODE}/homography", messages.homography(types[HOMOGRAPHY], *arguments), time_ns)

    def _keep(self, record: PairRecord, answered: Answer) -> None:
        """Keep the pairs with the most and with the fewest inliers."""
        caption = f"pair {len(self.records)} at {record.time_s:.2f} s"
        for heap, sign in ((self.best, 1), (self.worst, -1)):
            kept = Kept((sign * record.num_inliers, -len(self.records)), answered, caption)
            if len(heap) < PICTURES:
                heapq.heappush(heap, kept)
            else:
                heapq.heappushpop(heap, kept)

    def _count_drops(self, received: int) -> None:
        now = self.dropped
        first = received if self._start is None else self._start
        if not self.drops or self.drops[-1][1] != now:
            self.drops.append(((received - first) * 1e-9, now))
