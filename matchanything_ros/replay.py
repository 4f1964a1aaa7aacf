"""`matchanything replay BAG`: what the node would do with a recording, without ROS, written to a folder.

The classes are the node's: Pairing, to_array, Matcher, estimate_homography, messages.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import heapq
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matchanything_ros import messages, report
from matchanything_ros.bags import CORRESPONDENCES, HOMOGRAPHY, McapRecording, image_connections, images, open_bag
from matchanything_ros.errors import UserError
from matchanything_ros.images import to_array
from matchanything_ros.match_files import (
    Result,
    add_matcher_arguments,
    check_matcher_arguments,
    match_pair,
    match_picture,
)
from matchanything_ros.matcher import Matcher
from matchanything_ros.outputs import new_folder
from matchanything_ros.pairing import Pair, Pairing
from matchanything_ros.progress import Progress
from matchanything_ros.report import PairRecord
from matchanything_ros.viz import encode_jpeg

NODE = "/match_node"
PICTURES = 3  # of the best and of the worst pairs
STAGES = ("decode", "preprocess", "network", "postprocess", "homography")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bag", type=Path, help="rosbag2 folder, a file .mcap or .db3, or a ROS 1 .bag")
    parser.add_argument("--image0", required=True, metavar="TOPIC", help="sensor_msgs Image or CompressedImage")
    parser.add_argument("--image1", required=True, metavar="TOPIC")
    add_matcher_arguments(parser)
    parser.add_argument(
        "--rate",
        choices=("max", "bag"),
        default="max",
        help="max: match every pair; bag: drop the pairs for which a live node would have been busy (default: max)",
    )
    parser.add_argument(
        "--approximate-sync-tolerance",
        type=float,
        default=0.05,
        metavar="SECONDS",
        help="largest difference of the stamps of a pair (default: 0.05)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")


def run(args: argparse.Namespace) -> int:
    check_matcher_arguments(args)
    if not 0 <= args.approximate_sync_tolerance < math.inf:
        raise UserError(f"--approximate-sync-tolerance is {args.approximate_sync_tolerance}: give seconds, 0 or more.")
    topics = (args.image0, args.image1)
    with (
        open_bag(args.bag) as reader,
        new_folder(args.out) as folder,
    ):
        connections = image_connections(reader, topics)
        with (
            Matcher(args.bundle, args.backend, args.score_threshold, args.max_matches) as matcher,
            McapRecording(folder / "matches.mcap") as recording,
        ):
            replay = Replay(matcher, Pairing(args.approximate_sync_tolerance), recording, args.ransac_threshold)
            start = time.perf_counter()
            with Progress(sum(connection.msgcount for connection in connections), "replay") as progress:
                stream = images(reader, connections, args.bag)
                for done in replay.play(stream, topics, live=args.rate == "bag"):
                    progress.update(done, f"{len(replay.records)} pairs, {replay.dropped} images dropped")
            seconds = time.perf_counter() - start
            replay.check(args.approximate_sync_tolerance)
            write_results(folder, args, matcher, replay, seconds)
    summary = report.summarise(replay.records)
    print(
        f"{summary['pairs']} pairs, homography OK in {summary['status'].get('OK', 0)}, {replay.dropped} images "
        f"dropped, latency {summary['times_ms']['latency']['p50']:.0f} ms (median): {args.out / 'report.html'}"
    )
    return 0


@dataclass(order=True)
class Kept:
    """A pair that may end as a picture in the report; ordered by `rank`."""

    rank: tuple[float, int]
    images: tuple[Any, Any] = field(compare=False)
    result: Result = field(compare=False)
    caption: str = field(compare=False)


class Replay:
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
        for count, (connection, received, message) in enumerate(stream):
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
        result, pictures = self._match(message0, message1)
        busy = round(1e9 * (time.perf_counter() - begin))
        arrival = max(received0, received1)
        first = start if self._start is None else self._start
        record = PairRecord.of(
            (arrival - first) * 1e-9,
            (pair.stamp0, pair.stamp1),
            result.estimate,
            (max(start, arrival) - arrival + busy) * 1e-6,
            result.timings_ms,
        )
        self.records.append(record)
        self._record(message0, message1, result, arrival)
        if pictures is not None:
            self._keep(record, result, pictures)
        return start + busy

    def _match(self, message0: Any, message1: Any) -> tuple[Result, tuple[Any, Any] | None]:
        start = time.perf_counter()
        try:
            pictures = to_array(message0), to_array(message1)
            decoded = 1e3 * (time.perf_counter() - start)
            result = match_pair(self.matcher, *pictures, self.threshold_px)
        except UserError as error:
            # As live: the pair is answered, with a status, and the reason is counted.
            self.errors[str(error)] = self.errors.get(str(error), 0) + 1
            sizes = [(getattr(m, "width", 0), getattr(m, "height", 0)) for m in (message0, message1)]
            matches, estimate = messages.not_computed(sizes[0], sizes[1])
            return Result(matches, estimate, {}), None
        return dataclasses.replace(result, timings_ms={"decode": decoded, **result.timings_ms}), pictures

    def _record(self, message0: Any, message1: Any, result: Result, time_ns: int) -> None:
        recording = self.recording
        headers = [recording.header(message.header) for message in (message0, message1)]
        arguments = (*headers, result.matches, result.estimate, self.matcher.bundle)
        types = recording.store.types
        recording.write(
            f"{NODE}/correspondences", messages.correspondences(types[CORRESPONDENCES], *arguments), time_ns
        )
        recording.write(f"{NODE}/homography", messages.homography(types[HOMOGRAPHY], *arguments), time_ns)

    def _keep(self, record: PairRecord, result: Result, pictures: tuple[Any, Any]) -> None:
        """Keep the pairs with the most and with the fewest inliers."""
        caption = f"pair {len(self.records)} at {record.time_s:.2f} s"
        for heap, sign in ((self.best, 1), (self.worst, -1)):
            kept = Kept((sign * record.num_inliers, -len(self.records)), pictures, result, caption)
            if len(heap) < PICTURES:
                heapq.heappush(heap, kept)
            else:
                heapq.heappushpop(heap, kept)

    def _count_drops(self, received: int) -> None:
        now = self.dropped
        first = received if self._start is None else self._start
        if not self.drops or self.drops[-1][1] != now:
            self.drops.append(((received - first) * 1e-9, now))


def write_results(folder: Path, args: argparse.Namespace, matcher: Matcher, replay: Replay, seconds: float) -> None:
    """Write matches.csv, summary.json and report.html (matches.mcap is complete when its recording closes)."""
    manifest = matcher.bundle.manifest
    pairing = replay.pairing
    facts = {
        "images_received": {args.image0: pairing.received[0], args.image1: pairing.received[1]},
        "images_dropped": {
            topic: {reason.value: count for reason, count in sorted(dropped.items()) if count}
            for topic, dropped in zip((args.image0, args.image1), pairing.dropped, strict=True)
        },
        "not_computed": replay.errors,
        "pairs_per_second": len(replay.records) / max(seconds, 1e-9),
    }
    configuration = {
        "bag": str(args.bag),
        "image0": args.image0,
        "image1": args.image1,
        "rate": args.rate,
        "approximate_sync_tolerance_seconds": args.approximate_sync_tolerance,
        "matcher": f"{manifest.name} ({manifest.family} {manifest.variant}, {manifest.precision})",
        "bundle_sha256": manifest.onnx_sha256,
        "backend": matcher.engine.backend,
        "score_threshold": matcher.score_threshold,
        "max_matches": matcher.max_matches,
        "ransac_threshold_px": args.ransac_threshold,
    }
    with (folder / "matches.csv").open("w", newline="", encoding="utf-8") as file:
        write_csv(file, replay.records)
    document = {**facts, **report.summarise(replay.records), **configuration, "versions": report.versions()}
    (folder / "summary.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    figures = [
        report.Figure(f"{name} {kept.caption}", encode_jpeg(match_picture(*kept.images, kept.result)))
        for name, heap in (("Most inliers:", replay.best), ("Fewest inliers:", replay.worst))
        for kept in sorted(heap, reverse=True)
    ]
    title = f"{args.bag.name}: {args.image0} and {args.image1}"
    report.write_report(folder / "report.html", title, replay.records, replay.drops, facts, configuration, figures)


def write_csv(file: Any, records: list[PairRecord]) -> None:
    """One row a pair; empty cells where there is no value. The homography is row-major, h00 to h22."""
    elements = [f"h{row}{column}" for row in range(3) for column in range(3)]
    plain = [f.name for f in dataclasses.fields(PairRecord) if f.name not in ("timings_ms", "homography")]
    table = csv.writer(file)
    table.writerow([*plain, *(f"{stage}_ms" for stage in STAGES), *elements])
    for record in records:
        row: list[Any] = [getattr(record, name) for name in plain]
        row += [record.timings_ms.get(stage, math.nan) for stage in STAGES]
        row += record.homography or [math.nan] * 9
        table.writerow(["" if isinstance(value, float) and math.isnan(value) else value for value in row])
