"""`matchanything validate`: does a bundle, in any backend, do what the PyTorch network with the same weights does?

Against the golden result stored in the bundle, always; with --weights also against the PyTorch network in fp32, on the
golden images or on the image pairs of a folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from matchanything_ros.bundle import Bundle, load_bundle
from matchanything_ros.engines import BACKENDS, Engine, open_engine
from matchanything_ros.engines.parity import load_golden
from matchanything_ros.errors import UserError
from matchanything_ros.homography import estimate_homography
from matchanything_ros.match_files import read_image
from matchanything_ros.outputs import write_text
from matchanything_ros.preprocess import Image, ToOriginal, prepare
from matchanything_ros.progress import Progress
from matchanything_tools.deviation import (
    GOLDEN_LIMITS,
    LIMITS,
    Arrays,
    Deviation,
    compare,
    corner_distance,
    judge,
    summarise,
)
from matchanything_tools.pairs import read_pairs

Run = Callable[[dict[str, np.ndarray]], Arrays]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="NAME.onnx, or the name of a bundle in the package")
    parser.add_argument("--weights", type=Path, nargs="+", default=[], help="the checkpoints that it was exported from")
    parser.add_argument("--pairs", type=Path, help="folder of image pairs NAME/0.*, NAME/1.* (default: golden images)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="PX",
        help="largest mean distance of keypoints (fp32: 0.02, fp16: 0.25, of golden images 0.5), or median of a warp",
    )
    parser.add_argument("--out", type=Path, default=Path("validation.json"), help="where the figures are written")


def run(args: argparse.Namespace) -> int:
    """`matchanything validate`. Returns 1 when a comparison is past its limits."""
    bundle = load_bundle(args.bundle)
    if args.tolerance is not None and not args.tolerance >= 0:
        raise UserError(f"--tolerance is {args.tolerance}: give a distance in pixels, 0 or more.")
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise UserError(f"--out is {args.out}: name a file in a folder that exists.")
    if args.pairs is not None and not args.weights:
        raise UserError("--pairs needs --weights: without the checkpoint there is nothing to compare with.")
    limits, golden_limits = (table[bundle.manifest.precision] for table in (LIMITS, GOLDEN_LIMITS))
    if args.tolerance is not None:
        given = {"mean_px": args.tolerance, "warp_px": args.tolerance}
        limits, golden_limits = (dataclasses.replace(x, **given) for x in (limits, golden_limits))
    engine = open_engine(bundle, args.backend, as_exported=True)
    try:
        results = {"golden result": [against_golden(engine)]}
        if args.weights:
            reference = pytorch_network(bundle, args.weights)
            files = [pair.files for pair in read_pairs(args.pairs)] if args.pairs else []
            results["PyTorch, fp32"] = []
            with Progress(max(len(files), 1), "validate") as progress:
                for count, images in enumerate(map(read_images, files) if files else [golden_images(bundle)]):
                    results["PyTorch, fp32"].append(against(engine, reference, *images))
                    progress.update(count + 1)
    finally:
        engine.close()
    report: dict[str, Any] = {
        "bundle": str(bundle.onnx),
        "onnx_sha256": bundle.manifest.onnx_sha256,
        "precision": bundle.manifest.precision,
        "backend": engine.backend,
        "limits": dataclasses.asdict(limits),
        "golden_limits": dataclasses.asdict(golden_limits),
        "against": {},
    }
    failures = []
    for name, deviations in results.items():
        summary = summarise(deviations)
        real = name != "golden result" and args.pairs is not None
        problems = judge(summary, limits if real else golden_limits)
        report["against"][name] = {"pairs": len(deviations), **summary, "problems": problems}
        failures += [f"{name}: {problem}" for problem in problems]
    print(table(report))
    write_text(args.out, json.dumps(report, indent=1) + "\n")
    if failures:
        raise UserError(f"{bundle.onnx.name} in {engine.backend} deviates: " + "; ".join(failures) + ".")
    return 0


def pytorch_network(bundle: Bundle, weights: list[Path]) -> Run:
    """The network in fp32, on the GPU if there is one, with TF32 off."""
    import torch

    from matchanything_tools.rebuild import rebuild

    item = rebuild(bundle, weights, precision="fp32")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    module = item.module.eval().to(device)

    def run(inputs: dict[str, np.ndarray]) -> Arrays:
        with torch.inference_mode(), device:
            outputs = module(*(torch.from_numpy(inputs[spec.name]).to(device) for spec in item.inputs))
        return {name: value.float().cpu().numpy() for name, value in zip(item.outputs, outputs, strict=True)}

    return run


def against_golden(engine: Engine) -> Deviation:
    """The engine on the golden images against the golden result."""
    golden = load_golden(engine.bundle)
    inputs, _ = network_inputs(engine.bundle, golden["image0"], golden["image1"])
    return compare(golden, engine.run(inputs), engine.bundle.manifest.score_threshold)


def against(engine: Engine, reference: Run, image0: Image, image1: Image) -> Deviation:
    """The engine against the reference on one image pair, homographies included."""
    manifest = engine.bundle.manifest
    inputs, back = network_inputs(engine.bundle, image0, image1)
    wanted, given = reference(inputs), engine.run(inputs)
    deviation = compare(wanted, given, manifest.score_threshold)
    sizes = [(image.shape[1], image.shape[0]) for image in (image0, image1)]
    matrices = []
    for arrays in (wanted, given):
        keep = (arrays["scores"] > 0) & (arrays["scores"] >= manifest.score_threshold)
        points = [
            back[name](np.asarray(arrays[f"keypoints{name[-1]}"][keep], np.float32)) for name in ("image0", "image1")
        ]
        matrices.append(estimate_homography(points[0], points[1], sizes[0], sizes[1]).matrix)
    if matrices[0] is None or matrices[1] is None:
        return deviation
    return dataclasses.replace(deviation, corner_px=corner_distance(matrices[0], matrices[1], sizes[0]))


def network_inputs(bundle: Bundle, image0: Image, image1: Image) -> tuple[dict[str, np.ndarray], dict[str, ToOriginal]]:
    """All inputs of the network by name, and the way back to pixels of the images."""
    prepared = {
        spec.name: prepare((image0, image1)[spec.image], bundle.manifest.preprocess, spec)
        for spec in bundle.manifest.inputs
    }
    return {name: entry[0] for name, entry in prepared.items()}, {name: entry[1] for name, entry in prepared.items()}


def golden_images(bundle: Bundle) -> tuple[Image, Image]:
    golden = load_golden(bundle)
    return golden["image0"], golden["image1"]


def read_images(files: tuple[Path, Path]) -> tuple[Image, Image]:
    """Two image files as `matchanything match` and `evaluate` read them."""
    return read_image(files[0]), read_image(files[1])


def table(report: dict[str, Any]) -> str:
    """The figures as lines of text, a column for each comparison."""
    columns = report["against"]
    lines = [f"{report['bundle']} ({report['precision']}) in {report['backend']}", ""]
    lines.append(f"{'against':22}" + "".join(f"{name:>18}" for name in columns))
    rows = {
        "pairs": "{:d}",
        "matches_expected": "{:d}",
        "matches": "{:d}",
        "found_again": "{:d}",
        "mean_px": "{:.4f}",
        "p95_px": "{:.4f}",
        "within_0.1_px": "{:.2%}",
        "within_0.5_px": "{:.2%}",
        "within_1_px": "{:.2%}",
        "score_correlation": "{:.5f}",
        "corner_error_px": "{:.3f}",
        "warp_pixels": "{:d}",
        "warp_mean_px": "{:.4f}",
        "warp_median_px": "{:.4f}",
        "warp_within_1_px": "{:.2%}",
        "certainty_difference": "{:.4f}",
        "not_finite": "{:d}",
    }
    for key, pattern in rows.items():
        values = [column[key] for column in columns.values()]
        if any(value is not None for value in values):
            cells = ("-" if value is None else pattern.format(value) for value in values)
            lines.append(f"{key.replace('_', ' '):22}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)
