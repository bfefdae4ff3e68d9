"""Line charts and stacked bars as inline SVG: text and paths only, colours from the page's stylesheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 36
COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#a16207", "#64748b", "#db2777", "#4d7c0f")
MOST_POINTS = 400  # of one curve: more cannot be told apart on the page
RUNNING = 5  # steps of the running mean
Points = Sequence[tuple[float, float]]


def line_chart(lines: Sequence[tuple[str, Points]], unit: str, smooth: bool = False) -> str:
    """Curves over the step, with a legend where there is more than one.

    Args:
        lines: names and (step, value) points, in order of the steps.
        unit: of the values, for readers that do not see the picture.
        smooth: draw each curve pale under its running mean over 5 points.

    Returns:
        A figure: the SVG and, below it, the legend; every text is escaped.
    """
    points = [point for _, series in lines for point in series]
    x_scale = _Scale(min(x for x, _ in points), max(x for x, _ in points), LEFT, WIDTH - RIGHT)
    y_low, y_high = _room(min(y for _, y in points), max(y for _, y in points))
    y_scale = _Scale(y_low, y_high, HEIGHT - BOTTOM, TOP)
    parts = [_axes(x_scale, y_scale)]
    for i, (_, series) in enumerate(lines):
        color, thin = COLORS[i % len(COLORS)], thinned(series)
        if smooth and len(series) >= RUNNING:
            parts.append(_path(thin, x_scale, y_scale, color, "pale"))
            thin = thinned(running_mean(series))
        parts.append(_path(thin, x_scale, y_scale, color, "line"))
    names = ", ".join(name for name, _ in lines)
    label = escape(f"{names} over steps, {unit}", quote=True)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return svg + (legend([name for name, _ in lines]) if len(lines) > 1 else "")


def stacked_bars(rows: Sequence[tuple[str, dict[str, float]]], unit: str) -> str:
    """A horizontal bar a row, its parts one after the other; parts below zero are not drawn."""
    names = list(dict.fromkeys(name for _, parts in rows for name, value in parts.items() if value > 0))
    widest = max((sum(max(0.0, value) for value in parts.values()) for _, parts in rows), default=0) or 1.0
    width, left, height = 860, 110, 30
    drawn = []
    for i, (title, parts) in enumerate(rows):
        x, y = float(left), 6 + i * (height + 8)
        drawn.append(f'<text x="{left - 8}" y="{y + 20}" text-anchor="end" class="tick">{escape(title)}</text>')
        for name in names:
            value = max(0.0, parts.get(name, 0.0))
            length = value / widest * (width - left - 90)
            about = escape(f"{name}: {value:.2f} {unit}")
            color = COLORS[names.index(name) % len(COLORS)]
            drawn.append(f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{height}" fill="{color}">')
            drawn.append(f"<title>{about}</title></rect>")
            x += length
        total = sum(parts.values())
        drawn.append(f'<text x="{x + 8:.1f}" y="{y + 20}" class="tick">{total:.2f} {escape(unit)}</text>')
    box = f"0 0 {width} {len(rows) * (height + 8) + 8}"
    return f'<svg viewBox="{box}" role="img" aria-label="stacked bars">{"".join(drawn)}</svg>{legend(names)}'


def legend(names: Sequence[str]) -> str:
    """Names beside the colours that `line_chart` gives them."""
    keys = (
        f'<span><i style="background:{COLORS[i % len(COLORS)]}"></i>{escape(n)}</span>' for i, n in enumerate(names)
    )
    return f'<div class="legend">{"".join(keys)}</div>'


def running_mean(series: Points) -> list[tuple[float, float]]:
    """The mean of each point and the four before it."""
    found = []
    for i, (x, _) in enumerate(series):
        window = [y for _, y in series[max(0, i - RUNNING + 1) : i + 1]]
        found.append((x, sum(window) / len(window)))
    return found


def thinned(series: Points) -> list[tuple[float, float]]:
    """At most about `MOST_POINTS` points: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(series) <= MOST_POINTS:
        return list(series)
    stretch = math.ceil(2 * len(series) / MOST_POINTS)
    found: list[tuple[float, float]] = []
    for start in range(0, len(series), stretch):
        part = series[start : start + stretch]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        found += sorted(ends)
    return found


class _Scale:
    """Maps values from `low` … `high` to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = (value - self.low) / span if span else 0.5
        return self.start + share * (self.end - self.start)


def _room(low: float, high: float) -> tuple[float, float]:
    """A little air around the values; a constant gets an axis around it."""
    if low == high == 0:
        return 0.0, 1.0
    if low == high:
        return low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    air = 0.06 * (high - low)
    return (0.0 if 0 <= low <= air else low - air), high + air


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers within the range."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"


def _axes(x_scale: _Scale, y_scale: _Scale) -> str:
    parts = []
    for value in ticks(y_scale.low, y_scale.high):
        y = y_scale(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end" class="tick">{_number(value)}</text>')
    steps = [value for value in ticks(x_scale.low, x_scale.high, 6) if value == int(value)]
    for value in steps:
        x = x_scale(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 20}" text-anchor="middle" class="tick">{int(value)}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle" class="axis">step</text>'
    )
    return "".join(parts)


def _path(series: Points, x_scale: _Scale, y_scale: _Scale, color: str, kind: str) -> str:
    if len(series) == 1:
        ((x, y),) = series
        return f'<circle cx="{x_scale(x):.1f}" cy="{y_scale(y):.1f}" r="2.5" fill="{color}"/>'
    corners = " ".join(f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in series)
    return f'<polyline points="{corners}" fill="none" stroke="{color}" class="{kind}"/>'
