"""Charts as inline SVG. Colours are CSS variables of the page, so that light and dark need one drawing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

from jaxdistill.report.data import short_count

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 30
MOST_POINTS = 240
MOST_MARKS = 40
SERIES_COLOURS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A named line: points in order of x."""

    name: str
    points: tuple[tuple[float, float], ...]


def line_chart(
    title: str, unit: str, series: Sequence[Series], *, x_title: str = "tokens", from_zero: bool = False
) -> str:
    """A figure with its legend, which tells each line's last value; "" when there are no points."""
    series = [dataclasses.replace(s, points=_thinned(s.points)) for s in series if s.points]
    if not series:
        return ""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + ([0.0] if from_zero else [])
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5), ticks(min(ys), max(ys), 5)
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_low) / (y_high - y_low) if y_high > y_low else 0.5
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in y_ticks:
        _, place = at(x_low, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{place + 4:.1f}" text-anchor="end">{tick(y)}</text>')
    for x in (x for x in x_ticks if x_low <= x <= x_high):
        place, _ = at(x, y_low)
        anchor = "end" if place > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<text class="tick" x="{place:.1f}" y="{HEIGHT - 10}" text-anchor="{anchor}">{tick(x)}</text>')
    for index, each in enumerate(series):
        parts.append(_line(each, index, at))
    legend = "".join(
        f'<span class="key {_line_colour(index)}"><i></i>{escape(each.name)} <b>{value(each.points[-1][1])}</b></span>'
        for index, each in enumerate(series)
    )
    label = f"{title}, {unit}, over {x_title}"
    return (
        f'<figure class="card"><figcaption><h3>{escape(title)}</h3><span class="unit">{escape(unit)}</span>'
        f'<div class="legend">{legend}</div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
        f'<div class="axis">{escape(x_title)}</div></figure>'
    )


def _line(series: Series, index: int, at) -> str:
    places = [at(x, y) for x, y in series.points]
    colour = _line_colour(index)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<polyline class="line {colour}" points="{path}"/>' if len(places) > 1 else ""
    if len(places) > MOST_MARKS:
        return drawn + '<circle class="mark {}" cx="{:.1f}" cy="{:.1f}" r="3.5"/>'.format(colour, *places[-1])
    radius = 3.5 if len(places) <= 12 else 2.2
    for (x, y), (px, py) in zip(series.points, places, strict=True):
        told = escape(f"{series.name}: {value(y)} at {short_count(x)}")
        mark = f'<circle class="mark {colour}" cx="{px:.1f}" cy="{py:.1f}" r="{radius}">'
        drawn += f"{mark}<title>{told}</title></circle>"
    return drawn


def _line_colour(index: int) -> str:
    """Lines begin with the strongest colour; dots begin with the quietest, which is the teacher's."""
    return f"c{(2, 1, 3, 0)[index % SERIES_COLOURS]}"


def dot_rows(
    title: str, unit: str, rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, names: Sequence[str]
) -> str:
    """One row for each label with a dot for each named value, so that distances can be seen; "" without values.

    names: all names in the order of their colours, which charts side by side share.
    """
    present = {name for _, values in rows for name, _ in values}
    numbers = [number for _, values in rows for _, number in values]
    if not numbers:
        return ""
    left, step = 104, 30
    height = TOP + step * len(rows) + BOTTOM
    scale = ticks(0.0, max(numbers), 6)
    high = max(scale[-1], max(numbers))

    def across(number: float) -> float:
        return left + number / high * (WIDTH - left - RIGHT) if high else left

    parts = []
    for mark in scale:
        x = across(mark)
        anchor = "end" if x > WIDTH - RIGHT - 10 else "middle"
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 10}" text-anchor="{anchor}">{tick(mark)}</text>')
    for row, (label, values) in enumerate(rows):
        y = TOP + step * (row + 0.5)
        places = [across(number) for _, number in values]
        shown = label if len(label) <= 15 else label[:14] + "…"
        parts.append(f'<text class="label" x="{left - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(shown)}</text>')
        if values:
            parts.append(f'<line class="span" x1="{min(places):.1f}" x2="{max(places):.1f}" y1="{y}" y2="{y}"/>')
        for (name, number), x in zip(values, places, strict=True):
            colour = f"c{names.index(name) % SERIES_COLOURS}"
            told = f"{name}, {label}: {value(number)}"
            parts.append(
                f'<circle class="mark {colour}" cx="{x:.1f}" cy="{y}" r="5"><title>{escape(told)}</title></circle>'
            )
    legend = "".join(
        f'<span class="key c{index % SERIES_COLOURS} dot"><i></i>{escape(name)}</span>'
        for index, name in enumerate(names)
        if name in present
    )
    return (
        f'<figure class="card"><figcaption><h3>{escape(title)}</h3><span class="unit">{escape(unit)}</span>'
        f'<div class="legend">{legend}</div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def front_chart(
    title: str,
    unit: str,
    points: Sequence[tuple[str, float, float, float]],
    *,
    front: Sequence[int],
    x_title: str,
) -> str:
    """Named points (name, x, y before, y after): an open dot where each began, a full one where it ended, a line
    through those of the front; "" when there are none."""
    if not points:
        return ""
    width, height = 2 * WIDTH, int(1.6 * HEIGHT)
    xs = [x for _, x, _, _ in points]
    ys = [y for _, _, *both in points for y in both]
    y_ticks = ticks(min(ys), max(ys), 6)
    margin = 0.06 * (max(xs) - min(xs)) or 0.06 * max(xs)
    x_low, x_high, y_low, y_high = min(xs) - margin, max(xs) + margin, y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return LEFT + across * (width - LEFT - RIGHT), height - BOTTOM - up * (height - TOP - BOTTOM)

    parts = []
    for y in y_ticks:
        _, place = at(x_low, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{place + 4:.1f}" text-anchor="end">{tick(y)}</text>')
    for x in (x for x in ticks(x_low, x_high, 6) if x_low <= x <= x_high):
        place, _ = at(x, y_low)
        parts.append(f'<text class="tick" x="{place:.1f}" y="{height - 10}" text-anchor="middle">{tick(x)}</text>')
    line = " ".join("{:.1f},{:.1f}".format(*at(points[i][1], points[i][3])) for i in front)
    parts.append(f'<polyline class="line c2" points="{line}"/>')
    for index, (name, x, before, after) in enumerate(points):
        (across, start), (_, end) = at(x, before), at(x, after)
        told = escape(f"{name}: {value(x)} {x_title}, {value(before)} before, {value(after)} after")
        colour = "c2" if index in front else "c0"
        parts.append(f'<line class="span thin" x1="{across:.1f}" x2="{across:.1f}" y1="{start:.1f}" y2="{end:.1f}"/>')
        parts.append(
            f'<circle class="mark open" cx="{across:.1f}" cy="{start:.1f}" r="4"><title>{told}</title></circle>'
        )
        parts.append(
            f'<circle class="mark {colour}" cx="{across:.1f}" cy="{end:.1f}" r="5"><title>{told}</title></circle>'
        )
    keys = (("c0 dot open", "before training"), ("c0 dot", "after"), ("c2 dot", "after, on the Pareto front"))
    legend = "".join(f'<span class="key {style}"><i></i>{text}</span>' for style, text in keys)
    return (
        f'<figure class="card"><figcaption><h3>{escape(title)}</h3><span class="unit">{escape(unit)}</span>'
        f'<div class="legend">{legend}</div></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(f"{title}, {unit}, over {x_title}")}">'
        f'{"".join(parts)}</svg><div class="axis">{escape(x_title)}</div></figure>'
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from at most `low` to at least `high`."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick(number: float) -> str:
    """A round number in few characters."""
    if number == 0:
        return "0"
    if abs(number) >= 1000:
        return short_count(number)
    return f"{number:.6g}" if abs(number) >= 1e-3 else f"{number:.0e}".replace("e-0", "e-")


def value(number: float) -> str:
    """A measured number in about four digits."""
    if number == 0:
        return "0"
    if abs(number) >= 1000:
        return short_count(number)
    return f"{number:.4g}" if abs(number) >= 1e-3 else f"{number:.2e}".replace("e-0", "e-")


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Means of runs of points, where there are more than a line can show; the last point stays as it is."""
    if len(points) <= MOST_POINTS:
        return tuple(points)
    size = math.ceil(len(points) / MOST_POINTS)
    runs = [points[start : start + size] for start in range(0, len(points) - 1, size)]
    means = [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]
    return (*means[:-1], points[-1])
