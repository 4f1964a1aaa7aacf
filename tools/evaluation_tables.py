"""The tables of `matchanything evaluate` in Markdown: accuracy by category and by source, matches, refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from matchanything_ros.homography import Status
from matchanything_tools.accuracy import auc, roc, roc_area
from matchanything_tools.judgement import SOLVED_PX, Record, failed
from matchanything_tools.pairs import CATEGORIES

THRESHOLDS = (1, 3, 5, 10)  # pixels of image 1


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
    return "\n".join([*lines, *_by_source(methods), *_refusals(methods)]) + "\n"


def _accuracy(records: Sequence[Record], category: str | None, attribute: str) -> str:
    errors = [
        _error(record, attribute)
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


def _by_source(methods: dict[str, list[Record]]) -> list[str]:
    """AUC@10 and solved pairs by where the images come from: a network may have seen some of them in training."""
    first = [record for record in next(iter(methods.values())) if record.precision is not None]
    lines = ["", "# By source of the images", "", "AUC@10 with refit, and pairs solved within 10 px.", ""]
    lines += [f"| source | pairs | {' | '.join(methods)} |", "|---" * (len(methods) + 2) + "|"]
    for group in sorted({record.sources for record in first}):
        cells = []
        for records in methods.values():
            known = [record for record in records if record.sources == group and record.precision is not None]
            errors = [_error(record, "error_px") for record in known]
            cells.append(f"{auc(errors, 10):.2f}, {sum(error < SOLVED_PX for error in errors)}")
        count = sum(record.sources == group for record in first)
        lines.append(f"| {' + '.join(group)} | {count} | {' | '.join(cells)} |")
    return lines


def _error(record: Record, attribute: str) -> float:
    value = getattr(record, attribute)
    return math.inf if value is None else float(value)


def _refusals(methods: dict[str, list[Record]]) -> list[str]:
    """Accepting by significance: solved pairs should be accepted, pairs that share nothing refused."""
    lines = [
        "",
        "# Refusal",
        "",
        "Positives: pairs solved within 10 px. Negatives: no overlap, and shuffled pairs.",
        "",
    ]
    heads = ["method", "positives", "negatives", "accepted of them", "ROC area", "true accepts at 1 % false"]
    heads += ["significance of positives from", "of negatives to"]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    details = []
    for method, records in methods.items():
        solved = [record for record in records if record.precision is not None and not failed(record)]
        nothing = [record for record in records if record.precision is None]
        yes, no = ([record.significance for record in group] for group in (solved, nothing))
        # Status.OK asks for more than significance (plausible geometry): count what is really handed out.
        accepted = [sum(record.status == Status.OK.name for record in group) for group in (solved, nothing)]
        none = 0.0 if yes and no else math.nan  # accepted if the best is a negative
        strict = max((true for _, false, true in roc(yes, no) if false <= 0.01), default=none)
        counts = f"{len(yes)} | {len(no)} | {accepted[0]} and {accepted[1]}"
        limits = f"{min(yes, default=math.nan):.1f} | {max(no, default=math.nan):.1f}"
        lines.append(f"| {method} | {counts} | {roc_area(yes, no):.4f} | {strict:.3f} | {limits} |")
        pairs = [record for record in nothing if record.category == "no overlap"]
        details += [
            f"- {method}, {record.name}: {record.num_inliers}/{record.num_matches} inliers, "
            f"significance {record.significance:.1f}, {record.status}"
            for record in pairs
        ]
    return [*lines, "", "Pairs without overlap:", "", *details]
