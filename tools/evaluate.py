"""`matchanything evaluate FOLDER BUNDLE...`: accuracy on image pairs with ground truth, as tables and pictures.

The same pairs and bundles always give the same files: times are left to `matchanything bench`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matchanything_ros.engines import BACKENDS
from matchanything_ros.errors import UserError
from matchanything_ros.homography import Status, estimate_homography, refine_homography
from matchanything_ros.match_files import read_image
from matchanything_ros.matcher import Matcher, Matches
from matchanything_ros.outputs import new_folder
from matchanything_ros.progress import Progress
from matchanything_ros.viz import draw_matches, write_picture
from matchanything_tools.accuracy import auc, corner_error, magsac, precision, roc, roc_area
from matchanything_tools.baselines import sift
from matchanything_tools.pairs import CATEGORIES, ImagePair, read_pairs, shuffled_pairs

THRESHOLDS = (1, 3, 5, 10)  # pixels of image 1
SOLVED_PX = 10.0  # a corner error below this counts as solved
MIN_SIGNIFICANCE = 2.0  # estimate_homography's default: what the node accepts

MatchFunction = Callable[[npt.NDArray[Any], npt.NDArray[Any]], Matches]


@dataclass(frozen=True)
class Record:
    """One pair by one method. Errors: mean corner error in pixels of image 1, None if there is no homography.

    error_magsac_px: MAGSAC alone. error_px: with our refit. error_accepted_px: what estimate_homography hands out,
    None where it refuses. precision: share of the matches within 3 px of the truth.
    """

    name: str
    category: str
    num_matches: int
    num_inliers: int
    inlier_ratio: float
    status: str
    significance: float
    precision: float | None = None
    error_magsac_px: float | None = None
    error_px: float | None = None
    error_accepted_px: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pairs", type=Path, help="folder with pairs.json, or with folders NAME/0.*, 1.*, H.txt")
    parser.add_argument("bundles", nargs="*", help="exported networks (.onnx), or names of bundles in the package")
    parser.add_argument("--baseline", choices=("sift", "none"), default="sift", help="also run this (default: sift)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="what runs the networks (default: auto)")
    parser.add_argument("--score-threshold", type=float, help="drop matches below this score (default: the bundle's)")
    parser.add_argument("--max-matches", type=int, help="keep the best so many (default: the bundle's)")
    parser.add_argument("--shuffled", type=int, default=0, metavar="N", help="also match N pairs of different places")
    parser.add_argument("--out", type=Path, help="folder for evaluation.md, evaluation.json and pictures of failures")


def run(args: argparse.Namespace) -> int:
    pairs = read_pairs(args.pairs)
    if not args.bundles and args.baseline == "none":
        raise UserError("There is nothing to evaluate: name a bundle, or use --baseline sift.")
    negatives = shuffled_pairs(pairs, args.shuffled)
    if args.shuffled and not negatives:
        raise UserError("No two pairs have different sources, so none can be shuffled: leave --shuffled out.")
    methods: dict[str, list[Record]] = {}
    with nullcontext() if args.out is None else new_folder(args.out) as folder:
        if args.baseline == "sift":
            methods["SIFT"] = evaluate("SIFT", sift, [*pairs, *negatives], folder)
        for path in args.bundles:
            with Matcher(path, args.backend, args.score_threshold, args.max_matches) as matcher:
                name = _unused(matcher.bundle.manifest.name, methods)
                methods[name] = evaluate(name, matcher.match, [*pairs, *negatives], folder)
        text = tables(methods)
        if folder is not None:
            (folder / "evaluation.md").write_text(text, encoding="utf-8")
            document = {name: [asdict(record) for record in records] for name, records in methods.items()}
            (folder / "evaluation.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
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


def judge(pair: ImagePair, matches: Matches) -> Record:
    """Estimate the homography in the three ways of Record and compare it with the truth."""
    points0, points1 = matches.keypoints0, matches.keypoints1
    estimate = estimate_homography(points0, points1, matches.size0, matches.size1)
    common: dict[str, Any] = {
        "name": pair.name,
        "category": pair.category,
        "num_matches": len(matches),
        "num_inliers": estimate.num_inliers,
        "inlier_ratio": round(estimate.inlier_ratio, 4),
        "status": estimate.status.name,
        "significance": round(estimate.significance, 3),
    }
    if pair.homography is None:
        return Record(**common)
    plain = magsac(points0, points1)
    refined = plain
    if plain is not None and len(matches) > 4:
        refined = refine_homography(plain, points0.astype(np.float64), points1.astype(np.float64), 3.0)
    errors = [corner_error(matrix, pair.homography, matches.size0) for matrix in (plain, refined, estimate.matrix)]
    plain_px, refined_px, accepted_px = (round(error, 3) if math.isfinite(error) else None for error in errors)
    return Record(
        **common,
        precision=round(precision(points0, points1, pair.homography), 4),
        error_magsac_px=plain_px,
        error_px=refined_px,
        error_accepted_px=accepted_px,
    )


def failed(record: Record) -> bool:
    """Whether the pair is unsolved, or accepted although it shares nothing."""
    if record.precision is None:
        return record.status == Status.OK.name
    return record.error_px is None or record.error_px >= SOLVED_PX


def tables(methods: dict[str, list[Record]]) -> str:
    """Everything as Markdown: accuracy by category and estimator, refusals, and the choice of the threshold."""
    lines = [
        "# Accuracy",
        "",
        "Corner error in pixels of image 1. AUC@1 / @3 / @5 / @10, then the share below 10 px.",
        "",
    ]
    first = next(iter(methods.values()))
    present = [name for name in CATEGORIES if any(record.category == name for record in first)]
    counts = [sum(record.category == name for record in first) for name in present]
    heads = [f"all {sum(counts)}", *(f"{name} {count}" for name, count in zip(present, counts, strict=True))]
    lines += [f"| method | estimator | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    estimators = (("error_magsac_px", "MAGSAC"), ("error_px", "+ refit"), ("error_accepted_px", "+ refit, accepted"))
    for method, records in methods.items():
        for attribute, estimator in estimators:
            cells = [_accuracy(records, category, attribute) for category in (None, *present)]
            lines.append(f"| {method} | {estimator} | {' | '.join(cells)} |")
    lines += [
        "",
        "# Matches",
        "",
        "| method | matches (median) | precision at 3 px | inlier ratio |",
        "|---|---|---|---|",
    ]
    for method, records in methods.items():
        known = [record for record in records if record.precision is not None]
        medians = [
            float(np.median(values)) if known else math.nan
            for values in (
                [record.num_matches for record in known],
                [record.precision or 0.0 for record in known],
                [record.inlier_ratio for record in known],
            )
        ]
        lines.append(f"| {method} | {medians[0]:.0f} | {medians[1]:.2f} | {medians[2]:.2f} |")
    return "\n".join([*lines, *_refusals(methods)]) + "\n"


def _accuracy(records: Sequence[Record], category: str | None, attribute: str) -> str:
    errors = [
        math.inf if getattr(record, attribute) is None else getattr(record, attribute)
        for record in records
        if record.precision is not None and category in (None, record.category)
    ]
    if not errors:
        return "-"
    values = [
        *(auc(errors, threshold) for threshold in THRESHOLDS),
        sum(error < SOLVED_PX for error in errors) / len(errors),
    ]
    return " ".join(f"{value:.3f}".removeprefix("0") if value < 1 else "1.00" for value in values)


def _refusals(methods: dict[str, list[Record]]) -> list[str]:
    """Accepting by significance: solved pairs should be accepted, pairs that share nothing refused."""
    lines = [
        "",
        "# Refusal",
        "",
        "Positives: pairs solved within 10 px. Negatives: no overlap, and shuffled pairs.",
        "",
    ]
    lines += ["| method | positives | negatives | accepted of them | ROC area | accepted positives at 1 % false |"]
    lines += ["|---|---|---|---|---|---|"]
    details = []
    for method, records in methods.items():
        solved = [record for record in records if record.precision is not None and not failed(record)]
        nothing = [record for record in records if record.precision is None]
        yes, no = ([record.significance for record in group] for group in (solved, nothing))
        # Status.OK asks for more than significance (plausible geometry): count what is really handed out.
        accepted = [sum(record.status == Status.OK.name for record in group) for group in (solved, nothing)]
        strict = max((true for _, false, true in roc(yes, no) if false <= 0.01), default=math.nan)
        counts = f"{len(yes)} | {len(no)} | {accepted[0]} and {accepted[1]}"
        lines.append(f"| {method} | {counts} | {roc_area(yes, no):.4f} | {strict:.3f} |")
        pairs = [record for record in nothing if record.category == "no overlap"]
        details += [
            f"- {method}, {record.name}: {record.num_inliers}/{record.num_matches} inliers, "
            f"significance {record.significance:.1f}, {record.status}"
            for record in pairs
        ]
    return [*lines, "", "Pairs without overlap:", "", *details]


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
