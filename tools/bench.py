"""`matchanything bench`: speed and memory by stage, of bundles in backends and of the networks that they came from.

The compared things take turns, a few pairs each, so that what slows the machine down slows all of them: ratios hold
where single figures do not. Each has a process of its own, as on a robot. Speed of wrong results is worth nothing: each
is compared with the golden result, too.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from matchanything_ros.bundle import Bundle, load_bundle
from matchanything_ros.engines import BACKENDS
from matchanything_ros.errors import UserError
from matchanything_ros.outputs import write_text
from matchanything_ros.preprocess import Image
from matchanything_tools import machine
from matchanything_tools.bench_process import Apart
from matchanything_tools.contenders import MODES, STAGES, BundleContender, Opener, Times, TorchContender
from matchanything_tools.validate import golden_images, read_images

BLOCK = 5  # pairs in a row: more than one, so that caches are as warm as on a robot; few, so that all see the same load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundles", nargs="+", help="NAME.onnx, or the name of a bundle in the package")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=["auto"], help="one or several")
    parser.add_argument(
        "--against",
        nargs="+",
        choices=MODES,
        default=[],
        help="the PyTorch network: in its authors' precision (original), or as exported (pytorch); and how it is run",
    )
    parser.add_argument("--weights", type=Path, nargs="+", default=[], help="checkpoints, for --against")
    parser.add_argument("--images", type=Path, nargs=2, metavar="FILE", help="default: drawn, in the network's size")
    parser.add_argument("--runs", type=int, default=50, help="timed pairs for each")
    parser.add_argument("--warm-up", type=int, default=10, help="untimed pairs for each")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="where the figures are written")


def run(args: argparse.Namespace) -> int:
    """`matchanything bench`."""
    if args.against and not args.weights:
        raise UserError("--against needs --weights: the checkpoints that the bundles were exported from.")
    if args.runs < 1 or args.warm_up < 0:
        raise UserError("--runs must be at least 1, and --warm-up at least 0.")
    bundles = [load_bundle(name) for name in args.bundles]
    openers: list[tuple[Bundle, Opener]] = []
    for bundle in bundles:
        openers += [(bundle, partial(TorchContender, bundle, args.weights, mode)) for mode in args.against]
        openers += [(bundle, partial(BundleContender, bundle, backend)) for backend in args.backend]
    images = {bundle.onnx: read_images(args.images) if args.images else drawn_images(bundle) for bundle in bundles}
    report = {"machine": machine.describe(), "runs": args.runs, "results": []}
    contenders: list[Apart] = []
    try:
        for bundle, opener in openers:
            contenders.append(Apart(bundle, opener, images[bundle.onnx], max(args.warm_up, 1)))
        times = take_turns(contenders, args.runs)
        parities = [contender.against_golden() for contender in contenders]
    finally:
        for contender in contenders:
            contender.close()
    for contender in contenders:  # old/net.onnx beside new/net.onnx
        if any(b.onnx.stem == contender.bundle.onnx.stem and b.onnx != contender.bundle.onnx for b in bundles):
            contender.name = f"{contender.bundle.onnx.absolute().parent.name}/{contender.name}"
    report["machine_after"] = {"gpu": machine.gpu()}
    for index, contender in enumerate(contenders):
        base = next(time for time, other in zip(times, contenders, strict=True) if other.bundle is contender.bundle)
        entry = result(contender, times[index], base)
        report["results"].append({**entry, "golden": parities[index].as_dict()})
    print(table(report))
    write_text(args.out, json.dumps(report, indent=1) + "\n")
    return 0


def take_turns(contenders: list[Apart], runs: int) -> list[list[Times]]:
    """`runs` measurements of each, in blocks; the order turns, so that nobody always follows the same one."""
    times: list[list[Times]] = [[] for _ in contenders]
    for turn in range(-(-runs // BLOCK)):
        for offset in range(len(contenders)):
            index = (turn + offset) % len(contenders)
            times[index] += contenders[index].measure(min(BLOCK, runs - len(times[index])))
    return times


def drawn_images(bundle: Bundle) -> tuple[Image, Image]:
    """The golden images in the size of the network's inputs, as a camera would give them."""
    pair = golden_images(bundle)
    sizes = [bundle.manifest.input(name).opt for name in ("image0", "image1")]
    scaled = [
        cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR) for image, (h, w) in zip(pair, sizes, strict=True)
    ]
    return scaled[0], scaled[1]


def result(contender: Apart, times: list[Times], base: list[Times]) -> dict[str, Any]:
    """Statistics of one contender, and how many times faster it is than the first one of the same bundle."""
    columns: dict[str, list[float]] = defaultdict(list)
    for row in times:
        for stage, value in row.items():
            columns[stage].append(value)
    stages = {
        stage: {
            "median_ms": float(np.median(values)),
            "p95_ms": float(np.quantile(values, 0.95)),
            "min_ms": float(np.min(values)),
        }
        for stage, values in columns.items()
    }
    speedup = {
        stage: float(np.median([row[stage] for row in base]) / np.median(columns[stage]))
        for stage in ("network", "total")
    }
    return {
        "name": contender.name,
        "bundle": str(contender.bundle.onnx),
        "onnx_sha256": contender.bundle.manifest.onnx_sha256,
        "precision": contender.bundle.manifest.precision,
        "stages": stages,
        "speedup": speedup,
        **contender.memory,
    }


def table(report: dict[str, Any]) -> str:
    """The medians by stage, a line for each contender, with p95 and minimum of network and total."""
    about = report["machine"]
    gpu = about["gpu"]
    lines = [f"{about['cpu']}, {about['cpu_threads']} threads, load {about['load']:.1f}"]
    if gpu:
        lines.append(", ".join(f"{key} {value}" for key, value in gpu.items()))
    lines.append(", ".join(f"{key} {value}" for key, value in about["versions"].items()))
    width = max(len(entry["name"]) for entry in report["results"])
    stages = "".join(f"{stage:>11}" for stage in STAGES)
    lines += [
        "",
        f"{'median ms':{width}}{stages}      total   network min/p95     total p95   speedup  device MiB  host MiB",
    ]
    for entry in report["results"]:
        medians = [entry["stages"].get(stage, {}).get("median_ms") for stage in STAGES]
        cells = "".join(f"{'-' if value is None else f'{value:.2f}':>11}" for value in medians)
        network, total = entry["stages"]["network"], entry["stages"]["total"]
        device = "-" if entry["device_mib"] is None else f"{entry['device_mib']:.0f}"
        lines.append(
            f"{entry['name']:{width}}{cells}{total['median_ms']:>11.2f}"
            f"{network['min_ms']:>10.2f} /{network['p95_ms']:>6.2f}{total['p95_ms']:>14.2f}"
            f"{entry['speedup']['network']:>9.2f}x{device:>12}{entry['host_peak_mib']:>10.0f}"
        )
    lines.append("speedup: of the network, against the first line of the same bundle")
    for entry in report["results"]:
        if not entry["golden"]["passed"]:
            lines.append(f"not the golden result: {entry['name']}: {entry['golden']['summary']}")
    return "\n".join(lines)
