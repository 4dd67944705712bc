"""What every planner of the shelf promises, shown for each line of the registry."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from secateur.core.contracts import Planner
from secateur.core.errors import NumericError, PatternError, SecateurError
from secateur.core.pattern import NM, Pattern, Unstructured
from secateur.engine.planning import Planning, load_plan, planning_of, save_plan, summary
from secateur.engine.sweep import Sweep
from secateur.methods.pruners.magnitude import Magnitude
from secateur.methods.pruners.sparsegpt import SparseGPT
from secateur.methods.pruners.wanda import Wanda
from secateur.methods.registry import REGISTRY
from secateur.models.linears import find_all_linears

ENTRIES = {entry.name: entry for entry in REGISTRY if entry.kind == "planner"}
SMALL = {
    "unipts": {"population": 4, "parents": 2, "generations": 2, "epochs": 1},
    "drive": {"rounds": 3},
}
PLANNERS: dict[str, Planner] = {name: entry.load()(**SMALL.get(name, {})) for name, entry in ENTRIES.items()}
PATTERNS: list[tuple[Pattern, object]] = [
    (Unstructured(0.5), SparseGPT()),
    (Unstructured(0.73), Wanda()),
    (Unstructured(0.61, "row"), SparseGPT()),
    (Unstructured(0.0), Magnitude()),
    (Unstructured(1.0), Magnitude()),
    (NM(2, 4), Wanda()),
    (NM(5, 8), Magnitude()),
]

each_planner = pytest.mark.parametrize("planner", PLANNERS.values(), ids=list(PLANNERS))


def planned(planner, model, ids, pattern: Pattern = Unstructured(0.6), pruner=None, **settings):  # noqa: B008
    """Return the plan for all linears of `model`, its budget, and the sweep it is for."""
    names = {linear.name: pattern for linear in find_all_linears(model)}
    sweep = Sweep(patterns=names, pruner=pruner or SparseGPT(), batch_tokens=64, **settings)
    planning = planning_of(planner, model, names, pattern, ())
    return planning.run(sweep, model, ids), planning.budget(sweep, model), sweep


@each_planner
@pytest.mark.parametrize(("pattern", "pruner"), PATTERNS, ids=lambda value: str(value))
def test_the_budget_is_met_to_the_last_weight(planner, pattern, pruner, tiny_llama, ids):
    plan, budget, _ = planned(planner, tiny_llama, ids, pattern, pruner)
    found = summary(plan, budget)
    divisor = 16 if budget.scope == "row" and isinstance(pattern, Unstructured) else 1  # rows of all linears
    assert found["pruned"] == budget.total // divisor * divisor
    assert set(found["linears"]) == {linear.name for linear in find_all_linears(tiny_llama)}
    assert json.loads(json.dumps(found)) == found


@each_planner
def test_the_model_and_its_settings_are_left_as_they_were(planner, tiny_llama, ids):
    tiny_llama.train()
    first = next(tiny_llama.parameters())
    first.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    state = torch.get_rng_state()
    planned(planner, tiny_llama, ids)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_llama.state_dict().items())
    assert tiny_llama.training
    assert not first.requires_grad
    assert all(parameter.requires_grad for parameter in list(tiny_llama.parameters())[1:])
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()


@each_planner
def test_equal_tasks_have_equal_plans(planner, tiny_llama, ids):
    first, budget, _ = planned(planner, tiny_llama, ids)
    second, _, _ = planned(planner, tiny_llama, ids)
    assert summary(first, budget) == summary(second, budget)
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(weight, second.weights[name]) for name, weight in first.weights.items())
    assert (first.masks is None) == (second.masks is None)
    assert all(torch.equal(mask, (second.masks or {})[name]) for name, mask in (first.masks or {}).items())


@each_planner
def test_a_plan_is_stored_and_read_back_whole(planner, tiny_llama, ids, tmp_path):
    plan, budget, _ = planned(planner, tiny_llama, ids)
    save_plan(plan, tmp_path)
    again = load_plan(tmp_path)
    assert again is not None
    assert again.patterns == plan.patterns
    assert summary(again, budget) == summary(plan, budget)
    assert all(torch.equal(weight, again.weights[name]) for name, weight in plan.weights.items())
    assert all(torch.equal(mask, (again.masks or {})[name]) for name, mask in (plan.masks or {}).items())


@each_planner
@pytest.mark.parametrize(("pattern", "pruner"), [PATTERNS[0], PATTERNS[1], PATTERNS[5]], ids=str)
def test_a_planned_sweep_has_the_plans_sparsities(planner, pattern, pruner, tiny_llama, ids):
    from secateur.engine.planning import apply_plan

    plan, budget, sweep = planned(planner, tiny_llama, ids, pattern, pruner)
    report = apply_plan(plan, sweep, tiny_llama).run(tiny_llama, ids)
    shapes = {linear.name: linear for linear in budget.linears}
    for block in report.blocks:
        for layer in block.layers:
            linear = shapes[layer.name]
            zeros = budget.zeros_of(linear, plan.patterns[layer.name])
            assert int((~report.masks[layer.name]).sum()) == zeros, layer.name
    if plan.masks is not None:
        assert all(torch.equal(mask, report.masks[name]) for name, mask in plan.masks.items())


@each_planner
def test_padding_decides_nothing(planner, tiny_llama, ids):
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[:, 20:] = False
    other = ids.clone()
    other[:, 20:] = (other[:, 20:] + 7) % 64
    names = {linear.name: Unstructured(0.6) for linear in find_all_linears(tiny_llama)}
    sweep = Sweep(patterns=names, pruner=SparseGPT(), batch_tokens=48)
    planning = planning_of(planner, tiny_llama, names, Unstructured(0.6), ())
    first, second = planning.run(sweep, tiny_llama, ids, keep), planning.run(sweep, tiny_llama, other, keep)
    assert first.patterns == second.patterns


@each_planner
def test_one_block_of_one_linear_gets_the_pattern_itself(planner, make_llama, ids):
    model = make_llama(layers=1)
    name = "model.layers.0.mlp.up_proj"
    sweep = Sweep(patterns={name: Unstructured(0.6)}, pruner=SparseGPT(), batch_tokens=96)
    plan = Planning(planner, frozenset({name}), Unstructured(0.6)).run(sweep, model, ids)
    assert plan.patterns == {name: Unstructured(pruned(0.6, 32 * 64) / (32 * 64))}


def pruned(sparsity: float, size: int) -> int:
    return int(sparsity * size)


@each_planner
def test_frozen_zeros_stay_and_count(planner, tiny_llama, ids):
    linears = find_all_linears(tiny_llama)
    with torch.no_grad():
        for linear in linears[:3]:
            weight = linear.read()
            weight[:, : weight.shape[1] // 2] = 0.0
    plan, budget, _ = planned(planner, tiny_llama, ids, Unstructured(0.4), SparseGPT(), freeze_zeros=True)
    assert summary(plan, budget)["pruned"] == budget.total
    for linear in linears[:3]:
        assert plan.patterns[linear.name].sparsity >= 0.5
        if plan.masks is not None:
            assert not (plan.masks[linear.name] & (linear.read() == 0)).any()


@each_planner
def test_weights_that_are_all_zero_are_planned(planner, tiny_llama, ids):
    with torch.no_grad():
        for linear in find_all_linears(tiny_llama):
            linear.read().zero_()
    plan, budget, _ = planned(planner, tiny_llama, ids)
    assert summary(plan, budget)["pruned"] == budget.total


@each_planner
def test_a_weight_that_is_nan_is_refused(planner, tiny_llama, ids):
    with torch.no_grad():
        find_all_linears(tiny_llama)[4].read()[0, 0] = float("nan")
    with pytest.raises(NumericError):
        planned(planner, tiny_llama, ids)


@each_planner
def test_fewer_tokens_than_inputs_are_enough(planner, tiny_llama, ids):
    plan, budget, _ = planned(planner, tiny_llama, ids[:1, :6])
    assert summary(plan, budget)["pruned"] == budget.total


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if "least" in entry.load().__annotations__])
def test_bounds_that_leave_no_room_are_refused(name, tiny_llama, ids):
    planner = ENTRIES[name].load()(**SMALL.get(name, {}), most=0.5)
    with pytest.raises(PatternError, match=r"between .*% and 50%"):
        planned(planner, tiny_llama, ids, Unstructured(0.7))


@pytest.mark.parametrize("name", ENTRIES)
def test_a_planner_is_its_hyper_parameters(name):
    cls, planner = ENTRIES[name].load(), PLANNERS[name]
    assert cls(**SMALL.get(name, {})) == planner
    assert hash(planner) == hash(cls(**SMALL.get(name, {})))
    assert isinstance(planner, Planner)
    assert REGISTRY.entry_of(planner) is ENTRIES[name]
    with pytest.raises(ValidationError, match="nothing_like_it"):
        cls(nothing_like_it=1)


@each_planner
def test_a_budget_over_the_whole_model_is_refused_beside_a_plan(planner, tiny_llama):
    names = {linear.name: Unstructured(0.5) for linear in find_all_linears(tiny_llama)}
    with pytest.raises(SecateurError, match="both divide"):
        planning_of(planner, tiny_llama, names, Unstructured(0.5, "model"), ())
