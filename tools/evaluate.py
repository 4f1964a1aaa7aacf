"""`matchanything evaluate FOLDER BUNDLE...`: accuracy on image pairs with ground truth, as tables and pictures.

The same pairs and bundles always give the same files: times are left to `matchanything bench`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matchanything_ros.engines import BACKENDS
from matchanything_ros.errors import UserError
from matchanything_ros.homography import estimate_homography
from matchanything_ros.match_files import check_limits, read_image
from matchanything_ros.matcher import Matcher, Matches
from matchanything_ros.outputs import new_folder
from matchanything_ros.progress import Progress
from matchanything_ros.viz import draw_matches, write_picture
from matchanything_tools.baselines import sift
from matchanything_tools.evaluation_tables import tables
from matchanything_tools.judgement import Record, failed, judge
from matchanything_tools.pairs import ImagePair, read_pairs, shuffled_pairs
from matchanything_tools.relative_pose import PoseRecord, judge_pose, pose_table
from matchanything_tools.rooms import pose_pairs

MatchFunction = Callable[[npt.NDArray[Any], npt.NDArray[Any]], Matches]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pairs", type=Path, help="folder with pairs.json, or with folders NAME/0.*, 1.*, H.txt")
    parser.add_argument("bundles", nargs="*", help="exported networks (.onnx), or names of bundles in the package")
    parser.add_argument("--baseline", choices=("sift", "none"), default="sift", help="also run this (default: sift)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="what runs the networks (default: auto)")
    parser.add_argument("--score-threshold", type=float, help="drop matches below this score (default: the bundle's)")
    parser.add_argument("--max-matches", type=int, help="keep the best so many (default: the bundle's)")
    parser.add_argument("--shuffled", type=int, default=0, metavar="N", help="also match N pairs of different places")
    parser.add_argument("--poses", type=int, default=0, metavar="N", help="also N made pairs of known relative pose")
    parser.add_argument("--out", type=Path, help="folder for evaluation.md, evaluation.json and pictures of failures")


def run(args: argparse.Namespace) -> int:
    check_limits(args.score_threshold, args.max_matches)
    for name in ("shuffled", "poses"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} is {getattr(args, name)}: give a number of pairs, or 0 for none.")
    pairs = read_pairs(args.pairs)
    if not args.bundles and args.baseline == "none":
        raise UserError("There is nothing to evaluate: name a bundle, or use --baseline sift.")
    negatives = shuffled_pairs(pairs, args.shuffled)
    if args.shuffled and not negatives:
        raise UserError("No two pairs have different sources, so none can be shuffled: leave --shuffled out.")
    rooms = pose_pairs([read_image(pair.files[0]) for pair in pairs], args.poses)
    methods: dict[str, list[Record]] = {}
    poses: dict[str, list[PoseRecord]] = {}
    with nullcontext() if args.out is None else new_folder(args.out) as folder:
        if args.baseline == "sift":
            methods["SIFT"] = evaluate("SIFT", sift, [*pairs, *negatives], folder)
            poses["SIFT"] = [judge_pose(room, sift) for room in rooms]
        for path in args.bundles:
            with Matcher(path, args.backend, args.score_threshold, args.max_matches, as_exported=True) as matcher:
                name = _unused(matcher.bundle.manifest.name, methods)
                methods[name] = evaluate(name, matcher.match, [*pairs, *negatives], folder)
                poses[name] = [judge_pose(room, matcher.match) for room in rooms]
        text = tables(methods) + (pose_table(poses) if rooms else "")
        if folder is not None:
            (folder / "evaluation.md").write_text(text, encoding="utf-8")
            document = {name: [asdict(record) for record in records] for name, records in methods.items()}
            (folder / "evaluation.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            if rooms:
                angles = {name: [asdict(record) for record in records] for name, records in poses.items()}
                (folder / "poses.json").write_text(json.dumps(angles, indent=1) + "\n", encoding="utf-8")
    print(text, end="")
    return 0


def evaluate(name: str, match: MatchFunction, pairs: Sequence[ImagePair], folder: Path | None = None) -> list[Record]:
    """Match all pairs; with a folder, draw each that fails (unsolved, or accepted without overlap) into it."""
    records = []
    with Progress(len(pairs), name) as progress:
        for index, pair in enumerate(pairs):
            image0, image1 = (read_image(file) for file in pair.files)
            matches = match(image0, image1)
            record = judge(pair, matches)
            records.append(record)
            if folder is not None and failed(record):
                failures = folder / "failures"
                failures.mkdir(exist_ok=True)
                picture = _failure(name, pair, record, image0, image1, matches)
                write_picture(failures / f"{name}_{pair.name}.jpg", picture)
            progress.update(index + 1, pair.name)
    return records


def _failure(
    name: str, pair: ImagePair, record: Record, image0: npt.NDArray[Any], image1: npt.NDArray[Any], matches: Matches
) -> npt.NDArray[np.uint8]:
    estimate = estimate_homography(matches.keypoints0, matches.keypoints1, matches.size0, matches.size1)
    error = "no homography" if record.error_px is None else f"corner error {record.error_px:.1f} px"
    truth = "no overlap" if pair.homography is None else error
    caption = f"{name}, {pair.name}: {record.num_inliers} inliers of {len(matches)} matches, {record.status}, {truth}"
    return draw_matches(
        image0,
        image1,
        matches.keypoints0,
        matches.keypoints1,
        inliers=estimate.inliers,
        homography=estimate.matrix,
        truth=pair.homography,
        caption=caption,
    )


def _unused(name: str, taken: dict[str, list[Record]]) -> str:
    """Two bundles of one name (fp32 and fp16 in two folders) stay apart."""
    return name if name not in taken else _unused(f"{name}'", taken)
