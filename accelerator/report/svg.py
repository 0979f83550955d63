"""Charts as SVG text, coloured by the style sheet of the page, so that light and dark need no second drawing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 10, 30
MOST_POINTS = 500

Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], *, unit: str = "") -> str:
    """Lines over steps, at most 500 points each, with an axis in whole steps. NaN and infinities break a line."""
    finite = [(x, y) for points in series.values() for x, y in points if math.isfinite(y)]
    if not finite:
        return '<p class="none">no finite values</p>'
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    low, high = min(ys), max(ys)
    is_log = low > 0 and high / low > 50
    if is_log:
        low, high = math.log10(low), math.log10(high)
    pad = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - pad, high + pad
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        y = math.log10(y) if is_log else y
        across = LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in _ticks(low, high):
        _, y = at(first, 10**value if is_log else value)
        label = number(10**value if is_log else value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for step in _ticks(first, last, whole=True):
        x, _ = at(step, 10**low if is_log else low)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{step:,.0f}</text>')
    for index, (name, points) in enumerate(series.items()):
        parts.append(_line(points, at, index, name, unit, is_log))
    words = escape("; ".join(series) + (f", in {unit}" if unit else "") + (", logarithmic" if is_log else ""))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">{"".join(parts)}</svg>'


def stacked_bars(rows: Mapping[str, Mapping[str, float]], parts: Sequence[str]) -> str:
    """One bar a row, cut into shares of its sum."""
    height = 26
    label = max(120, min(240, 12 + 7 * max(map(len, rows), default=0)))  # names of runs may be long
    drawn = []
    for line, (name, values) in enumerate(rows.items()):
        y, x, total = line * height + 4, float(label), sum(values.values())
        drawn.append(f'<text x="{label - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        for index, part in enumerate(parts):
            share = values.get(part, 0.0) / total if total else 0.0
            width = share * (WIDTH - label - 4)
            if width > 0.05:
                title = f"{escape(name)}, {escape(part)}: {share:.1%}, {values[part]:.2f} s"
                drawn.append(
                    f'<rect class="p{index}" x="{x:.1f}" y="{y}" width="{width:.2f}" height="{height - 8}">'
                    f"<title>{title}</title></rect>"
                )
            x += width
    box = f"0 0 {WIDTH} {len(rows) * height + 4}"
    return f'<svg class="bars" viewBox="{box}" role="img" aria-label="time by phase">{"".join(drawn)}</svg>'


def number(value: float) -> str:
    """A short number: `0.0123`, `1.2k`, `3.4M`, `1.0e-06`."""
    size = abs(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    if size and size < 1e-4:
        return f"{value:.1e}"
    return f"{value:.4g}"


def _line(
    points: Points, at: Callable[[float, float], tuple[float, float]], index: int, name: str, unit: str, is_log: bool
) -> str:
    if not points:
        return ""
    stride = max(1, math.ceil(len(points) / MOST_POINTS))
    kept = [*points[::stride], points[-1]]
    paths: list[list[str]] = [[]]
    for step, y in kept:
        if math.isfinite(y) and (y > 0 or not is_log):
            across, up = at(step, y)
            paths[-1].append(f"{across:.1f},{up:.1f}")
        elif paths[-1]:
            paths.append([])
    title = f"<title>{escape(name)}: {number(points[-1][1])} {escape(unit)} at step {points[-1][0]:,.0f}</title>"
    drawn = []
    for path in filter(None, paths):
        if len(path) == 1:
            across_text, up_text = path[0].split(",")
            drawn.append(f'<circle class="s{index % 6}" cx="{across_text}" cy="{up_text}" r="3">{title}</circle>')
        else:
            drawn.append(f'<polyline class="s{index % 6}" points="{" ".join(path)}">{title}</polyline>')
    return "".join(drawn)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Four to six round numbers from `low` to `high`."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    width = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    width = max(1.0, width) if whole else width
    start = math.ceil(low / width)
    found = [round(float(step * width), 12) for step in np.arange(start, math.floor(high / width) + 1)]
    return [step for step in found if low <= step <= high]
