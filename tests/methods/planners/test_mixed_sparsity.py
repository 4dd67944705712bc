"""Mixed sparsity: traces equal closed forms, ranks equal the paper's rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from secateur.core.allocation import Budget, Prunable
from secateur.core.contracts import PlanTask
from secateur.core.pattern import NM, Unstructured
from secateur.engine.backward import gradient, gradients_of, next_token_loss, sampled_loss
from secateur.engine.planning import cut, planning_of
from secateur.engine.sweep import Sweep
from secateur.methods.planners.mixed_sparsity import MixedSparsity, densities, fisher_traces, hessian_traces
from secateur.methods.pruners.sparsegpt import SparseGPT
from secateur.models.linears import find_all_linears


def task_of(model, ids, tokens=24, keep=None, names=("0.mlp.down_proj", "1.self_attn.v_proj")) -> PlanTask:
    linears = tuple(
        Prunable(view.name, view.block, view.out_features, view.in_features)
        for view in find_all_linears(model)
        if any(view.name.endswith(name) for name in names)
    )
    return PlanTask(
        model,
        Budget(linears, Unstructured(0.5), "layer"),
        cut(ids, keep, tokens),
        lambda _: iter(()),
        False,
        torch.Generator().manual_seed(0),
    )


def plan(planner, model, ids, pattern=Unstructured(0.7)):  # noqa: B008
    names = {linear.name: pattern for linear in find_all_linears(model)}
    sweep = Sweep(patterns=names, pruner=SparseGPT(), batch_tokens=96)
    return planning_of(planner, model, names, pattern, ()).run(sweep, model, ids)


def exact_traces(model, ids, view, kind):
    """Return the trace of the Hessian or of the Gauss-Newton matrix of the summed loss, entry by entry."""
    parameter = view.parameter
    original = parameter.detach().clone()

    def logits(weight):
        return torch.func.functional_call(model, {name: weight}, (ids,), {"use_cache": False}).logits[:, :-1]

    name = next(name for name, candidate in model.named_parameters() if candidate is parameter)
    if kind == "hessian":

        def loss(weight):
            return F.cross_entropy(logits(weight).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

        total = 0.0
        for index in range(original.numel()):
            basis = torch.zeros(original.numel(), dtype=original.dtype)
            basis[index] = 1e-4
            up = torch.func.grad(loss)(original + basis.view_as(original)).flatten()[index]
            down = torch.func.grad(loss)(original - basis.view_as(original)).flatten()[index]
            total += float((up - down).detach()) / 2e-4
        return total
    jacobian = torch.func.jacrev(logits)(original).flatten(3)  # (batch, tokens, vocabulary, parameters)
    probability = logits(original).softmax(-1)
    mean = torch.einsum("btv,btvp->btp", probability, jacobian)
    return float((torch.einsum("btv,btvp->", probability, jacobian.square()) - mean.square().sum()).detach())


@pytest.fixture
def small(make_llama):
    """A model in float64 whose matrices are small enough to look at every entry."""
    model = make_llama(hidden=8, vocabulary=16, attn_implementation="eager").double()
    return model


@pytest.fixture
def tokens():
    return torch.randint(16, (2, 6), generator=torch.Generator().manual_seed(1))


def test_the_fisher_trace_is_that_of_the_gauss_newton_matrix(small, tokens):
    task = task_of(small, tokens)
    found = fisher_traces(task, probes=300)
    for view in find_all_linears(small):
        if view.name in found:
            exact = exact_traces(small, tokens, view, "fisher") / tokens.numel()
            assert found[view.name] == pytest.approx(exact, rel=0.2)


def test_the_hessian_trace_is_that_of_finite_differences(small, tokens):
    task = task_of(small, tokens, names=("1.self_attn.v_proj",))
    found = hessian_traces(task, probes=800)
    view = next(view for view in find_all_linears(small) if view.name in found)
    exact = exact_traces(small, tokens, view, "hessian") / tokens.numel()
    assert found[view.name] == pytest.approx(exact, rel=0.25)


def test_how_the_tokens_are_cut_changes_the_draws_alone(small, tokens):
    whole, parts = (fisher_traces(task_of(small, tokens, size), probes=100) for size in (12, 6))
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=0.35)


def test_a_drawn_loss_has_the_draws_of_its_generator(small, tokens):
    views = find_all_linears(small)
    with gradients_of(small, views):
        sampled_loss(small, tokens, None, torch.Generator().manual_seed(1)).backward()
        first = gradient(views[0]).clone()
        for view in views:
            view.parameter.grad = None
        sampled_loss(small, tokens, None, torch.Generator().manual_seed(1)).backward()
        assert torch.equal(first, gradient(views[0]))
    assert all(parameter.grad is None for parameter in small.parameters())


def test_padding_adds_nothing_to_the_loss(small, tokens):
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, 4:] = False
    with torch.no_grad():
        padded, short = next_token_loss(small, tokens, keep), next_token_loss(small, tokens[:, :4], None)
    torch.testing.assert_close(padded, short)


def test_ranks_become_densities_at_equal_distances():
    found = densities({"a": 3.0, "b": 1.0, "c": 2.0, "d": 9.0}, 0.1)
    assert found == pytest.approx({"b": -0.1, "c": -0.1 / 3, "a": 0.1 / 3, "d": 0.1})
    assert densities({"a": 1.0, "b": 1.0, "c": 1.0}, 0.1) == pytest.approx({"a": 0.0, "b": 0.0, "c": 0.0})
    assert densities({"a": 1.0, "b": 1.0, "c": 5.0}, 0.1) == pytest.approx({"a": -0.05, "b": -0.05, "c": 0.1})
    assert densities({"a": 1.0}, 0.1) == {"a": 0.0}


@pytest.mark.parametrize("unit", ["linear", "block"])
def test_what_is_more_sensitive_is_never_sparser(unit, tiny_llama, ids):
    found = plan(MixedSparsity(unit=unit), tiny_llama, ids)
    sparsity = {name: pattern.sparsity for name, pattern in found.patterns.items()}
    if unit == "block":
        sparsity = {f"block {name.split('.')[2]}": value for name, value in sparsity.items()}
    ordered = sorted(found.scores, key=lambda name: found.scores[name])
    values = [sparsity[name] for name in ordered]
    assert values == sorted(values, reverse=True)
    assert max(values) - min(values) == pytest.approx(0.2, abs=2e-3)


def test_a_model_without_gradients_is_planned_uniformly_and_says_so(tiny_llama, ids):
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()
    found = plan(MixedSparsity(), tiny_llama, ids)
    assert all(pattern.sparsity == pytest.approx(0.7, abs=2e-3) for pattern in found.patterns.values())
    assert "the plan is uniform" in found.notes[0]


def test_both_estimates_find_a_plan_for_packed_experts_and_turned_weights(ids):
    from families import prepared

    for family in ("gpt2", "mixtral"):
        model = prepared(family)
        for estimate in ("fisher", "hessian"):
            found = plan(MixedSparsity(estimate=estimate), model, ids % 32, NM(2, 4))
            assert set(found.patterns) == {linear.name for linear in find_all_linears(model)}
