"""The chart of a comparison: one mark for each row, its name beside it, and a curve through marks that belong together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from secateur.core.quantities import number
from secateur.recipe.charts import WIDTH, drawable, line, short, svg, text, ticks

COLOURS = 6
LEFT, RIGHT, TOP, HEIGHT = 64.0, WIDTH - 10, 14.0, 330.0
LETTER, TALL = 6.7, 15.0  # size of a label's letters, in units of the chart
Mark = Literal["circle", "square", "triangle", "diamond"]
CORNERS: dict[Mark, list[tuple[float, float]]] = {
    "square": [(-5, -5), (5, -5), (5, 5), (-5, 5)],
    "triangle": [(0, -6.5), (6.5, 5), (-6.5, 5)],
    "diamond": [(0, -7), (7, 0), (0, 7), (-7, 0)],
}
MARKS: tuple[Mark, ...] = ("circle", "square", "triangle", "diamond")


@dataclass(frozen=True)
class Point:
    """One mark.

    Attributes:
        x: horizontal value.
        y: vertical value, on a logarithmic scale.
        label: what stands beside it where there is room.
        words: what is shown when it is pointed at.
        series: decides colour and form; points of one number look alike.
        curve: points with the same text are joined in the order of `x`; None joins nothing.
    """

    x: float
    y: float
    label: str
    words: str
    series: int = 0
    curve: str | None = None


def mark_of(series: int) -> tuple[str, Mark]:
    """Return the colour class and the form of a series: six colours, then six again with another form."""
    return f"c{series % COLOURS}", MARKS[series // COLOURS % len(MARKS)]


def scatter(
    points: Sequence[Point],
    *,
    name: str,
    axis: str,
    show: Callable[[float], str],
    logarithmic: bool = False,
    reference: tuple[float, str] | None = None,
) -> str:
    """Return the marks of `points` over a vertical logarithmic scale.

    Args:
        points: those whose values are not finite, or not positive on a logarithmic scale, are left out.
        name: what the chart is, for those who cannot see it.
        axis: what the horizontal scale is.
        show: writes a horizontal value at a tick.
        logarithmic: the horizontal scale is logarithmic as well.
        reference: a vertical value to compare with, and what it is: a line across the chart.
    """
    seen = [p for p in points if drawable(p.y) and (drawable(p.x) if logarithmic else math.isfinite(p.x))]
    if not seen:
        return ""
    heights = [p.y for p in seen] + ([reference[0]] if reference and drawable(reference[0]) else [])
    low, high = _span([math.log10(value) for value in heights], 0.08)
    start, end = _span([math.log10(p.x) if logarithmic else p.x for p in seen], 0.06)

    def across(value: float) -> float:
        place = math.log10(value) if logarithmic else value
        return LEFT + (RIGHT - LEFT) * (place - start) / (end - start)

    def down(value: float) -> float:
        return TOP + HEIGHT * (high - math.log10(value)) / (high - low)

    parts = []
    for tick in _readable(low, high):
        parts.append(line("rule", LEFT, RIGHT, down(tick), down(tick)))
        parts.append(text(LEFT - 10, down(tick) + 4, number(tick, 2), "tick", "end"))
    steps = _readable(start, end) if logarithmic else _even(start, end)
    parts += [text(across(tick), TOP + HEIGHT + 20, show(tick), "tick", "middle") for tick in steps]
    parts.append(text((LEFT + RIGHT) / 2, TOP + HEIGHT + 42, axis, "tick", "middle"))
    taken: list[tuple[float, float, float, float]] = []
    if reference and drawable(reference[0]):
        y = down(reference[0])
        words = f"{reference[1]}: {number(reference[0], 4)}"
        parts.append(f"<g><title>{escape(words)}</title>{line('reference', LEFT, RIGHT, y, y)}</g>")
        parts.append(text(RIGHT, y - 6, words, "tick", "end"))
        taken.append((RIGHT - LETTER * len(words), y - 6 - TALL, RIGHT, y - 2))
    places = [(across(p.x), down(p.y)) for p in seen]
    parts += _curves(seen, places)
    taken += [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    for point, (x, y) in zip(seen, places, strict=True):
        parts.append(f"<g><title>{escape(point.words)}</title>{_mark(point.series, x, y)}</g>")
    for point, (x, y) in zip(seen, places, strict=True):
        parts.append(_label(short(point.label, 34), x, y, taken))
    return svg(parts, TOP + HEIGHT + 50, name)


def swatch(series: int) -> str:
    """Return the mark of a series for a legend."""
    return f'<svg viewBox="0 0 14 14">{_mark(series, 7, 7)}</svg>'


def _span(values: Sequence[float], margin: float) -> tuple[float, float]:
    """Return the ends of a scale that shows `values` with room at both sides."""
    low, high = min(values), max(values)
    room = max((high - low) * margin, 1e-9 if high > low else 0.1)
    return low - room, high + room


def _readable(low: float, high: float) -> list[float]:
    """Return round values between 10^low and 10^high: powers of ten, or even steps where few of those fit."""
    found = ticks(low, high)
    return found if len(found) >= 3 else _even(10.0**low, 10.0**high)


def _even(low: float, high: float) -> list[float]:
    """Return about five round values between `low` and `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [step * (first + k) for k in range(int((high - first * step) / step + 1e-9) + 1)]


def _curves(points: Sequence[Point], places: Sequence[tuple[float, float]]) -> list[str]:
    """Return the lines through points that belong together."""
    joined: dict[str, list[tuple[float, float]]] = {}
    colours = {point.curve: point.series for point in points if point.curve is not None}
    for point, place in zip(points, places, strict=True):
        if point.curve is not None:
            joined.setdefault(point.curve, []).append(place)
    return [
        f'<polyline class="curve s{colours[curve] % COLOURS}" points="'
        + " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(through))
        + '"/>'
        for curve, through in joined.items()
        if len(through) > 1
    ]


def _mark(series: int, x: float, y: float) -> str:
    colour, form = mark_of(series)
    if form == "circle":
        return f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>'
    path = " ".join(f"{x + right:.1f},{y + under:.1f}" for right, under in CORNERS[form])
    return f'<polygon class="{colour}" points="{path}"/>'


def _label(words: str, x: float, y: float, taken: list[tuple[float, float, float, float]]) -> str:
    """Return a label beside its mark where it covers nothing; nothing if there is no room (the table has it)."""
    wide = LETTER * len(words)
    for left, base, anchor in (
        (x + 10, y + 4, "start"),
        (x - 10 - wide, y + 4, "end"),
        (x - wide / 2, y - 11, "middle"),
        (x - wide / 2, y + 20, "middle"),
        (x + 8, y - 9, "start"),
        (x + 8, y + 17, "start"),
        (x - 8 - wide, y - 9, "end"),
        (x - 8 - wide, y + 17, "end"),
    ):
        box = (left, base - TALL + 4, left + wide, base + 2)
        inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= TOP - 8 and box[3] <= TOP + HEIGHT + 4
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            start = {"start": left, "middle": left + wide / 2, "end": left + wide}[anchor]
            return text(start, base, words, "label", anchor)
    return ""


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
