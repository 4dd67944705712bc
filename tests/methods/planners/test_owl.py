"""OWL: outliers counted by hand, sparsities by the paper's rule."""

from __future__ import annotations

import pytest
import torch

from secateur.core.pattern import NM, Unstructured
from secateur.engine.planning import planning_of
from secateur.engine.sweep import Sweep
from secateur.methods.planners.owl import OWL, outlier_share, sparsities
from secateur.methods.pruners.sparsegpt import SparseGPT
from secateur.models.linears import find_all_linears


def plan(planner, model, ids, pattern=Unstructured(0.7)):  # noqa: B008
    names = {linear.name: pattern for linear in find_all_linears(model)}
    sweep = Sweep(patterns=names, pruner=SparseGPT(), batch_tokens=64)
    return planning_of(planner, model, names, pattern, ()).run(sweep, model, ids)


def by_block(found) -> dict[int, float]:
    return {int(name.split(".")[2]): pattern.sparsity for name, pattern in found.patterns.items()}


def test_outliers_are_counted_over_all_linears_of_a_block():
    first = torch.ones(4, 10)
    first[0, 0] = first[1, 1] = 100.0
    second = torch.ones(2, 30)
    second[0, 0] = 100.0
    assert outlier_share([first, second], 5.0) == pytest.approx(3 / 100)
    assert outlier_share([first, second], 50.0) == 0.0  # the mean is 3.97
    assert outlier_share([torch.zeros(3, 3)], 5.0) == 0.0


def test_sparsities_spread_in_proportion_to_the_outliers():
    found = sparsities({0: 0.01, 1: 0.03, 2: 0.02}, 0.08)
    assert found == pytest.approx({0: 0.0, 1: -0.16, 2: -0.08})
    assert sparsities({0: 0.5, 1: 0.5}, 0.08) == {0: 0.0, 1: 0.0}


def with_outliers(model):
    """Put a few very large weights in the second block."""
    with torch.no_grad():
        for linear in find_all_linears(model):
            if linear.block == 1:
                linear.read()[::4, ::8] *= 50
    return model


def test_the_block_with_outliers_is_denser_by_twice_the_spread(tiny_llama, ids):
    found = by_block(plan(OWL(spread=0.05), with_outliers(tiny_llama), ids))
    assert found[0] - found[1] == pytest.approx(0.1, abs=1e-3)
    assert (found[0] + found[1]) / 2 == pytest.approx(0.7, abs=1e-3)


def test_without_spread_the_plan_is_uniform(tiny_llama, ids):
    found = plan(OWL(spread=0), with_outliers(tiny_llama), ids)
    assert all(pattern.sparsity == pytest.approx(0.7, abs=1e-3) for pattern in found.patterns.values())


def test_the_scale_of_the_weights_does_not_matter(tiny_llama, ids):
    before = plan(OWL(), with_outliers(tiny_llama), ids)
    with torch.no_grad():  # of one whole block: its norms undo the scale of what enters it
        for linear in find_all_linears(tiny_llama):
            if linear.block == 1:
                linear.read().mul_(4.0)
    after = plan(OWL(), tiny_llama, ids)
    assert after.scores["block 0"] == before.scores["block 0"]


def test_blocks_get_whole_steps_of_an_nm_pattern(tiny_llama, ids):
    found = plan(OWL(), with_outliers(tiny_llama), ids, NM(2, 4))
    assert by_block(found) == {0: 0.75, 1: 0.25}
    assert set(found.patterns.values()) == {NM(1, 4), NM(3, 4)}


def test_bounds_hold_and_the_rest_makes_up_for_them(tiny_llama, ids):
    found = by_block(plan(OWL(spread=0.2, most=0.75), with_outliers(tiny_llama), ids))
    assert found[0] == pytest.approx(0.75, abs=1e-3)
    assert found[1] == pytest.approx(0.65, abs=1e-3)
