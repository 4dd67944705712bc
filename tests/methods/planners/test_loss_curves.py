"""Loss curves: the optimum of what was measured, never worse than the uniform plan by its own measure."""

from __future__ import annotations

import itertools

import pytest
import torch

from secateur.core.errors import PatternError
from secateur.core.pattern import NM, Unstructured
from secateur.engine.planning import planning_of, summary
from secateur.engine.sweep import Sweep
from secateur.methods.planners.loss_curves import LossCurves
from secateur.methods.pruners.sparsegpt import SparseGPT
from secateur.methods.pruners.wanda import Wanda
from secateur.models.linears import find_all_linears


def plan(planner, model, ids, pattern=Unstructured(0.6), only=("",), pruner=None):  # noqa: B008
    names = {
        linear.name: pattern
        for linear in find_all_linears(model)
        if any(linear.name.endswith(ending) for ending in only)
    }
    sweep = Sweep(patterns=names, pruner=pruner or Wanda(), batch_tokens=96)
    planning = planning_of(planner, model, names, pattern, ())
    return planning.run(sweep, model, ids), planning.budget(sweep, model), sweep


def losses(model, ids, pattern, names):
    """Return each linear's Wanda loss under `pattern`."""
    sweep = Sweep(patterns=dict.fromkeys(names, pattern), pruner=SparseGPT(), batch_tokens=96)
    return {name: problem.loss(pruned(problem)) for name, problem in with_diag(sweep, model, ids)}


def with_diag(sweep, model, ids):
    for name, problem in sweep.problems(model, ids):
        object.__setattr__(problem, "diag", problem.gram.diagonal().clone())
        yield name, problem


def pruned(problem):
    return Wanda().prune(problem).weight


@pytest.mark.parametrize("weight", ["absolute", "relative"])
def test_an_nm_plan_is_the_best_of_all_mixtures(weight, tiny_llama, ids):
    only = ("0.self_attn.q_proj", "0.self_attn.o_proj", "1.mlp.up_proj", "1.mlp.down_proj")
    found, budget, _ = plan(LossCurves(weight=weight), tiny_llama, ids, NM(2, 4), only)
    names = [linear.name for linear in budget.linears]
    table = {n: losses(tiny_llama, ids, NM(n, 4), names) for n in range(5)}
    size = table[0] if weight == "relative" else dict.fromkeys(names, 1.0)

    def cost(kept):
        return sum(table[n][name] / size[name] for n, name in zip(kept, names, strict=True))

    possible = [
        kept
        for kept in itertools.product(range(1, 5), repeat=4)
        if sum(i.size // 4 * (4 - n) for n, i in zip(kept, budget.linears, strict=True)) == budget.total
    ]
    best = min(possible, key=cost)
    assert cost([found.patterns[name].n for name in names]) == pytest.approx(cost(best), rel=1e-6)


def test_candidates_of_other_widths_may_be_mixed(tiny_llama, ids):
    planner = LossCurves(weight="absolute", candidates=("1:4", "2:4", "4:8", "dense"))
    found, budget, _ = plan(planner, tiny_llama, ids, NM(2, 4))
    assert {str(pattern) for pattern in found.patterns.values()} <= {"1:4", "4:8", "1:1"}  # 4:8 is 2:4, and freer
    assert summary(found, budget)["pruned"] == budget.total
    assert not found.notes


def test_candidates_that_miss_the_budget_say_so(tiny_llama, ids):
    only = ("q_proj", "v_proj")
    found, budget, _ = plan(LossCurves(weight="absolute", candidates=("1:4",)), tiny_llama, ids, NM(1, 4), only)
    assert not found.notes
    found, budget, _ = plan(
        LossCurves(weight="absolute", candidates=("0:4", "3:4")), tiny_llama, ids, NM(2, 4), ("0.mlp.up_proj",)
    )
    assert f"{budget.total // 2} below the budget" in found.notes[0]
    with pytest.raises(PatternError, match="between 0% and 25% fit"):
        plan(LossCurves(candidates=("3:4", "dense")), tiny_llama, ids, NM(2, 4))
    with pytest.raises(PatternError, match="no N:M pattern"):
        plan(LossCurves(candidates=("50%",)), tiny_llama, ids, NM(2, 4))
    with pytest.raises(PatternError, match="no candidate fits"):
        plan(LossCurves(candidates=("1:3",)), tiny_llama, ids, NM(2, 4))


@pytest.mark.parametrize("weight", ["absolute", "relative", "gradient"])
def test_the_planned_loss_is_below_the_uniform_one(weight, tiny_llama, ids):
    found, _, sweep = plan(LossCurves(weight=weight, spread=0.3, points=13), tiny_llama, ids)

    def total(patterns):
        planned = Sweep(patterns=patterns, pruner=SparseGPT(), batch_tokens=96)
        return sum(
            found.scores[name] * problem.loss(pruned(problem)) for name, problem in with_diag(planned, tiny_llama, ids)
        )

    assert total(found.patterns) < total(sweep.patterns)


def test_sparsities_stay_within_the_spread(tiny_llama, ids):
    found, _, _ = plan(LossCurves(weight="absolute", spread=0.05), tiny_llama, ids, pruner=SparseGPT())
    assert all(0.549 <= pattern.sparsity <= 0.651 for pattern in found.patterns.values())
    uniform, _, _ = plan(LossCurves(weight="absolute", spread=0.0), tiny_llama, ids, pruner=SparseGPT())
    assert all(pattern.sparsity == pytest.approx(0.6, abs=1e-3) for pattern in uniform.patterns.values())


def test_a_model_without_gradients_counts_all_losses_alike(tiny_llama, ids):
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()
    found, budget, _ = plan(LossCurves(), tiny_llama, ids)
    assert "gradients of all linears are zero" in found.notes[0]
    assert summary(found, budget)["pruned"] == summary(found, budget)["budget"] // 16 * 16


def test_the_curves_may_be_measured_by_another_pruner(tiny_llama, ids):
    wanda, _, _ = plan(LossCurves(weight="absolute"), tiny_llama, ids)
    other, _, _ = plan(LossCurves(weight="absolute", base=SparseGPT(block_size=16)), tiny_llama, ids)
    assert wanda.patterns != other.patterns
