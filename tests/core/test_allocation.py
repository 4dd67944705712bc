"""Budgets divided: integer totals are exact, optima are those of a brute-force search."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core import allocation
from secateur.core.allocation import Budget, Prunable, choose, fill, hull, level, settle
from secateur.core.errors import PatternError
from secateur.core.pattern import NM, Unstructured, pruned_count

SHAPES = [(64, 64), (32, 64), (32, 64), (64, 64), (176, 64), (176, 64), (64, 176)]

unhurried = settings(deadline=None, max_examples=40)  # milliseconds are those of a busy machine


def linears(blocks: int = 3, **frozen: int) -> tuple[Prunable, ...]:
    return tuple(
        Prunable(f"{block}.{index}", block, rows, columns, frozen.get(f"l{block}_{index}", 0))
        for block in range(blocks)
        for index, (rows, columns) in enumerate(SHAPES)
    )


def spent(budget: Budget, patterns) -> int:
    return sum(budget.zeros_of(linear, patterns[linear.name]) for linear in budget.linears)


@unhurried
@given(
    sparsity=st.floats(0, 1),
    wanted=st.lists(st.floats(-1, 1), min_size=21, max_size=21),
)
def test_a_layer_budget_is_met_to_the_last_weight(sparsity, wanted):
    budget = Budget(linears(), Unstructured(sparsity), "layer")
    patterns = budget.near({linear.name: w for linear, w in zip(budget.linears, wanted, strict=True)})
    assert spent(budget, patterns) == budget.total == pruned_count(sparsity, budget.size)


@unhurried
@given(
    sparsity=st.floats(0.05, 0.95),
    wanted=st.lists(st.floats(-0.3, 0.3), min_size=21, max_size=21),
)
def test_a_row_budget_is_met_as_far_as_whole_rows_can(sparsity, wanted):
    budget = Budget(linears(), Unstructured(sparsity), "row")
    patterns = budget.near({linear.name: w for linear, w in zip(budget.linears, wanted, strict=True)})
    divisor = math.gcd(*(rows for rows, _ in SHAPES))
    assert spent(budget, patterns) == budget.total // divisor * divisor
    for linear in budget.linears:
        assert budget.zeros_of(linear, patterns[linear.name]) % linear.rows == 0


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(4, 8), NM(1, 4)], ids=str)
def test_an_nm_budget_is_that_of_the_pattern_everywhere(pattern):
    budget = Budget(linears(), pattern, "layer")
    wanted = {linear.name: 0.2 * (index % 3) for index, linear in enumerate(budget.linears)}
    patterns = budget.near(wanted)
    assert spent(budget, patterns) == budget.total == round(pattern.sparsity * budget.size)
    assert len({str(found) for found in patterns.values()}) > 1
    assert all(found.m == pattern.m for found in patterns.values())


def test_linears_of_a_unit_share_an_nm_pattern():
    budget = Budget(linears(), NM(2, 4), "layer")
    units = {linear.name: linear.block for linear in budget.linears}
    patterns = budget.near({name: (0.0, 0.5, 1.0)[block] for name, block in units.items()}, units=units)
    assert {(units[name], str(found)) for name, found in patterns.items()} == {(0, "4:4"), (1, "2:4"), (2, "0:4")}


def test_equal_wishes_are_the_uniform_plan():
    budget = Budget(linears(), Unstructured(0.5), "layer")
    patterns = budget.near(dict.fromkeys((linear.name for linear in budget.linears), 0.3))
    assert {found.sparsity for found in patterns.values()} == {0.5}


def test_wishes_keep_their_order_and_bounds():
    budget = Budget(linears(), Unstructured(0.7), "layer")
    wanted = {linear.name: 0.2 * linear.block for linear in budget.linears}
    patterns = budget.near(wanted, least=0.6, most=0.8)
    found = [patterns[f"{block}.0"].sparsity for block in range(3)]
    assert found == sorted(found)
    assert all(0.6 <= pattern.sparsity <= 0.8 for pattern in patterns.values())
    assert spent(budget, patterns) == budget.total


def test_bounds_without_room_are_refused_and_say_what_fits():
    budget = Budget(linears(), Unstructured(0.9), "layer")
    wanted = dict.fromkeys((linear.name for linear in budget.linears), 0.0)
    with pytest.raises(PatternError, match=r"90% over 21 linears .* between 50% and 80%: between 50% and 79.99% fit"):
        budget.near(wanted, least=0.5, most=0.8)


def test_frozen_zeros_are_a_lower_bound_and_refused_above_the_budget():
    wanted = dict.fromkeys((linear.name for linear in linears()), 0.0)
    budget = Budget(linears(l0_0=4000), Unstructured(0.5), "layer")
    patterns = budget.near(wanted)
    assert budget.zeros_of(budget.linears[0], patterns["0.0"]) >= 4000
    assert spent(budget, patterns) == budget.total
    with pytest.raises(PatternError, match="4000 zeros that stay"):
        Budget(linears(1, l0_0=4000), Unstructured(0.01), "layer").refuse_frozen()


def test_wishes_at_distances_of_the_rank_rule_are_met_for_equal_sizes():
    four = tuple(Prunable(str(i), i, 30, 100) for i in range(4))
    for sparsity, densities in ((0.5, (0.4, 0.4667, 0.5333, 0.6)), (0.7, (0.2, 0.2667, 0.3333, 0.4))):
        wanted = {str(i): -density for i, density in enumerate(densities)}
        found = Budget(four, Unstructured(sparsity), "layer").near(wanted)
        assert [1 - found[str(i)].sparsity for i in range(4)] == pytest.approx(densities, abs=1e-3)


@unhurried
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    wanted=st.lists(st.floats(-2, 2), min_size=6, max_size=6),
    share=st.floats(0, 1),
)
def test_levelling_meets_any_total_between_the_bounds(sizes, wanted, share):
    low, high = [size // 4 for size in sizes], sizes
    total = sum(low) + int(share * (sum(high) - sum(low)))
    found = level(wanted[: len(sizes)], sizes, total, low, high)
    assert sum(found) == pytest.approx(total, abs=1e-6)
    assert all(a - 1e-9 <= x <= b + 1e-9 for a, x, b in zip(low, found, high, strict=True))


@unhurried
@given(
    steps=st.lists(st.sampled_from([6, 10, 15, 4]), min_size=2, max_size=6),
    counts=st.lists(st.integers(2, 9), min_size=6, max_size=6),
    total=st.integers(60, 200),
)
def test_settling_finds_the_largest_sum_wherever_there_is_room(steps, counts, total):
    low, high = [0] * len(steps), [40 * step for step in steps]
    wanted = [step * count * 1.0 for step, count in zip(steps, counts, strict=False)]
    divisor = math.gcd(*steps)
    found = settle(wanted, steps, low, high, total)
    assert all(x % s == 0 and 0 <= x <= b for x, s, b in zip(found, steps, high, strict=True))
    # any total this large that the divisor divides is a sum of the steps (Frobenius)
    assert sum(found) == total // divisor * divisor


def test_settling_without_room_stays_below():
    assert settle([2.0, 2.0], [4, 4], [0, 0], [4, 4], 100) == [4, 4]
    assert sum(settle([9.0, 9.0], [6, 10], [0, 0], [6, 10], 15)) <= 15


def test_a_hull_keeps_the_lower_corners():
    assert hull([(0, 0.0), (1, 3.0), (2, 2.0), (4, 8.0)]) == [(0, 0.0), (2, 2.0), (4, 8.0)]


@unhurried
@given(st.data())
def test_filling_is_the_optimum_of_convex_curves(data):
    curves = []
    for _ in range(3):
        slopes = sorted(data.draw(st.lists(st.integers(0, 9), min_size=3, max_size=3)))
        costs = [0, *itertools.accumulate(slopes)]
        curves.append([(z, float(c)) for z, c in enumerate(costs)])
    total = data.draw(st.integers(0, 9))
    found = fill(curves, total)

    def cost(zeros):
        return sum(
            curve[int(z)][1] + (z - int(z)) * (curve[min(int(z) + 1, 3)][1] - curve[int(z)][1])
            for curve, z in zip(curves, zeros, strict=True)
        )

    best = min(cost(zeros) for zeros in itertools.product(range(4), repeat=3) if sum(zeros) == total)
    assert sum(found) == pytest.approx(total)
    assert cost(found) == pytest.approx(best, abs=1e-9)


@unhurried
@given(st.data())
def test_choosing_is_the_optimum_of_all_choices(data):
    options = data.draw(
        st.lists(
            st.lists(st.tuples(st.integers(0, 6), st.integers(0, 20).map(float)), min_size=1, max_size=3),
            min_size=1,
            max_size=4,
        )
    )
    least = sum(min(z for z, _ in part) for part in options)
    total = least + data.draw(st.integers(0, 12))
    sums = {}
    for picked in itertools.product(*options):
        zeros = sum(z for z, _ in picked)
        if zeros <= total:
            sums[zeros] = min(sums.get(zeros, math.inf), sum(c for _, c in picked))
    found = [part[i] for part, i in zip(options, choose(options, total), strict=True)]
    assert sum(z for z, _ in found) == max(sums)
    assert sum(c for _, c in found) == sums[max(sums)]


def test_a_table_that_would_be_too_large_is_replaced_by_a_multiplier(monkeypatch):
    options = [[(size * n, (n / 4) ** 2 * weight) for n in range(5)] for size, weight in ((3, 9.0), (5, 1.0), (7, 4.0))]
    exact = choose(options, 30)
    monkeypatch.setattr(allocation, "CELLS", 0)
    near = choose(options, 30)
    zeros = [sum(part[i][0] for part, i in zip(options, found, strict=True)) for found in (exact, near)]
    assert zeros[1] <= zeros[0] == 30
    assert zeros[1] >= 24
