"""One HTML file about a run: plots over time, best and worst pairs, configuration. It needs nothing from outside."""

from __future__ import annotations

import base64
import html
import json
import math
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import matchanything_ros
from matchanything_ros.homography import HomographyEstimate
from matchanything_ros.plot import plot


@dataclass(frozen=True)
class PairRecord:
    """What became of one pair.

    time_s: since the start of the recording. status: name of a homography.Status. latency_ms: from the arrival of the
    pair's second image to the answer. timings_ms: wall time by stage, where known.
    """

    time_s: float
    stamp0: int
    stamp1: int
    status: str
    num_matches: int
    num_inliers: int
    inlier_ratio: float
    reprojection_error_px: float
    significance: float
    latency_ms: float
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    homography: tuple[float, ...] | None = None

    @classmethod
    def of(
        cls,
        time_s: float,
        stamps: tuple[int, int],
        estimate: HomographyEstimate,
        latency_ms: float,
        timings_ms: Mapping[str, float] | None = None,
    ) -> PairRecord:
        """The record of an estimate, also of one that was read back from a message."""
        return cls(
            time_s=time_s,
            stamp0=stamps[0],
            stamp1=stamps[1],
            status=estimate.status.name,
            num_matches=estimate.num_matches,
            num_inliers=estimate.num_inliers,
            inlier_ratio=estimate.inlier_ratio,
            reprojection_error_px=estimate.reprojection_error_px,
            significance=estimate.significance,
            latency_ms=latency_ms,
            timings_ms=dict(timings_ms or {}),
            homography=None if estimate.matrix is None else tuple(estimate.matrix.reshape(9).tolist()),
        )


@dataclass(frozen=True)
class Figure:
    """A picture for the report, as the bytes of a JPEG file."""

    caption: str
    jpeg: bytes


def summarise(records: Sequence[PairRecord]) -> dict[str, Any]:
    """Counts, medians and percentiles of the records, ready for JSON."""
    stages = sorted({stage for record in records for stage in record.timings_ms})
    times = {"latency": [record.latency_ms for record in records]}
    times |= {stage: [r.timings_ms[stage] for r in records if stage in r.timings_ms] for stage in stages}
    solved = [record for record in records if record.status == "OK"]
    return {
        "pairs": len(records),
        "status": dict(sorted(Counter(record.status for record in records).items())),
        "median_matches": _percentile([record.num_matches for record in records], 50),
        "median_inliers": _percentile([record.num_inliers for record in records], 50),
        "median_inlier_ratio": _percentile([record.inlier_ratio for record in records], 50),
        "median_reprojection_error_px": _percentile([record.reprojection_error_px for record in solved], 50),
        "times_ms": {name: {"p50": _percentile(v, 50), "p95": _percentile(v, 95)} for name, v in times.items()},
    }


def versions() -> dict[str, str]:
    """This machine and the versions of what computes, for reports."""
    found = {"matchanything_ros": matchanything_ros.__version__, "python": platform.python_version()}
    for package in ("numpy", "opencv-python-headless", "opencv-python", "onnxruntime", "onnxruntime-gpu", "tensorrt"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["machine"] = f"{platform.system()} {platform.release()}, {platform.machine()}, {_processor()}"
    return found


def write_report(
    path: Path,
    title: str,
    records: Sequence[PairRecord],
    dropped: Sequence[tuple[float, int]] = (),
    facts: Mapping[str, Any] | None = None,
    configuration: Mapping[str, Any] | None = None,
    figures: Sequence[Figure] = (),
) -> None:
    """Write the report.

    dropped: (time_s, images dropped until then), rising. facts: a first table, name -> value, beside the summary of
    the records. configuration: a last table (topics, parameters, bundle, versions).
    """
    summary = summarise(records)
    latency = summary["times_ms"]["latency"]
    ok = sum(record.status == "OK" for record in records)
    tiles = [
        ("pairs matched", f"{len(records)}"),
        ("homography OK", f"{ok} ({100 * ok / max(len(records), 1):.0f} %)"),
        ("images dropped", f"{dropped[-1][1] if dropped else 0}"),
        ("latency p50 / p95", f"{_number(latency['p50'])} / {_number(latency['p95'])} ms"),
        ("inlier ratio, median", _number(summary["median_inlier_ratio"])),
    ]
    times = [record.time_s for record in records]
    plots = [
        plot(
            "Matches and inliers",
            "",
            {
                "matches": (times, [record.num_matches for record in records]),
                "inliers": (times, [record.num_inliers for record in records]),
            },
            marks=[(record.time_s, record.status) for record in records if record.status != "OK"],
        ),
        plot(
            "Latency",
            "ms",
            {
                "latency": (times, [record.latency_ms for record in records]),
                **{
                    stage: (times, [record.timings_ms.get(stage, math.nan) for record in records])
                    for stage in ("network", "homography")
                    if any(stage in record.timings_ms for record in records)
                },
            },
        ),
    ]
    if dropped:
        plots.append(
            plot(
                "Images dropped so far", "", {"dropped": ([t for t, _ in dropped], [n for _, n in dropped])}, step=True
            )
        )
    body = [
        f"<h1>{_escape(title)}</h1>",
        "<div class=tiles>" + "".join(f"<div><b>{_escape(v)}</b><span>{k}</span></div>" for k, v in tiles) + "</div>",
        *plots,
        *(_figure(figure) for figure in figures),
        "<h2>Numbers</h2>",
        _table({**(facts or {}), **summary}),
        "<h2>Configuration</h2>",
        _table({**(configuration or {}), **versions()}),
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{_escape(title)}</title><style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


STYLE = """
:root{color-scheme:light dark;--ink:#1c2126;--soft:#6a737d;--line:#d8dde2;--page:#fff;--tile:#f3f5f7}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7ea;--soft:#98a2ad;--line:#3a424b;--page:#15191d;--tile:#20262c}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page)}
body{max-width:1000px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
.tiles{display:flex;flex-wrap:wrap;gap:.6rem}
.tiles div{background:var(--tile);border-radius:8px;padding:.6rem 1rem;flex:1}
.tiles b{display:block;font-size:1.2rem;white-space:nowrap}
.tiles span,figcaption,.key{color:var(--soft);font-size:.85rem}.key i{font-style:normal;margin-right:1rem}
figure{margin:1rem 0}img{width:100%;border-radius:6px}
table{border-collapse:collapse;width:100%}
td{border-top:1px solid var(--line);padding:.25rem .5rem;vertical-align:top;overflow-wrap:anywhere}
td:first-child{color:var(--soft);width:16rem}
svg{width:100%;height:auto}svg text{fill:var(--soft);font-size:12px}
"""


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.jpeg).decode("ascii")
    caption = _escape(figure.caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/jpeg;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _table(rows: Mapping[str, Any]) -> str:
    cells = (f"<tr><td>{_escape(name.replace('_', ' '))}<td>{_escape(_number(value))}" for name, value in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_number(each)}" for name, each in value.items()) or "none"
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _percentile(values: Sequence[float], percent: float) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.percentile(finite, percent)) if finite else None


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"


def _escape(text: str) -> str:
    return html.escape(str(text), quote=True)
