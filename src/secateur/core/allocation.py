"""One budget, divided: how many weights each linear loses, so that the total is the integer that was asked for.

Planners say what they would like each linear's sparsity to be, or what each choice would cost; what is possible is
settled here. A linear cannot lose any number of weights: one per row at least where rows are pruned alike, one per group
for an N:M pattern. That number is its step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from secateur.core.errors import PatternError
from secateur.core.pattern import NM, Pattern, Unstructured, pruned_count

CELLS = 100_000_000  # entries of the exact knapsack's table; above it the Lagrangian form is used
STATES = 1 << 18  # totals that are searched for the last few weights of a budget


@dataclass(frozen=True)
class Prunable:
    """One linear that shares a budget with others.

    Attributes:
        name: module name.
        block: number of its block.
        rows: out_features.
        columns: in_features.
        frozen: zeros it must have at least, in a count its pattern can have.
    """

    name: str
    block: int
    rows: int
    columns: int
    frozen: int = 0

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Budget:
    """What linears may lose together.

    Attributes:
        linears: those that share it.
        pattern: what each would get without a plan.
        scope: what an unstructured pattern counts over: `row` or `layer`.
    """

    linears: tuple[Prunable, ...]
    pattern: Pattern
    scope: Literal["row", "layer"]

    @property
    def size(self) -> int:
        """Number of weights of all linears."""
        return sum(linear.size for linear in self.linears)

    @property
    def total(self) -> int:
        """Weights to prune in all linears together: `floor(sparsity * size)`."""
        if isinstance(self.pattern, NM):
            return sum(linear.size // self.pattern.m * (self.pattern.m - self.pattern.n) for linear in self.linears)
        return pruned_count(self.pattern.sparsity, self.size)

    def step(self, linear: Prunable) -> int:
        """Return what the number of zeros of `linear` is a multiple of."""
        if isinstance(self.pattern, NM):
            return linear.size // self.pattern.m
        return linear.rows if self.scope == "row" else 1

    def pattern_of(self, linear: Prunable, zeros: int) -> Pattern:
        """Return the pattern by which `linear` loses exactly `zeros` weights, a multiple of its step."""
        if isinstance(self.pattern, NM):
            return NM(self.pattern.m - zeros * self.pattern.m // linear.size, self.pattern.m)
        return Unstructured(zeros / linear.size, self.pattern.scope)

    def zeros_of(self, linear: Prunable, pattern: Pattern) -> int:
        """Return how many weights `linear` loses by `pattern`."""
        if isinstance(pattern, NM):
            return linear.size // pattern.m * (pattern.m - pattern.n)
        if pattern.counted_over(self.scope) == "row":
            return linear.rows * pruned_count(pattern.sparsity, linear.columns)
        return pruned_count(pattern.sparsity, linear.size)

    def bounds(self, linear: Prunable, least: float = 0.0, most: float = 1.0) -> tuple[int, int]:
        """Return the fewest and the most zeros of `linear` between two sparsities, frozen zeros respected."""
        step = self.step(linear)
        low = max(math.ceil(least * linear.size / step - 1e-9) * step, -(-linear.frozen // step) * step)
        high = math.floor(most * linear.size / step + 1e-9) * step
        return low, max(low, high)

    def near(
        self,
        wanted: Mapping[str, float],
        least: float = 0.0,
        most: float = 1.0,
        units: Mapping[str, Hashable] | None = None,
    ) -> dict[str, Pattern]:
        """Return patterns whose sparsities are those `wanted`, all shifted alike until the budget is met.

        Args:
            wanted: `{linear name: sparsity}`; only differences matter, since all are shifted.
            least: lower bound of every sparsity.
            most: upper bound of every sparsity.
            units: linears of one unit get the same N:M; an unstructured budget is settled per linear all the same.

        Raises:
            PatternError: if the bounds or frozen zeros leave no room for the budget.
        """
        groups: dict[Hashable, list[Prunable]] = {}
        for index, linear in enumerate(self.linears):
            together = units is not None and isinstance(self.pattern, NM)
            groups.setdefault(units[linear.name] if together and units is not None else index, []).append(linear)
        parts = list(groups.values())
        sizes = [sum(linear.size for linear in part) for part in parts]
        steps = [sum(self.step(linear) for linear in part) for part in parts]
        low, high = [], []
        for part, size in zip(parts, sizes, strict=True):
            ends = [self.bounds(linear, least, most) for linear in part]
            # linears of a unit lose the same share of their weights: the tightest bound holds for all
            low.append(max(end * size // linear.size for (end, _), linear in zip(ends, part, strict=True)))
            high.append(min(end * size // linear.size for (_, end), linear in zip(ends, part, strict=True)))
            high[-1] = max(low[-1], high[-1])
        self.refuse_outside(sum(low), sum(high), least, most)
        mean = [
            sum(wanted[linear.name] * linear.size for linear in part) / size
            for part, size in zip(parts, sizes, strict=True)
        ]
        real = level(mean, sizes, self.total, low, high)
        counts = settle(real, steps, low, high, self.total)
        return {
            linear.name: self.pattern_of(linear, count * linear.size // size)
            for part, count, size in zip(parts, counts, sizes, strict=True)
            for linear in part
        }

    def refuse_frozen(self) -> None:
        """Raise PatternError if zeros that stay exceed the budget, before any work is done."""
        low = sum(self.bounds(linear)[0] for linear in self.linears)
        self.refuse_outside(low, self.size, 0.0, 1.0)

    def refuse_outside(self, low: int, high: int, least: float, most: float) -> None:
        """Raise PatternError unless between `low` and `high` zeros in all are as many as are wanted."""
        if low <= self.total <= high:
            return
        frozen = sum(linear.frozen for linear in self.linears)
        why = f"sparsities between {_percent(least)} and {_percent(most)}"
        if frozen:
            why += f" and {frozen} zeros that stay"
        raise PatternError(
            f"a sparsity of {_percent(self.total / self.size)} over {len(self.linears)} linears cannot be planned with "
            f"{why}: between {_percent(low / self.size)} and {_percent(high / self.size)} fit",
            hint="change the pattern or the bounds of the planner",
        )


def level(
    wanted: Sequence[float], sizes: Sequence[int], total: int, low: Sequence[int], high: Sequence[int]
) -> list[float]:
    """Return `sizes * (wanted + c)`, cut to `low .. high`, with the `c` that makes the sum `total` (water filling).

    Args:
        wanted: a sparsity per part.
        sizes: weights of each part.
        total: zeros in all, between the sums of `low` and `high`.
        low: fewest zeros of each part.
        high: most zeros of each part.
    """
    share, size = np.asarray(wanted, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    bottom, top = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
    under, over = -1.0 - float(share.max()), 2.0 - float(share.min())  # shifts at which all are at a bound
    for _ in range(200):
        middle = (under + over) / 2
        if float(np.clip(size * (share + middle), bottom, top).sum()) < total:
            under = middle
        else:
            over = middle
    result: list[float] = np.clip(size * (share + over), bottom, top).tolist()
    return result


def settle(
    wanted: Sequence[float], steps: Sequence[int], low: Sequence[int], high: Sequence[int], total: int
) -> list[int]:
    """Return multiples of `steps` near `wanted` whose sum is `total`, or the largest possible sum below it.

    The largest remainders are rounded up; what is then still missing is made up for by the shortest series of steps up
    and down, which exists wherever the greatest common divisor of the steps divides it and there is room.

    Args:
        wanted: real numbers, their sum near `total`.
        steps: the result's parts are multiples of these.
        low: least value of each part, a multiple of its step.
        high: largest value of each part; the largest multiple below counts.
        total: sum to reach.
    """
    count = len(wanted)
    parts = [min(max(int(w // s) * s, a), b // s * s) for w, s, a, b in zip(wanted, steps, low, high, strict=True)]
    left = total - sum(parts)

    def room(i: int, sign: int) -> bool:
        return low[i] <= parts[i] + sign * steps[i] <= high[i]

    def lag(i: int) -> float:
        return (wanted[i] - parts[i]) / steps[i]

    while left:
        sign = 1 if left > 0 else -1
        moved = False
        for i in sorted(range(count), key=lambda i: (-sign * lag(i), i)):
            if steps[i] <= sign * left and room(i, sign):
                parts[i] += sign * steps[i]
                left -= sign * steps[i]
                moved = True
        if not moved:
            break
    moves = {(step, sign) for step in steps for sign in (1, -1)}
    while left and moves:
        series = _series(left, sorted(moves))
        if not series:
            break
        for step, sign in series:
            able = [i for i in range(count) if steps[i] == step and room(i, sign)]
            if not able:
                moves.discard((step, sign))
                break
            chosen = max(able, key=lambda i: (sign * lag(i), -i))
            parts[chosen] += sign * step
            left -= sign * step
    return parts


def _series(left: int, moves: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the fewest `(step, sign)` that bring `left` down to the least number, not negative, that they can reach."""
    divisor = math.gcd(*(step for step, _ in moves))
    reach = 2 * max(*(step for step, _ in moves), abs(left))
    if reach // divisor > STATES:
        return []
    came: dict[int, tuple[int, tuple[int, int]] | None] = {left: None}
    queue, goal = deque([left]), left % divisor
    best = left
    while queue and goal not in came:
        here = queue.popleft()
        for step, sign in moves:
            there = here - sign * step
            if abs(there) <= reach and there not in came:
                came[there] = (here, (step, sign))
                queue.append(there)
    if goal in came:
        best = goal
    else:
        best = min((value for value in came if value >= 0), default=left)
    series: list[tuple[int, int]] = []
    while (link := came[best]) is not None:
        best, move = link
        series.append(move)
    return sorted(series, key=lambda move: -move[1])


def hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the corners of the lower convex hull of a curve.

    Args:
        points: `(zeros, cost)`, zeros rising.
    """
    corners: list[tuple[int, float]] = []
    for point in points:
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def fill(curves: Sequence[Sequence[tuple[int, float]]], total: int) -> list[float]:
    """Return the zeros of each part that make the sum of its curves least: the cheapest stretches of all hulls first.

    Exact for curves that are convex and straight between their points: at the optimum all have one slope (the Lagrange
    multiplier of the budget), except those at an end.

    Args:
        curves: for each part `(zeros, cost)`, zeros rising; first and last are its bounds.
        total: sum to reach, between the sums of the first and the last.
    """
    corners = [hull(curve) for curve in curves]
    result = [float(curve[0][0]) for curve in corners]
    left = float(total - sum(curve[0][0] for curve in corners))
    stretches = sorted(
        (_slope(start, stop), index, stop[0] - start[0])
        for index, curve in enumerate(corners)
        for start, stop in pairwise(curve)
    )
    first = 0
    while left > 0 and first < len(stretches):
        last = first
        while last < len(stretches) and stretches[last][0] == stretches[first][0]:
            last += 1
        alike = stretches[first:last]  # equally cheap: each gives the same share of what it has
        part = min(1.0, left / sum(width for _, _, width in alike))
        for _, index, width in alike:
            result[index] += part * width
        left -= part * sum(width for _, _, width in alike)
        first = last
    return result


def choose(options: Sequence[Sequence[tuple[int, float]]], total: int) -> list[int]:
    """Return the index of one option for each part, the costs' sum least among those with `total` zeros in all.

    A knapsack with one choice per part, solved exactly by dynamic programming in units of the greatest common divisor
    of all differences; where that table would be too large, by a Lagrange multiplier and single steps. Where no choice
    gives `total`, the largest sum below it counts.

    Args:
        options: for each part `(zeros, cost)`.
        total: sum of zeros, not below the sum of the least.
    """
    least = [min(zeros for zeros, _ in part) for part in options]
    extra = [[zeros - start for zeros, _ in part] for part, start in zip(options, least, strict=True)]
    left = total - sum(least)
    divisor = math.gcd(*(zeros for part in extra for zeros in part)) or 1
    units = left // divisor
    if len(options) * (units + 1) > CELLS:
        return _by_multiplier(options, total)
    best = np.full(units + 1, np.inf)
    best[0] = 0.0
    taken = np.zeros((len(options), units + 1), dtype=np.uint8)
    for index, part in enumerate(options):
        new = np.full(units + 1, np.inf)
        for number, (_, cost) in enumerate(part):
            shift = extra[index][number] // divisor
            if shift > units:
                continue
            value = np.full(units + 1, np.inf)
            value[shift:] = best[: units + 1 - shift] + cost
            better = value < new
            new[better] = value[better]
            taken[index, better] = number
        best = new
    at = int(np.flatnonzero(np.isfinite(best))[-1])
    chosen = [0] * len(options)
    for index in range(len(options) - 1, -1, -1):
        chosen[index] = int(taken[index, at])
        at -= extra[index][chosen[index]] // divisor
    return chosen


def _by_multiplier(options: Sequence[Sequence[tuple[int, float]]], total: int) -> list[int]:
    """Return a choice whose zeros are at most `total`, near it: the best for some price of a weight, then single steps."""

    def at(price: float) -> list[int]:
        return [min(range(len(part)), key=lambda i: (part[i][1] - price * part[i][0], part[i][0])) for part in options]

    def zeros(chosen: Sequence[int]) -> int:
        return sum(part[i][0] for part, i in zip(options, chosen, strict=True))

    span = 2 * max(abs(cost) for part in options for _, cost in part) or 1.0
    low, high = -span, span  # prices in cost per weight; no option is worth more
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if zeros(at(middle)) <= total else (low, middle)
    chosen = at(low)
    left = total - zeros(chosen)
    while True:
        steps = [
            ((part[j][1] - part[i][1]) / (part[j][0] - part[i][0]), index, j)
            for index, (part, i) in enumerate(zip(options, chosen, strict=True))
            for j in range(len(part))
            if 0 < part[j][0] - part[i][0] <= left
        ]
        if not steps:
            return chosen
        _, index, j = min(steps)
        left -= options[index][j][0] - options[index][chosen[index]][0]
        chosen[index] = j


def _slope(start: tuple[int, float], stop: tuple[int, float]) -> float:
    return (stop[1] - start[1]) / (stop[0] - start[0])


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g}%"
