"""Numbers as people read them, and text as HTML needs it."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence


def esc(value: object) -> str:
    """The value's text with everything that HTML would take for its own replaced. All text from data goes through it."""
    return html.escape(str(value), quote=True)


def count(value: float) -> str:
    """`1,234`; from a million on `1.23 M`."""
    if abs(value) >= 1e9:
        return f"{value / 1e9:,.2f} G"
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.2f} M"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 1 else f"{value:.2g}"


def plural(number: float, noun: str) -> str:
    """`1 piece`, `1,200 pieces`."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def short(value: float) -> str:
    """For axes: `0`, `0.5`, `250`, `12k`, `3.5M`."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def size(num_bytes: float) -> str:
    """`5.2 MB`."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:.0f} bytes" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError("unreachable")


def span(seconds: float) -> str:
    """`0.12 s`, `8.2 s`, `3 min 05 s`, `2 h 07 min`, `3 d 04 h`."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24:02d} h"


def share(value: float) -> str:
    """`97%`, `0.3%`."""
    return f"{value:.0%}" if value >= 0.1 or value == 0 else f"{100 * value:.2g}%"


def ticks(high: float, at_most: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers from 0 up to and beyond `high`; whole: no fractions."""
    if high <= 0:
        return [0.0, 1.0]
    raw = high / at_most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, float(math.ceil(step)))
    return [step * number for number in range(math.ceil(high / step - 1e-9) + 1)]


def time_ticks(seconds: float, at_most: int = 8) -> tuple[list[float], str, float]:
    """Positions in seconds of round times up to `seconds`, the unit they are told in, and its seconds."""
    unit, each = next(
        ((name, size) for name, size in (("h", 3600.0), ("min", 60.0)) if seconds >= 3 * size), ("s", 1.0)
    )
    places = [tick * each for tick in ticks(seconds / each, at_most)]
    return [place for place in places if place <= seconds * 1.001], unit, each


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; `numbers` are the columns that are aligned right."""
    classes = [' class="n"' if place in numbers else "" for place in range(len(head))]

    def line(cells: Sequence[str], tag: str) -> str:
        said = (f"<{tag}{name}>{cell}</{tag}>" for cell, name in zip(cells, classes, strict=True))
        return f"<tr>{''.join(said)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'
