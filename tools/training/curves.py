"""What a training run measured, as curves.csv and as a picture."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from matchanything_ros.outputs import write_text


def add_to_curves(table: Path, row: dict[str, float]) -> None:
    """Append a row; the first one writes the header."""
    new = not table.exists()
    with table.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row), restval="")
        if new:
            writer.writeheader()
        writer.writerow({name: f"{value:.6g}" for name, value in row.items()})


def forget_curves(table: Path, step: int) -> None:
    """Take out the rows after `step`: a run that was killed had written them since the checkpoint it resumes from."""
    if not table.exists():
        return
    header, *rows = table.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= step]
    write_text(table, "".join((header, *kept)))


def draw_curves(table: Path, picture: Path) -> None:
    """Every column of curves.csv against the step."""
    if not table.exists():
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in ("step", "seconds")]
    figure, axes = pyplot.subplots(math.ceil(len(names) / 4), 4, figsize=(16, 3 * math.ceil(len(names) / 4)))
    for name, axis in zip(names, axes.flat, strict=False):
        axis.plot([int(row["step"]) for row in rows], [float(row[name]) for row in rows], linewidth=0.8)
        axis.set_title(name)
    figure.tight_layout()
    figure.savefig(picture, dpi=70)
    pyplot.close(figure)
