"""UniPTS: its objective and gradients equal their closed forms, its search is never below uniform, its masks are exact."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from secateur.core.allocation import Budget, Prunable
from secateur.core.contracts import PlanTask
from secateur.core.pattern import NM, Unstructured
from secateur.engine.planning import apply_plan, cut, planning_of, summary
from secateur.engine.sweep import Sweep
from secateur.methods.planners import unipts
from secateur.methods.planners.unipts import Student, UniPTS, distillation, schedule, spread_out
from secateur.methods.pruners.magnitude import Magnitude
from secateur.models.linears import find_all_linears

QUICK = {"population": 4, "parents": 2, "generations": 2, "sequences": 2}


def planned(planner, model, ids, pattern=Unstructured(0.6), **settings):  # noqa: B008
    names = {linear.name: pattern for linear in find_all_linears(model)}
    sweep = Sweep(patterns=names, pruner=Magnitude(), batch_tokens=48, **settings)
    planning = planning_of(planner, model, names, pattern, ())
    return planning.run(sweep, model, ids), planning.budget(sweep, model), sweep


def student_of(model, ids, freeze_zeros=False) -> Student:
    linears = tuple(
        Prunable(view.name, view.block, view.out_features, view.in_features) for view in find_all_linears(model)
    )
    budget = Budget(linears, Unstructured(0.5), "layer")
    task = PlanTask(model, budget, cut(ids, None, 48), lambda _: iter(()), freeze_zeros, torch.Generator())
    return Student(task)


def logits(seed: int) -> torch.Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_published_objective_has_its_closed_gradient():
    own, teacher = logits(0).requires_grad_(), logits(1)
    distillation(own, teacher, 4.0, symmetric=False).backward()
    closed = (own.softmax(-1) - (teacher / 4).softmax(-1)).detach() / 5
    torch.testing.assert_close(own.grad, closed, rtol=1e-10, atol=1e-12)


def test_at_temperature_one_both_forms_are_the_divergence():
    own, teacher = logits(0), logits(1)
    plain = F.kl_div(own.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    for symmetric in (True, False):
        torch.testing.assert_close(distillation(own, teacher, 1.0, symmetric), plain)
    assert distillation(own, own, 3.0) == pytest.approx(0.0, abs=1e-12)
    assert distillation(own, own, 3.0, symmetric=False) > 0.01  # the published optimum is flatter than the teacher


def test_the_rate_rises_in_a_tenth_and_falls_to_zero():
    rates = [schedule(done, 100) for done in range(100)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[-1] < 0.01
    assert schedule(0, 1) == 1.0


def test_gradients_go_straight_through_and_pruned_weights_decay(tiny_llama, ids):
    student = student_of(tiny_llama, ids)
    half = {name: Unstructured(0.5) for name in student.views}
    student.prune(half)
    found = {}
    for decay in (0.0, 0.25):
        student.backward(lambda teacher, own: distillation(own, teacher, 1.0), ids[:2], None, decay)
        found[decay] = {name: latent.grad.clone() for name, latent in student.latents.items()}
    masked = {f"{name}.weight": student.views[name].read().clone().requires_grad_() for name in student.views}
    own = torch.func.functional_call(student.model, masked, (ids[:2],), {"use_cache": False}).logits[:, :-1]
    with torch.no_grad():
        teacher = tiny_llama(input_ids=ids[:2], use_cache=False).logits[:, :-1]
    loss = distillation(own.flatten(0, 1), teacher.flatten(0, 1), 1.0)
    exact = dict(zip(masked, torch.autograd.grad(loss, list(masked.values())), strict=True))
    for name, latent in student.latents.items():
        mask = student.masks[name]
        torch.testing.assert_close(found[0.0][name], exact[f"{name}.weight"], rtol=1e-4, atol=1e-6)
        added = found[0.25][name] - found[0.0][name]
        torch.testing.assert_close(added, 0.25 * latent.detach() * ~mask, rtol=1e-3, atol=1e-6)
        assert bool((found[0.0][name][~mask] != 0).any())


def test_regrown_shares_sum_to_the_budget():
    linears = tuple(Prunable(str(i), i, rows, 40) for i, rows in enumerate((10, 20, 40)))
    budget = Budget(linears, Unstructured(0.5), "layer")
    sizes = torch.tensor([linear.size for linear in linears], dtype=torch.float64)
    uniform = spread_out(sizes.log(), budget, 0.05)
    assert list(uniform.values()) == pytest.approx([0.0, 0.0, 0.0])
    equal = spread_out(torch.zeros(3, dtype=torch.float64), budget, 0.05)  # as many weights for each
    assert sum(equal[linear.name] * linear.size for linear in linears) == pytest.approx(0.0)
    assert equal["0"] < equal["1"] < equal["2"]
    assert spread_out(torch.zeros(3, dtype=torch.float64), Budget(linears, Unstructured(1.0), "layer"), 0.05) == {
        "0": 0.0, "1": 0.0, "2": 0.0,
    }  # fmt: skip


def test_the_search_is_never_worse_than_uniform_and_measures_nothing_twice(tiny_llama, ids, monkeypatch):
    seen = []
    prune = Student.prune

    def noting(self, patterns):
        seen.append(tuple(patterns.values()))
        prune(self, patterns)

    monkeypatch.setattr(unipts.Student, "prune", noting)
    found, budget, _ = planned(UniPTS(**{**QUICK, "generations": 4}, epochs=0), tiny_llama, ids)
    assert found.scores["divergence of the searched plan"] <= found.scores["divergence of the uniform plan"]
    assert len(seen) == len(set(seen))
    assert all(
        sum(budget.zeros_of(i, p) for i, p in zip(budget.linears, each, strict=True)) == budget.total for each in seen
    )
    assert found.masks is None
    assert not found.weights


def test_without_a_search_the_plan_is_uniform(tiny_llama, ids):
    found, _, _ = planned(UniPTS(generations=0, epochs=0), tiny_llama, ids)
    assert all(pattern.sparsity == pytest.approx(0.6, abs=1e-3) for pattern in found.patterns.values())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4), Unstructured(0.6, "row")], ids=str)
def test_training_comes_nearer_to_the_dense_model_under_exact_masks(optimizer, pattern, tiny_llama, ids):
    rate = 5e-4 if optimizer == "adamw" else 0.5
    planner = UniPTS(**QUICK, epochs=6, optimizer=optimizer, learning_rate=rate, update=1)
    found, budget, sweep = planned(planner, tiny_llama, ids, pattern)
    assert found.scores["divergence after training"] < found.scores["divergence of the searched plan"]
    moved = 0
    for view in find_all_linears(tiny_llama):
        mask, weight = found.masks[view.name], found.weights[view.name]
        found.patterns[view.name].check(mask, budget.scope)
        assert not weight[~mask].any()
        moved += int((mask != found.patterns[view.name].mask(view.read().abs(), budget.scope)).sum())
    assert moved > 0
    report = apply_plan(found, sweep, tiny_llama).run(tiny_llama, ids)
    assert all(torch.equal(mask, report.masks[name]) for name, mask in found.masks.items())
    for view in find_all_linears(tiny_llama):
        assert torch.equal(view.read(), found.weights[view.name])
    assert summary(found, budget)["weights"]


def test_masks_rest_at_the_end(tiny_llama, ids, monkeypatch):
    renewals = []
    renew, write = Student.renew, Student.write
    monkeypatch.setattr(Student, "renew", lambda self, patterns: (renewals.append("renew"), renew(self, patterns))[1])
    monkeypatch.setattr(Student, "write", lambda self: (renewals.append("write"), write(self))[1])
    planned(UniPTS(generations=0, epochs=10, update=1, rest=0.5), tiny_llama, ids)
    training = renewals[renewals.index("write", 3) :]
    assert "renew" not in training[-10:]
    assert "renew" in training[: len(training) // 2]


def test_a_training_that_does_harm_is_undone_and_says_so(tiny_llama, ids):
    found, _, _ = planned(UniPTS(**QUICK, epochs=1, learning_rate=100.0), tiny_llama, ids)
    assert found.scores["divergence after training"] == found.scores["divergence of the searched plan"]
    assert "its start is kept" in found.notes[0]


def test_zeros_that_stay_are_never_trained_back(tiny_llama, ids):
    with torch.no_grad():
        for view in find_all_linears(tiny_llama):
            view.read()[:, ::3] = 0.0
    zeros = {view.name: view.read() == 0 for view in find_all_linears(tiny_llama)}
    found, _, _ = planned(UniPTS(**QUICK, epochs=3, update=1), tiny_llama, ids, freeze_zeros=True)
    assert not any(bool((found.masks[name] & zero).any()) for name, zero in zeros.items())


def test_scores_are_numbers_for_a_report(tiny_llama, ids):
    found, _, _ = planned(UniPTS(**QUICK, epochs=1), tiny_llama, ids)
    assert all(math.isfinite(value) and value >= 0 for value in found.scores.values())
