"""Charts as inline SVG: bars, areas, curves, a timeline. Colours come from the page's style sheet, so that dark mode and paper work.

All are WIDTH wide in a view box that scales with the page. Every mark has a <title>, which browsers show on hovering.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.report_page.text import esc, short, span, ticks, time_ticks

WIDTH = 880
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 12, 40


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram."""

    low: float
    high: float
    value: float
    said: str  # on hovering


@dataclass(frozen=True)
class Curve:
    """Points (x, y) of one line, its name, and which of style.py's colours it has."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0


@dataclass(frozen=True)
class Row:
    """A line of the timeline: spans (begin, end, class) in seconds, and what is said to the right of them."""

    name: str
    spans: Sequence[tuple[float, float, str]]
    said: str


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{esc(label)}">'
        f"<title>{esc(label)}</title>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}>{esc(text)}</text>'


def _frame(height: float, places: Sequence[float], unit: str = "", scale: float = 1.0) -> list[str]:
    """Horizontal lines at the places of the y axis, the last of which is its top, with their numbers."""
    parts = []
    for place in places:
        y = _y(place, places[-1], height)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{short(round(place * scale, 6))}{unit}", "end"))
    return parts


def _y(value: float, high: float, height: float) -> float:
    return TOP + (height - TOP - BOTTOM) * (1 - value / high)


def histogram(bars: Sequence[Bar], x_name: str, y_name: str, marks: Sequence[tuple[float, str]] = ()) -> str:
    """Bars over a linear axis. marks: places on it with a dashed line and a word."""
    height = 240.0
    low, high = bars[0].low, bars[-1].high
    places = ticks(max(bar.value for bar in bars), 4, whole=True)
    parts = _frame(height, places)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / max(high - low, 1e-9)

    for bar in bars:
        top = _y(bar.value, places[-1], height)
        wide = max(x(bar.high) - x(bar.low) - 1, 0.5)
        tall = max(height - BOTTOM - top, 0)
        parts.append(
            f'<rect x="{x(bar.low):.1f}" y="{top:.1f}" width="{wide:.1f}" height="{tall:.1f}" class="c0">'
            f"<title>{esc(bar.said)}</title></rect>"
        )
    for tick in ticks(high - low, 8):
        if low + tick <= high * 1.0001:
            parts.append(_text(x(low + tick), height - BOTTOM + 16, short(low + tick)))
    for number, (value, word) in enumerate(marks):
        if low <= value <= high:
            at, anchor = x(value), "start" if x(value) < WIDTH * 0.8 else "end"
            shift = 4 if anchor == "start" else -4
            parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{height - BOTTOM}" class="mark"/>')
            parts.append(_text(at + shift, TOP + 10 + 14 * number, word, anchor, "word"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 6, x_name, kind="name"))
    return _svg(height, parts, f"{y_name} by {x_name}")


def over_time(begin: float, step: float, values: Sequence[float], end: float, name: str, unit: str, high: float) -> str:
    """An area of values that each hold for one step, over the run's time from 0 to `end`. high: of the axis; 0: as needed."""
    height = 150.0
    places = [0.0, high / 2, high] if high else ticks(max(values), 3)
    top = places[-1]
    parts = _frame(height, places, unit, 100.0 if unit == "%" else 1.0)

    def x(at: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(1.0, at / max(end, 1e-9))

    corners = [(x(begin), _y(0, top, height))]
    for number, value in enumerate(values):
        level = _y(min(value, top), top, height)
        corners += [(x(begin + number * step), level), (x(begin + (number + 1) * step), level)]
    corners.append((corners[-1][0], _y(0, top, height)))
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
    parts.append(f'<polygon points="{path}" class="area"/>')
    parts.append(f'<polyline points="{path}" class="line"/>')
    parts += _time_axis(end, height)
    return _svg(height, parts, f"{name} over time")


def _time_axis(end: float, height: float) -> list[str]:
    places, unit, each = time_ticks(end)
    wide = (WIDTH - LEFT - RIGHT) / max(end, 1e-9)
    said = [_text(LEFT + place * wide, height - BOTTOM + 16, f"{place / each:g}") for place in places]
    return [*said, _text((LEFT + WIDTH - RIGHT) / 2, height - 6, f"{unit} since the run began", kind="name")]


def curves(lines: Sequence[Curve], x_name: str, y_name: str, chosen: tuple[float, float, str] | None) -> str:
    """Lines over an axis of powers of two, y from a round number below the least value to 1. chosen: a point with a word."""
    height = 280.0
    xs = [x for line in lines for x, _ in line.points] + ([chosen[0]] if chosen else [])
    least = min(y for line in lines for _, y in line.points)
    low = max(0.0, math.floor(least * 10) / 10 if least < 0.9 else math.floor(least * 100) / 100)
    first, last = math.floor(math.log2(min(xs))), max(math.ceil(math.log2(max(xs))), math.floor(math.log2(min(xs))) + 1)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log2(value) - first) / (last - first)

    def y(value: float) -> float:
        return TOP + (height - TOP - BOTTOM) * (1 - (value - low) / max(1 - low, 1e-9))

    parts = []
    for number in range(5):
        value = low + (1 - low) * number / 4
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" class="grid"/>')
        parts.append(_text(LEFT - 6, y(value) + 4, f"{value:.3g}", "end"))
    parts += [_text(x(2.0**power), height - BOTTOM + 16, short(2**power)) for power in range(first, last + 1)]
    for line in lines:
        drawn = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        parts.append(f'<polyline points="{drawn}" class="curve k{line.colour}"/>')
        for a, b in line.points:
            parts.append(
                f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5" class="c{line.colour}">'
                f"<title>{esc(line.name)}: {esc(x_name)} {a:g}, {esc(y_name)} {b:.4f}</title></circle>"
            )
    if chosen is not None:
        at, level, word = chosen
        anchor, shift = ("start", 12) if x(at) < WIDTH * 0.7 else ("end", -12)
        parts.append(f'<circle cx="{x(at):.1f}" cy="{y(level):.1f}" r="8" class="ring"/>')
        parts.append(_text(x(at) + shift, y(level) + 20, word, anchor, "word"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 6, x_name, kind="name"))
    return _svg(height, parts, f"{y_name} by {x_name}")


def timeline(rows: Sequence[Row], end: float) -> str:
    """A line for each stage with its spans in time, and how long they took."""
    each, left, right = 22, 170, 110
    height = TOP + each * len(rows) + BOTTOM
    wide = (WIDTH - left - right) / max(end, 1e-9)
    parts = []
    places, unit, size = time_ticks(end)
    for place in places:
        at = left + place * wide
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{height - BOTTOM}" class="grid"/>')
        parts.append(_text(at, height - BOTTOM + 16, f"{place / size:g}"))
    for number, row in enumerate(rows):
        y = TOP + each * number
        parts.append(_text(left - 8, y + 15, row.name, "end", "label"))
        for begin, stop, kind in row.spans:
            length = max((stop - begin) * wide, 1.5)
            parts.append(
                f'<rect x="{left + begin * wide:.1f}" y="{y + 3}" width="{length:.1f}" height="{each - 6}" rx="2" class="{kind}">'
                f"<title>{esc(row.name)}: {span(stop - begin)}</title></rect>"
            )
        after = left + max(stop for _, stop, _ in row.spans) * wide
        parts.append(_text(after + 6, y + 15, row.said, "start"))
    parts.append(_text((left + WIDTH - right) / 2, height - 6, f"{unit} since the run began", kind="name"))
    return _svg(height, parts, "stages over time")


def shares(rows: Sequence[tuple[str, float, str]]) -> str:
    """A bar from 0 to 100% for each (name, share, what is said to the right)."""
    each, left, right = 22, 170, 250
    height = TOP + each * len(rows) + 8
    wide = WIDTH - left - right
    parts = []
    for number, (name, value, said) in enumerate(rows):
        y = TOP + each * number
        parts.append(_text(left - 8, y + 15, name, "end", "label"))
        parts.append(f'<rect x="{left}" y="{y + 4}" width="{wide}" height="{each - 8}" rx="2" class="track"/>')
        parts.append(
            f'<rect x="{left}" y="{y + 4}" width="{wide * min(1.0, value):.1f}" height="{each - 8}" rx="2" class="c0"/>'
        )
        parts.append(_text(left + wide + 8, y + 15, said, "start"))
    return _svg(height, parts, "share of each")


def ranges(rows: Sequence[tuple[str, float, float, str]]) -> str:
    """For each (name, middle, end, what is said to the right) a bar to the end, in full colour up to the middle; both 0 to 1."""
    each, left, right = 22, 170, 250
    height, wide = TOP + each * len(rows) + 8, WIDTH - left - right
    parts = []
    for number, (name, middle, end, said) in enumerate(rows):
        y = TOP + each * number
        parts.append(_text(left - 8, y + 15, name, "end", "label"))
        for value, kind in ((end, "pale"), (middle, "c0")):
            parts.append(
                f'<rect x="{left}" y="{y + 4}" width="{wide * value:.1f}" height="{each - 8}" rx="2" class="{kind}"/>'
            )
        parts.append(_text(left + wide * end + 8, y + 15, said, "start"))
    return _svg(height, parts, "median and 99th percentile of each")


def stacked(parts_of: Sequence[tuple[str, float, str]]) -> str:
    """One bar of parts (name, value, class) that add up to the whole."""
    height, total = 34, sum(value for _, value, _ in parts_of)
    parts, at = [], 0.0
    for name, value, kind in parts_of:
        wide = WIDTH * value / max(total, 1e-9)
        if value > 0:
            parts.append(
                f'<rect x="{at:.1f}" y="4" width="{max(wide, 2):.1f}" height="26" class="{kind}">'
                f"<title>{esc(name)}: {value:,.0f}</title></rect>"
            )
        at += wide
    return _svg(height, parts, "rows by what became of them")
