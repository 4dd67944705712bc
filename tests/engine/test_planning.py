"""Plans on their way into a sweep: checked, stored, put in place; masks and weights that every pruner keeps to."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from secateur.core.contracts import Plan, PlanTask
from secateur.core.errors import NumericError, PatternError, RecipeError, StateError
from secateur.core.mask import Masks
from secateur.core.pattern import NM, Unstructured
from secateur.core.solve import solve
from secateur.engine.planning import (
    Planning,
    apply_plan,
    check_plan,
    cut,
    frozen_zeros,
    load_plan,
    planning_of,
    save_plan,
)
from secateur.engine.sweep import Sweep
from secateur.methods.registry import REGISTRY
from secateur.models.linears import find_all_linears

HALF = Unstructured(0.5)


@dataclass(frozen=True)
class Fixed:
    """A planner that answers what it is told, and counts how often it is asked."""

    answer: Any
    asked: list[PlanTask]
    copies: ClassVar[int] = 0
    backward: ClassVar[bool] = False

    def plan(self, task: PlanTask) -> Plan:
        self.asked.append(task)
        return self.answer(task)


def uniform(task: PlanTask) -> Plan:
    return Plan(task.budget.near(dict.fromkeys((linear.name for linear in task.budget.linears), 0.0)))


def random_masks(task: PlanTask) -> Plan:
    generator = torch.Generator().manual_seed(3)
    patterns = uniform(task).patterns
    masks = {
        linear.name: patterns[linear.name].mask(
            torch.rand(linear.rows, linear.columns, generator=generator), task.budget.scope
        )
        for linear in task.budget.linears
    }
    return Plan(patterns, Masks(masks))


def planning(model, answer=uniform, pattern=HALF, asked=None, **settings):
    names = {linear.name: pattern for linear in find_all_linears(model)}
    sweep = Sweep(patterns=names, batch_tokens=48, **settings)
    return planning_of(Fixed(answer, [] if asked is None else asked), model, names, pattern, ()), sweep


def test_overridden_and_ignored_linears_are_not_planned(tiny_llama):
    names = {linear.name: HALF for linear in find_all_linears(tiny_llama) if "q_proj" not in linear.name}
    made = planning_of(Fixed(uniform, []), tiny_llama, names, HALF, ["*.down_proj"])
    assert {name.rpartition(".")[2] for name in made.names} == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    with pytest.raises(RecipeError, match="no linear is left to plan"):
        planning_of(Fixed(uniform, []), tiny_llama, names, HALF, ["Linear"])


def test_the_task_holds_small_batches_and_problems_of_the_planned_linears(tiny_llama, ids, pruner):
    asked: list[PlanTask] = []
    made, sweep = planning(tiny_llama, asked=asked, pruner=pruner)
    made.run(sweep, tiny_llama, ids)
    task = asked[0]
    assert [tuple(batch.shape) for batch, _ in task.batches] == [(2, 24), (2, 24)]
    found = dict(task.problems({"gram"}))
    assert list(found) == [linear.name for linear in find_all_linears(tiny_llama)]
    assert all(problem.gram is not None and problem.mean is None for problem in found.values())
    assert all(problem.pattern == HALF for problem in found.values())


def test_batches_hold_one_sequence_at_least_and_their_padding(ids):
    keep = torch.ones_like(ids, dtype=torch.bool)
    assert len(cut(ids, keep, 1)) == 4
    assert cut(ids, keep, 1)[0][1] is None
    keep[1, 20:] = False
    assert torch.equal(cut(ids, keep, 48)[0][1], keep[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan, task: replace(plan, patterns={}), "no pattern for"),
        (lambda plan, task: replace(plan, patterns=dict.fromkeys(plan.patterns, NM(1, 3))), "divisible by 3"),
        (lambda plan, task: replace(plan, patterns=dict.fromkeys(plan.patterns, Unstructured(0.6))), "the budget is"),
        (lambda plan, task: replace(plan, patterns={**plan.patterns, "lm_head": HALF}), "`lm_head`, which is not"),
        (lambda plan, task: replace(plan, masks=Masks()), "has masks, and none for"),
        (
            lambda plan, task: replace(
                plan, masks=Masks({name: torch.ones(2, 2, dtype=torch.bool) for name in plan.patterns})
            ),
            "has shape",
        ),
        (
            lambda plan, task: replace(
                plan,
                masks=Masks({i.name: torch.ones(i.rows, i.columns, dtype=torch.bool) for i in task.budget.linears}),
            ),
            "removes",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change, message, tiny_llama, ids, pruner):
    made, sweep = planning(tiny_llama, lambda task: change(uniform(task), task), pruner=pruner)
    with pytest.raises(PatternError, match=message):
        made.run(sweep, tiny_llama, ids)


def test_weights_that_are_not_finite_are_refused(tiny_llama, ids, pruner):
    def bad(task: PlanTask) -> Plan:
        first = task.budget.linears[0]
        weight = torch.full((first.rows, first.columns), torch.nan)
        return replace(uniform(task), weights={first.name: weight})

    made, sweep = planning(tiny_llama, bad, pruner=pruner)
    with pytest.raises(NumericError, match="plan's weight"):
        made.run(sweep, tiny_llama, ids)


def test_a_stored_plan_is_not_made_again(tiny_llama, ids, pruner, tmp_path):
    asked: list[PlanTask] = []
    made, sweep = planning(tiny_llama, random_masks, asked=asked, pruner=pruner)
    first = made.run(sweep, tiny_llama, ids, folder=tmp_path)
    second = made.run(sweep, tiny_llama, ids, folder=tmp_path)
    assert len(asked) == 1
    assert first.patterns == second.patterns
    assert all(torch.equal(first.masks[name], second.masks[name]) for name in first.masks)


@pytest.mark.parametrize("text", ["", "{}", '{"patterns": 3}', '{"patterns": {"a": []}, "masks": false}', "[1]"])
def test_a_damaged_plan_is_named(text, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(StateError, match="damaged"):
        load_plan(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 1}, "of format 1"),
        ({"patterns": {"a": ["x"]}}, "damaged"),
        ({"patterns": {"a": [2.0, "row"]}}, "damaged"),
        ({"patterns": {"a": [0.5, "column"]}}, "damaged"),
    ],
)
def test_what_no_plan_of_this_version_says_is_refused(changes, said, tmp_path):
    save_plan(Plan({"a": HALF}), tmp_path)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(StateError, match=said) as caught:
        load_plan(tmp_path)
    assert "plan.json" in caught.value.hint


def test_a_plan_that_is_a_folder_is_damaged_and_a_deleted_one_leaves_no_tensors(tmp_path):
    save_plan(Plan({"a": HALF}, weights={"a": torch.ones(2, 2)}), tmp_path)
    (tmp_path / "plan.json").unlink()
    assert load_plan(tmp_path) is None
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(StateError, match="damaged"):
        load_plan(tmp_path)
    (tmp_path / "plan.json").rmdir()
    save_plan(Plan({"a": HALF}), tmp_path)
    assert not load_plan(tmp_path).weights


def test_a_plan_whose_tensors_are_gone_is_damaged(tmp_path):
    save_plan(Plan({"a": HALF}, Masks({"a": torch.eye(2, dtype=torch.bool)})), tmp_path)
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(StateError, match="damaged"):
        load_plan(tmp_path)


def test_no_digit_of_a_sparsity_is_lost(tmp_path):
    patterns = {"a": Unstructured(1234567 / 7654321), "b": Unstructured(1 / 3, "row"), "c": NM(3, 7)}
    save_plan(Plan(patterns), tmp_path)
    assert load_plan(tmp_path).patterns == patterns


@pytest.mark.parametrize("pattern", [HALF, Unstructured(0.7, "row"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("name", [entry.name for entry in REGISTRY if entry.kind == "pruner"])
def test_every_pruner_keeps_to_the_masks_of_a_plan(name, pattern, tiny_llama, ids):
    pruner = REGISTRY.find(name).load()()

    made, sweep = planning(tiny_llama, random_masks, pattern, pruner=pruner, refit=True)
    plan = made.run(sweep, tiny_llama, ids)
    report = apply_plan(plan, sweep, tiny_llama).run(tiny_llama, ids)
    for linear in find_all_linears(tiny_llama):
        assert torch.equal(report.masks[linear.name], plan.masks[linear.name])
        assert not linear.read()[~plan.masks[linear.name]].any()


def test_a_planned_mask_leaves_the_pruner_its_weight_update(tiny_llama, ids):
    from secateur.methods.pruners.magnitude import Magnitude
    from secateur.methods.pruners.sparsegpt import SparseGPT

    made, sweep = planning(tiny_llama, random_masks, pruner=SparseGPT(damping=1e-4))
    plan = made.run(sweep, tiny_llama, ids)
    problem = next(iter(replace(apply_plan(plan, sweep, tiny_llama)).problems(tiny_llama, ids)))[1]
    kept, moved = solve(Magnitude(), problem), solve(SparseGPT(damping=1e-4), problem)
    assert torch.equal(kept.pruned.mask, moved.pruned.mask)
    assert moved.loss_after < kept.loss_after
    assert solve(Magnitude(), problem, refit=True).loss_after <= moved.loss_after * (1 + 1e-4)


def test_weights_of_a_plan_take_the_models_place(tiny_llama, ids, pruner):
    def halved(task: PlanTask) -> Plan:
        return replace(uniform(task), weights={i.name: torch.ones(i.rows, i.columns) for i in task.budget.linears[:1]})

    made, sweep = planning(tiny_llama, halved, pruner=pruner)
    plan = made.run(sweep, tiny_llama, ids)
    first = find_all_linears(tiny_llama)[0]
    assert not bool((first.read() == 1).all())
    apply_plan(plan, sweep, tiny_llama)
    assert bool((first.read() == 1).all())


@pytest.mark.parametrize(
    ("pattern", "scope", "zeros"),
    [(HALF, "layer", 3), (HALF, "row", 4), (NM(1, 2), "layer", 4), (NM(2, 4), "layer", 4)],
    ids=str,
)
def test_frozen_zeros_are_counted_as_the_pattern_can_hold_them(pattern, scope, zeros):
    frozen = torch.zeros(2, 4, dtype=torch.bool)
    frozen[0, 0] = frozen[0, 3] = frozen[1, 1] = True
    assert frozen_zeros(frozen, pattern, scope) == zeros


def test_a_checked_plan_may_spend_less_than_the_budget(tiny_llama, pruner):
    made, sweep = planning(tiny_llama, pruner=pruner)
    budget = made.budget(sweep, tiny_llama)
    check_plan(Plan({linear.name: Unstructured(0.4) for linear in budget.linears}), budget)
    assert isinstance(made, Planning)
