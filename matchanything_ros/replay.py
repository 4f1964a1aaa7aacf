"""`matchanything replay BAG`: what the node would do with a recording, without ROS, written to a folder.

What becomes of the images is in bagplayer.py.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matchanything_ros import report
from matchanything_ros.answer import Answer
from matchanything_ros.bagplayer import BagPlayer
from matchanything_ros.bags import McapRecording, image_connections, images, open_bag
from matchanything_ros.errors import UserError
from matchanything_ros.match_files import (
    add_matcher_arguments,
    check_matcher_arguments,
)
from matchanything_ros.matcher import Matcher
from matchanything_ros.outputs import new_folder
from matchanything_ros.pairing import Pairing
from matchanything_ros.parameters import Parameters
from matchanything_ros.progress import Progress
from matchanything_ros.report import PairRecord
from matchanything_ros.viz import draw_dense, encode_jpeg

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
    parser.add_argument(
        "--queue-size",
        type=int,
        metavar="N",
        help="images of one camera that wait for the other's (default: 100, with --rate bag the node's 10)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")


def run(args: argparse.Namespace) -> int:
    check_matcher_arguments(args)
    if not 0 <= args.approximate_sync_tolerance < math.inf:
        raise UserError(f"--approximate-sync-tolerance is {args.approximate_sync_tolerance}: give seconds, 0 or more.")
    if args.queue_size is not None and args.queue_size < 1:
        raise UserError(f"--queue-size is {args.queue_size}: give a positive number of images.")
    topics = (args.image0, args.image1)
    queue_size = args.queue_size or {"max": 100, "bag": Parameters().queue_size}[args.rate]
    with (
        open_bag(args.bag) as reader,
        new_folder(args.out) as folder,
    ):
        connections = image_connections(reader, topics)
        with (
            Matcher(args.bundle, args.backend, args.score_threshold, args.max_matches) as matcher,
            McapRecording(folder / "matches.mcap") as recording,
        ):
            pairing = Pairing(args.approximate_sync_tolerance, queue_size=queue_size)
            replay = BagPlayer(matcher, pairing, recording, args.ransac_threshold)
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


def write_results(folder: Path, args: argparse.Namespace, matcher: Matcher, replay: BagPlayer, seconds: float) -> None:
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
    figures = []
    for name, heap in (("Most inliers:", replay.best), ("Fewest inliers:", replay.worst)):
        for kept in sorted(heap, reverse=True):
            figures.append(report.Figure(f"{name} {kept.caption}", encode_jpeg(kept.answer.picture())))
            if manifest.dense:
                caption = f"Warp and certainty of {kept.caption}"
                figures.append(report.Figure(caption, encode_jpeg(dense_picture(matcher, kept.answer))))
    title = f"{args.bag.name}: {args.image0} and {args.image1}"
    report.write_report(folder / "report.html", title, replay.records, replay.drops, facts, configuration, figures)


def dense_picture(matcher: Matcher, answered: Answer) -> npt.NDArray[np.uint8]:
    """Warp and certainty of a pair that was matched: again, since nobody keeps megabytes for every pair."""
    image0, image1 = answered.images
    matches = matcher.match(image0, image1, dense=True)
    assert matches.warp is not None and matches.cert is not None
    return draw_dense(image0, image1, matches.warp, matches.cert)


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
