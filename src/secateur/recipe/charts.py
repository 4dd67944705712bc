"""Charts of a report as inline SVG and HTML: no script, no network, colours from the page's style sheet.

Every mark of an SVG has a `title`, which browsers show on hover and screen readers read. Colours are classes (`c0`,
`c1`, ... and `h0` to `h9`): light and dark are the page's matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from secateur.core.quantities import number

WIDTH = 720.0
LABELS = 150.0  # units left of a chart, for names
SHADES = 10


@dataclass(frozen=True)
class Bar:
    """One bar: what it is, how long, and what stands at its end."""

    label: str
    value: float
    words: str
    colour: int = 0


def bars(data: Sequence[Bar], *, name: str, logarithmic: bool = False) -> str:
    """Return horizontal bars from 0, not SVG but boxes, whose text stays legible on a phone.

    Args:
        data: in order, from the top; not finite or not positive values have no bar, only words.
        name: what the chart is, for those who cannot see it.
        logarithmic: bars begin at 1 and are as long as the logarithm: for perplexities.
    """
    high = max((_length(bar.value, logarithmic) for bar in data), default=0.0) or 1.0
    parts = []
    for bar in data:
        share = max(_length(bar.value, logarithmic) / high, 0.004)
        parts.append(
            f'<div class="bar"><span class="name">{escape(bar.label)}</span><span class="track">'
            f'<span class="fill f{bar.colour}" style="width:calc((100% - 7rem) * {share:.4f})"></span>'
            f'<span class="value">{escape(bar.words)}</span></span></div>'
        )
    return f'<div class="bars" role="group" aria-label="{escape(name)}">{"".join(parts)}</div>'


@dataclass(frozen=True)
class Pair:
    """Two values of one thing, before and after; None where there is none."""

    label: str
    before: float
    after: float


def pairs(data: Sequence[Pair], *, name: str, axis: str) -> str:
    """Return one column per thing with a dot for before and a dot for after on a logarithmic scale.

    Args:
        data: in order, from the left; only positive finite values have a dot.
        name: what the chart is, for those who cannot see it.
        axis: what the columns are.
    """
    values = [v for pair in data for v in (pair.before, pair.after) if drawable(v)]
    if not values:
        return ""
    low, high = math.floor(math.log10(min(values)) * 2) / 2, math.ceil(math.log10(max(values)) * 2) / 2
    high = high if high > low else low + 0.5
    left, top, height = 64.0, 12.0, 220.0
    pitch = (WIDTH - left - 12) / len(data)
    radius = min(5.5, max(2.0, pitch * 0.3))

    def vertical(value: float) -> float:
        return top + height * (high - math.log10(value)) / (high - low)

    parts = [_rule(left, WIDTH - 8, vertical(tick), number(tick, 2)) for tick in ticks(low, high)]
    every = max(1, math.ceil(len(data) / 16))
    for index, pair in enumerate(data):
        x = left + pitch * (index + 0.5)
        words = f"{axis} {pair.label}: {number(pair.before, 3)} before, {number(pair.after, 3)} after"
        parts.append(f"<g><title>{escape(words)}</title>")
        if drawable(pair.before) and drawable(pair.after):
            parts.append(line("link", x, x, vertical(pair.before), vertical(pair.after)))
        for value, kind in ((pair.before, "d1"), (pair.after, "c2")):
            if drawable(value):
                parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{vertical(value):.1f}" r="{radius:.1f}"/>')
        parts.append("</g>")
        if index % every == 0:
            parts.append(text(x, top + height + 20, short(pair.label, 8), "tick", "middle"))
    parts.append(text(left + (WIDTH - left) / 2, top + height + 40, axis, "tick", "middle"))
    return svg(parts, top + height + 48, name)


@dataclass(frozen=True)
class Cell:
    """One field of a grid; `level` 0..1 is its shade, None where there is no value."""

    row: str
    column: int
    level: float | None
    words: str


def grid(cells: Sequence[Cell], *, name: str, axis: str) -> str:
    """Return a field of shaded cells, rows by name, columns by number.

    Args:
        cells: in any order; rows stand in the order they first appear.
        name: what the chart is, for those who cannot see it.
        axis: what the columns are.
    """
    rows = list(dict.fromkeys(cell.row for cell in cells))
    columns = sorted({cell.column for cell in cells})
    if not rows:
        return ""
    pitch = (WIDTH - LABELS - 4) / len(columns)
    width, tall = min(pitch, 44.0), 24.0
    gap = 2.0 if width > 8 else 0.5
    place = {column: index for index, column in enumerate(columns)}
    parts = [
        text(LABELS - 12, tall * row + tall / 2 + 5, short(label, 22), "name", "end") for row, label in enumerate(rows)
    ]
    for cell in cells:
        shade = "none" if cell.level is None else f"h{min(int(cell.level * SHADES), SHADES - 1)}"
        x, y = LABELS + width * place[cell.column], tall * rows.index(cell.row)
        parts.append(
            f'<rect class="{shade}" x="{x:.2f}" y="{y:.1f}" width="{width - gap:.2f}" height="{tall - gap:.1f}" rx="2">'
            f"<title>{escape(cell.words)}</title></rect>"
        )
    bottom = tall * len(rows)
    every = max(1, math.ceil(len(columns) / 16))
    for column in columns[::every]:
        x = LABELS + width * (place[column] + 0.5) - gap / 2
        parts.append(text(x, bottom + 18, str(column), "tick", "middle"))
    parts.append(text(LABELS + width * len(columns) / 2, bottom + 38, axis, "tick", "middle"))
    return svg(parts, bottom + 46, name)


def levels(values: Iterable[float | None], *, logarithmic: bool) -> list[float | None]:
    """Return every value's place between the smallest and the largest, 0..1, None for None and what is not finite."""
    moved: list[float | None] = []
    for value in values:
        if value is None or not math.isfinite(value) or (logarithmic and value <= 0):
            moved.append(None)
        else:
            moved.append(math.log10(value) if logarithmic else value)
    known = [value for value in moved if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    spread = high - low
    return [None if value is None else ((value - low) / spread if spread > 1e-12 else 0.5) for value in moved]


def _length(value: float, logarithmic: bool) -> float:
    if not math.isfinite(value) or value <= 0:
        return 0.0
    return math.log(max(value, 1.0)) if logarithmic else value


def drawable(value: float | None) -> bool:
    """Whether a value has a place on a logarithmic scale."""
    return value is not None and math.isfinite(value) and value > 0


def ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten between 10^low and 10^high, with twos and fives where few fit."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**p for p in powers for f in factors if low - 1e-9 <= math.log10(f * 10.0**p) <= high + 1e-9]
        if len(found) >= 3:
            break
    return found[:: max(1, len(found) // 6)]


def _rule(left: float, right: float, y: float, words: str) -> str:
    return line("rule", left, right, y, y) + text(left - 10, y + 4, words, "tick", "end")


def line(kind: str, x1: float, x2: float, y1: float, y2: float) -> str:
    """Return a straight line of the class `kind`."""
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, words: str, kind: str, anchor: str) -> str:
    """Return a piece of text of the class `kind`."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def short(words: str, most: int) -> str:
    """Return `words`, their middle left out beyond `most` characters."""
    return words if len(words) <= most else f"{words[: most // 2]}…{words[-(most - most // 2 - 1) :]}"


def svg(parts: Iterable[str], height: float, name: str) -> str:
    """Return a chart as wide as all of them."""
    body = "".join(parts)
    return f'<svg role="img" aria-label="{escape(name)}" viewBox="0 0 {WIDTH:.0f} {height:.0f}">{body}</svg>'
