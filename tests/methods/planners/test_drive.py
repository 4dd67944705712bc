"""DRIVE: its terms are the stand-alone scores, its rounds follow the schedule, masks are nested and exact."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from secateur.core.pattern import NM, Unstructured
from secateur.engine.backward import gradient, gradients_of, next_token_loss
from secateur.engine.planning import apply_plan, planning_of, summary
from secateur.engine.sweep import Sweep
from secateur.methods.planners import drive
from secateur.methods.planners.drive import DRIVE, zeros_after
from secateur.methods.pruners.magnitude import Magnitude
from secateur.models.linears import find_all_linears


def planned(planner, model, ids, pattern=Unstructured(0.6), **settings):  # noqa: B008
    names = {linear.name: pattern for linear in find_all_linears(model)}
    sweep = Sweep(patterns=names, pruner=Magnitude(), batch_tokens=96, **settings)
    planning = planning_of(planner, model, names, pattern, ())
    return planning.run(sweep, model, ids), planning.budget(sweep, model), sweep


def test_kept_shares_fall_geometrically_to_the_exact_end():
    counts = [zeros_after(done, 4, 875, 1000) for done in range(1, 5)]
    assert counts == [1000 - round(0.125 ** (k / 4) * 1000) for k in range(1, 4)] + [875]
    assert counts == sorted(counts)
    assert zeros_after(1, 1, 333, 1000) == 333
    assert [zeros_after(k, 3, 0, 10) for k in (1, 2, 3)] == [0, 0, 0]
    assert [zeros_after(k, 3, 10, 10) for k in (1, 2, 3)] == [10, 10, 10]


TERMS = {
    "magnitude": lambda weight, slope: weight.abs(),
    "sensitivity": lambda weight, slope: (weight * slope).abs(),
    "gradient": lambda weight, slope: slope.abs(),
}


@pytest.mark.parametrize("term", TERMS)
def test_one_term_in_one_round_is_the_stand_alone_score(term, tiny_llama, ids):
    alone = {name: float(name == term) for name in TERMS}
    found, budget, _ = planned(DRIVE(**alone, rounds=1, floor=0.0), tiny_llama, ids)
    views = find_all_linears(tiny_llama)
    with gradients_of(tiny_llama, views):
        next_token_loss(tiny_llama, ids, None).backward()
        score = {view.name: TERMS[term](view.read(), gradient(view)).clone() for view in views}
    threshold = torch.cat([value.flatten() for value in score.values()]).kthvalue(budget.total).values
    wrong = sum(int((found.masks[name] != (value > threshold)).sum()) for name, value in score.items())
    assert wrong <= 0.01 * budget.size  # scores are compared between linears in steps below 1 %


def test_the_gradient_of_a_gate_is_the_weight_times_its_gradient(tiny_llama, ids):
    view = find_all_linears(tiny_llama)[3]
    with gradients_of(tiny_llama, [view]):
        next_token_loss(tiny_llama, ids, None).backward()
        product = (view.read() * gradient(view)).clone()
    gate = torch.ones_like(view.read(), requires_grad=True)
    name = next(name for name, parameter in tiny_llama.named_parameters() if parameter is view.parameter)
    gated = {name: view.read() * gate}
    logits = torch.func.functional_call(tiny_llama, gated, (ids,), {"use_cache": False}).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(torch.autograd.grad(loss, gate)[0], product, rtol=1e-4, atol=1e-5)


def test_the_scale_of_the_loss_does_not_matter(tiny_llama, ids, monkeypatch):
    before, _, _ = planned(DRIVE(rounds=2), tiny_llama, ids)
    loss = drive.next_token_loss
    monkeypatch.setattr(drive, "next_token_loss", lambda *given: 8 * loss(*given))
    after, _, _ = planned(DRIVE(rounds=2), tiny_llama, ids)
    assert all(torch.equal(mask, after.masks[name]) for name, mask in before.masks.items())


def test_masks_of_later_rounds_lie_inside_those_of_earlier_ones(tiny_llama, ids, monkeypatch):
    rounds = []
    share = drive.share

    def noting(budget, total, floor, masks, scores):
        rounds.append({name: mask.clone() for name, mask in masks.items()})
        return share(budget, total, floor, masks, scores)

    monkeypatch.setattr(drive, "share", noting)
    found, budget, _ = planned(DRIVE(rounds=4), tiny_llama, ids)
    rounds.append(dict(found.masks))
    for done, (before, after) in enumerate(pairwise(rounds), start=1):
        assert not any(bool((after[name] & ~before[name]).any()) for name in after)
        zeros = sum(int((~mask).sum()) for mask in after.values())
        assert zeros == zeros_after(done, 4, budget.total, budget.size)


def test_no_linear_is_cut_off(tiny_llama, ids):
    with torch.no_grad():
        find_all_linears(tiny_llama)[5].read().mul_(1e-4)  # its scores are the lowest
    name = find_all_linears(tiny_llama)[5].name
    free, _, _ = planned(DRIVE(rounds=2, floor=0.0, gradient=0.0), tiny_llama, ids, Unstructured(0.7))
    held, budget, _ = planned(DRIVE(rounds=2, floor=0.5, gradient=0.0), tiny_llama, ids, Unstructured(0.7))
    assert free.scores[name] > 0.99
    assert held.scores[name] <= 0.851
    assert summary(held, budget)["pruned"] == budget.total


def test_groups_of_an_nm_plan_are_masks_of_their_patterns(tiny_llama, ids):
    found, budget, sweep = planned(DRIVE(rounds=3), tiny_llama, ids, NM(2, 4))
    assert summary(found, budget)["pruned"] == budget.total
    assert all(isinstance(pattern, NM) for pattern in found.patterns.values())
    report = apply_plan(found, sweep, tiny_llama).run(tiny_llama, ids)
    assert all(torch.equal(mask, report.masks[name]) for name, mask in found.masks.items())


def test_a_model_without_gradients_is_ranked_by_magnitude_and_says_so(tiny_llama, ids):
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()
    found, _, _ = planned(DRIVE(rounds=2, floor=0.0), tiny_llama, ids)
    assert "ranked by magnitude" in found.notes[0]
    magnitude, _, _ = planned(DRIVE(rounds=2, floor=0.0, sensitivity=0.0, gradient=0.0), tiny_llama, ids)
    assert all(torch.equal(mask, magnitude.masks[name]) for name, mask in found.masks.items())
