"""What the demo leaves in its folder: the mcap, pictures, the report, and the table that is printed."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from make_bag import SEQUENCE, START_NS, TOPICS
from player import TYPES, Recording

from matchanything_ros.bags import McapRecording
from matchanything_ros.homography import Status
from matchanything_ros.images import to_array
from matchanything_ros.messages import read_homography, stamp_of
from matchanything_ros.report import Figure, PairRecord, write_report

Matrix = npt.NDArray[np.float64]


def write_results(recording: Recording, pairs: int, rate: float, out: Path) -> str:
    """Write everything into `out`. Returns the text to print: a short table, and where to look."""
    with McapRecording(out / "published.mcap") as mcap:
        for topic, kind, received, raw in recording.messages:
            mcap.write_serialised(topic, TYPES[kind], raw, received)
    pictures = write_pictures(recording, rate, out / "pictures")
    records = []
    for message in sorted(recording.homographies, key=lambda message: stamp_of(message.header0)):
        stamps = (stamp_of(message.header0), stamp_of(message.header1))
        latency = recording.latencies_ms.get(stamps[0], float("nan"))
        records.append(PairRecord.of((stamps[0] - START_NS) * 1e-9, stamps, read_homography(message), latency))
    errors = errors_px(recording, rate)
    facts = {
        "pairs played": pairs,
        "dropped (node busy)": pairs - len(records),
        "median error to the truth [px]": median(errors) if errors else None,
        "frames with a truth good to 2 px": len(errors),
    }
    worst_to_best = sorted((record for record in records), key=lambda record: record.num_inliers)
    chosen = {frame_of(record.stamp0, rate): record for record in (worst_to_best[-3:][::-1] + worst_to_best[:3])}
    figures = [
        Figure(
            f"Frame {frame}: {record.num_matches} matches, {record.num_inliers} inliers, {record.status}",
            pictures[frame].read_bytes(),
        )
        for frame, record in chosen.items()
        if frame in pictures
    ]
    write_report(
        out / "report.html",
        "Demo: colour and near infrared over Garfield Park, through the live node",
        records,
        facts=facts,
        configuration=configuration(recording, rate),
        figures=figures,
    )
    solved = sum(record.status == "OK" for record in records)
    best = pictures.get(frame_of(worst_to_best[-1].stamp0, rate), out / "pictures")
    rows = [
        ("pairs played", f"{pairs}"),
        ("matched", f"{len(records)}"),
        ("dropped (node busy)", f"{pairs - len(records)}"),
        ("with a homography", f"{solved}"),
        (
            "median latency",
            f"{median(recording.latencies_ms.values()):.0f} ms (second image sent -> homography received)",
        ),
        ("median matches", f"{median(record.num_matches for record in records):.0f}"),
        ("median inlier ratio", f"{median(record.inlier_ratio for record in records):.2f}"),
        (
            "median error to the truth",
            f"{median(errors):.1f} px ({len(errors)} frames)" if errors else "no frame to tell",
        ),
        ("report", f"{out / 'report.html'}"),
        ("picture of the best pair", f"{best}"),
        ("messages", f"{out / 'published.mcap'}"),
    ]
    return "\n".join(f"  {name:<26} {value}" for name, value in rows)


def frame_of(stamp: int, rate: float) -> int:
    """The number of the frame of cam0 with this stamp [ns]."""
    return round((stamp - START_NS) * 1e-9 * rate)


def write_pictures(recording: Recording, rate: float, folder: Path) -> dict[int, Path]:
    """The node's own drawings as JPEG files; frame -> file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files = {}
    for image in recording.pictures:
        frame = frame_of(stamp_of(image.header), rate)
        files[frame] = folder / f"{frame:06d}.jpg"
        cv2.imwrite(str(files[frame]), to_array(image)[..., ::-1], (cv2.IMWRITE_JPEG_QUALITY, 88))
    return files


def configuration(recording: Recording, rate: float) -> dict[str, Any]:
    """What ran: topics and rate, and everything that the node's last diagnostics say."""
    rows: dict[str, Any] = {"topics": " and ".join(TOPICS), "pairs per second": rate}
    for status in recording.diagnostics.status if recording.diagnostics is not None else ():
        rows |= {f"{status.name}: {item.key}": item.value for item in status.values}
    return rows


def errors_px(recording: Recording, rate: float) -> list[float]:
    """For each homography of a frame whose truth is good: mean distance [pixels] to it over a grid of points."""
    with (SEQUENCE / "ground_truth.csv").open() as file:
        rows = {int(row["frame"]): row for row in csv.DictReader(file) if row["good"] == "1"}
    errors = []
    for message in recording.homographies:
        frame, estimate = frame_of(stamp_of(message.header0), rate), read_homography(message)
        if estimate.status is Status.OK and estimate.matrix is not None and frame in rows:
            truth = np.array([float(rows[frame][f"h{i}{j}"]) for i in range(3) for j in range(3)]).reshape(3, 3)
            x, y = np.meshgrid(np.linspace(0, message.width0 - 1, 8), np.linspace(0, message.height0 - 1, 6))
            grid = np.stack([x.ravel(), y.ravel()], axis=1)[:, None]
            found, expected = (cv2.perspectiveTransform(grid, matrix) for matrix in (estimate.matrix, truth))
            errors.append(float(np.linalg.norm(found - expected, axis=2).mean()))
    return errors
