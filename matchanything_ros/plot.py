"""Lines over time as inline SVG, for pages that must need nothing from outside."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

Series = tuple[Sequence[float], Sequence[float]]  # times in seconds, values

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 960, 220, 56, 24, 12
COLOURS = ("#3b82c4", "#2f9e63", "#c9731d")


def plot(
    title: str,
    unit: str,
    series: Mapping[str, Series],
    marks: Sequence[tuple[float, str]] = (),
    step: bool = False,
) -> str:
    """Lines over time in seconds as a heading and inline SVG; values that are NaN leave a gap.

    marks: (time, what), small red ticks on the axis that say what on hover. step: the value holds until the next.
    """
    values = [v for _, ys in series.values() for v in ys if math.isfinite(v)]
    times = [t for xs, _ in series.values() for t in xs]
    if not values or not times:
        return ""
    first, last = min(times), max(max(times), min(times) + 1e-3)
    top, ticks = _ticks(max(values))

    def at(time: float, value: float) -> str:
        x = LEFT + (time - first) / (last - first) * (WIDTH - LEFT - 8)
        return f"{x:.1f} {HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP):.1f}"

    parts = []
    for tick in ticks:
        y = at(first, tick).split()[1]
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - 8}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for time in _ticks(last - first)[1]:
        if time <= (last - first) * 1.001:
            x = at(first + time, 0).split()[0]
            anchor = "end" if float(x) > WIDTH - 30 else "middle"
            parts.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="{anchor}">{time:.4g} s</text>')
    for colour, (xs, ys) in zip(COLOURS, series.values(), strict=False):
        pen, path = "M", ""
        for time, value in zip(xs, ys, strict=True):
            if not math.isfinite(value):
                pen = "M"
                continue
            point = at(time, value)
            path += f"H{point.split()[0]}V{point.split()[1]}" if step and pen == "L" else f"{pen}{point}"
            pen = "L"
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round"/>')
        if len(xs) <= 500:
            parts += [
                f'<circle cx="{at(t, v).split()[0]}" cy="{at(t, v).split()[1]}" r="2.4" fill="{colour}">'
                f"<title>{t - first:.3f} s: {v:.4g} {unit}</title></circle>"
                for t, v in zip(xs, ys, strict=True)
                if math.isfinite(v)
            ]
    for time, what in marks:
        x, y = at(time, 0).split()
        parts.append(
            f'<path d="M{x} {y}v-10" stroke="#d03b2f" stroke-width="3"><title>{html.escape(what)}</title></path>'
        )
    keys = [f'<i style="color:{c}">&#9632; {html.escape(name)}</i>' for c, name in zip(COLOURS, series, strict=False)]
    keys += ['<i style="color:#d03b2f">&#9632; no homography</i>'] if marks else []
    heading = f"{title} [{unit}]" if unit else title
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(heading)}">{"".join(parts)}</svg>'
    return f"<h2>{html.escape(heading)}</h2>{svg}<div class=key>{''.join(keys)}</div>"


def _ticks(largest: float) -> tuple[float, list[float]]:
    """A round top of the axis and the values to label."""
    if largest <= 0:
        return 1.0, [0.0, 1.0]
    step = 10 ** math.floor(math.log10(largest))
    step = next(step * factor for factor in (0.2, 0.5, 1.0, 2.0) if largest / (step * factor) <= 5)
    count = math.ceil(largest / step - 1e-9)
    return step * count, [step * index for index in range(count + 1)]
