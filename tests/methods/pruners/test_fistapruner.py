from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import fistapruner as published
from torch import Tensor

from secateur.core.linalg import corrected_target, quadratic_loss, refit, refit_exact
from secateur.core.pattern import NM, Pattern, Unstructured
from secateur.core.problem import LayerProblem
from secateur.core.solve import solve
from secateur.methods.pruners import fistapruner
from secateur.methods.pruners.fistapruner import FISTAPruner, fista, lipschitz_constant, shrink
from secateur.methods.pruners.magnitude import Magnitude
from secateur.methods.pruners.mrp import MRP, removed_sets
from secateur.methods.pruners.sparsegpt import SparseGPT
from secateur.methods.pruners.wanda import Wanda
from strategies import correlated_gram, correlated_inputs, grams, patterns, random_weight, seeds

quick = settings(max_examples=20, deadline=None)
ALONE = FISTAPruner(base=None)


def problem_of(pattern: Pattern, rows: int = 24, columns: int = 64, seed: int = 0, **given) -> LayerProblem:
    gram = correlated_gram(columns, seed=seed)
    return LayerProblem(random_weight(rows, columns, seed), pattern, gram=gram, diag=gram.diagonal().clone(), **given)


def lasso(weight: Tensor, gram: Tensor, penalty: Tensor, steps: int, start: Tensor | None = None) -> Tensor:
    start = weight if start is None else start
    return fista(start, gram, weight @ gram, penalty, lipschitz_constant(gram), steps)


def objective(value: Tensor, weight: Tensor, gram: Tensor, penalty: Tensor) -> Tensor:
    """Of each row, `(rows,)`."""
    error = value - weight
    return ((error @ gram) * error).sum(1) / 2 + (penalty * value.abs()).sum(1)


def test_shrinking_is_the_proximal_point_of_the_penalty():
    value = torch.linspace(-3, 3, 61)
    threshold = torch.tensor(0.75)
    grid = torch.linspace(-4, 4, 4001)
    best = grid[((grid - value[:, None]).square() / 2 + threshold * grid.abs()).argmin(1)]
    torch.testing.assert_close(shrink(value, threshold), best, rtol=0, atol=2e-3)
    assert not shrink(value, torch.tensor(torch.inf)).any()
    assert torch.equal(shrink(value, torch.tensor(0.0)), value)


@given(columns=st.integers(1, 40), decay=st.sampled_from([0.0, 0.5, 1.5]), seed=seeds)
@quick
def test_the_lipschitz_constant_is_just_above_the_largest_eigenvalue(columns, decay, seed):
    gram = correlated_gram(columns, decay, seed=seed)
    exact = float(torch.linalg.eigvalsh(gram.double())[-1])
    assert 0.999 * exact <= lipschitz_constant(gram) <= 1.021 * exact


def test_the_lipschitz_constant_of_no_inputs_is_zero():
    assert lipschitz_constant(torch.zeros(5, 5)) == 0.0


@given(data=st.data(), columns=st.integers(1, 20), rows=st.integers(1, 4), share=st.floats(0, 1.5), seed=seeds)
@quick
def test_no_step_raises_the_objective_of_any_row(data, columns, rows, share, seed):
    gram, weight = data.draw(grams(columns)).double(), random_weight(rows, columns, seed).double()
    penalty = (share * (weight @ gram).abs().max() * torch.rand(rows, columns)).double()
    start = random_weight(rows, columns, seed + 1).double()
    values = [lasso(weight, gram, penalty, steps, start) for steps in (0, 1, 2, 3, 5, 9, 20, 40)]
    losses = torch.stack([objective(value, weight, gram, penalty) for value in values])
    assert (losses.diff(dim=0) <= 1e-9 * losses[0]).all()


def test_a_step_size_that_is_too_long_cannot_raise_the_objective():
    gram, weight = correlated_gram(12).double(), random_weight(5, 12).double()
    penalty = torch.full_like(weight, 0.01)
    long = fista(-weight, gram, weight @ gram, penalty, lipschitz_constant(gram) / 4, 30)
    assert (objective(long, weight, gram, penalty) <= objective(-weight, weight, gram, penalty)).all()


@given(data=st.data(), columns=st.integers(1, 12), share=st.floats(0.01, 0.9), seed=seeds)
@settings(max_examples=8, deadline=None)
def test_many_steps_reach_the_optimality_conditions_of_the_lasso(data, columns, share, seed):
    gram = data.draw(grams(columns)).double()
    gram = gram + 0.1 * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    weight = random_weight(3, columns, seed).double()
    penalty = (share * (weight @ gram).abs().max()).expand_as(weight).contiguous()
    value = lasso(weight, gram, penalty, 400)
    slope = (value - weight) @ gram
    tolerance = 1e-5 * float(penalty[0, 0])
    assert (slope.abs() <= penalty + tolerance).all()
    kept = value != 0
    torch.testing.assert_close(slope[kept], -penalty[kept] * value[kept].sign(), rtol=0, atol=tolerance)


def test_steps_are_the_published_ones_where_no_row_is_held_back():
    gram, weight = correlated_gram(24).double(), random_weight(4, 24).double()
    lipschitz = 1.5 * float(torch.linalg.eigvalsh(gram)[-1])
    penalty = 0.02 * float((weight @ gram).abs().max())
    ours = fista(weight, gram, weight @ gram, torch.full_like(weight, penalty), lipschitz, 6)
    torch.testing.assert_close(ours, published.fista(weight, gram, weight @ gram, penalty, lipschitz, 6))


def test_without_a_penalty_the_target_comes_back_and_with_the_largest_nothing_stays():
    gram, weight = correlated_gram(10, 0.5).double(), random_weight(3, 10).double()
    start = torch.zeros_like(weight)
    free = lasso(weight, gram, torch.zeros_like(weight), 1000, start)
    torch.testing.assert_close(free, weight, rtol=1e-4, atol=1e-4)
    most = (weight @ gram).abs().amax().expand_as(weight)
    assert not lasso(weight, gram, most, 500).any()
    barred = torch.where(torch.arange(10) < 4, torch.inf, 0.0).double().expand_as(weight)
    assert not lasso(weight, gram, barred, 50)[:, :4].any()


def test_uncorrelated_inputs_have_the_soft_threshold_as_solution():
    weight, gram = random_weight(6, 16), 2 * torch.eye(16)
    penalty = torch.full_like(weight, 0.5)
    torch.testing.assert_close(lasso(weight, gram, penalty, 60), shrink(weight, penalty / 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5, "row"), Unstructured(0.7, "layer")], ids=str)
@pytest.mark.parametrize("solver", [ALONE, FISTAPruner(), FISTAPruner(reweighted=False)], ids=repr)
def test_uncorrelated_inputs_give_the_optimum(pattern, solver):
    weight, diag = random_weight(8, 32), torch.rand(32, generator=torch.Generator().manual_seed(0)) + 0.1
    pruned = solver.prune(LayerProblem(weight, pattern, gram=torch.diag(diag)))
    assert torch.equal(pruned.mask, pattern.mask(weight.square() * diag, "layer"))
    torch.testing.assert_close(pruned.weight[pruned.mask], weight[pruned.mask], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [Magnitude(), Wanda(), SparseGPT(), MRP(), None], ids=repr)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6), Unstructured(0.7, "row")], ids=str)
def test_the_result_is_never_worse_than_the_refitted_base(base, pattern):
    problem = problem_of(pattern)
    solver = FISTAPruner(base=base)
    pruned = solver.prune(problem)
    pattern.check(pruned.mask, solver.scope)
    if base is not None:
        first = base.prune(problem)
        assert problem.loss(pruned.weight) <= problem.loss(first.weight)
        refitted = problem.loss(refit(problem.weight, problem.gram, first.mask))
        assert problem.loss(pruned.weight) <= refitted * 1.001


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5), Unstructured(0.7)], ids=str)
def test_the_path_beats_the_published_search_and_the_refitted_sweep(pattern):
    problem = problem_of(pattern, 48, 128)
    start = SparseGPT().prune(problem)
    given = {"n": pattern.n, "m": pattern.m} if isinstance(pattern, NM) else {"sparsity": pattern.sparsity}
    theirs = published.prune(problem.weight, problem.gram, start.weight, **given)
    swept = problem.loss(refit(problem.weight, problem.gram, start.mask))
    refitted = problem.loss(refit(problem.weight, problem.gram, theirs != 0))
    short = problem.loss(FISTAPruner().prune(problem).weight)
    assert short < 0.99 * swept
    assert short < refitted
    assert short < 0.9 * problem.loss(theirs)
    ours = problem.loss(FISTAPruner(lambdas=16).prune(problem).weight)
    assert ours < 0.98 * swept
    assert ours < 0.98 * refitted
    assert ours < 0.8 * problem.loss(theirs)
    assert ours < short


@given(data=st.data(), rows=st.integers(1, 5), columns=st.integers(1, 24), seed=seeds)
@quick
def test_budgets_are_met_on_small_layers(data, rows, columns, seed):
    pattern = data.draw(patterns(columns))
    solver = FISTAPruner(
        base=data.draw(st.sampled_from([None, SparseGPT()])),
        reweighted=data.draw(st.booleans()),
        scaled=data.draw(st.booleans()),
        lambdas=4,
    )
    solved = solve(solver, problem_of(pattern, rows, columns, seed))
    pattern.check(solved.pruned.mask, solver.scope)
    assert solved.loss_after <= solved.loss_before * (1 + 1e-5)


def test_small_rows_come_close_to_the_optimum_over_all_masks():
    masks = removed_sets(5, 10)
    gaps = []
    for seed in range(8):
        problem = problem_of(Unstructured(0.5), 1, 10, seed)
        double = replace(problem, weight=problem.weight.double(), gram=problem.gram.double())
        many = double.weight.expand(len(masks), -1)
        error = refit_exact(many, double.gram, masks, 0.0) - many
        losses = ((error @ double.gram) * error).sum(1)
        found = refit_exact(double.weight, double.gram, FISTAPruner().prune(problem).mask, 0.0)
        gaps.append(double.loss(found) / float(losses.min()))
    assert min(gaps) > 1 - 1e-9
    assert sorted(gaps)[4] < 1.1  # the median
    assert max(gaps) < 2.0


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=str)
def test_the_scale_of_inputs_does_not_matter(pattern):
    problem = in_double(problem_of(pattern))
    scale = torch.logspace(-2, 2, 64).double()
    scaled = replace(
        problem, weight=problem.weight / scale, gram=problem.gram * scale * scale[:, None], diag=None, shared={}
    )
    straight, other = ALONE.prune(problem), ALONE.prune(scaled)
    assert torch.equal(straight.mask, other.mask)
    assert scaled.loss(other.weight) == pytest.approx(problem.loss(straight.weight), rel=1e-3)
    raw = FISTAPruner(base=None, scaled=False)
    assert not torch.equal(raw.prune(problem).mask, raw.prune(scaled).mask)


def in_double(problem: LayerProblem) -> LayerProblem:
    return replace(problem, weight=problem.weight.double(), gram=problem.gram.double())


def test_scaling_and_reweighting_pay_in_total():
    problem = problem_of(Unstructured(0.6), 48, 128)
    best = problem.loss(ALONE.prune(problem).weight)
    assert best < problem.loss(FISTAPruner(base=None, scaled=False).prune(problem).weight)
    assert best < problem.loss(FISTAPruner(base=None, reweighted=False).prune(problem).weight)


def test_a_start_that_meets_the_pattern_is_refined_and_its_zeros_may_return():
    problem = problem_of(Unstructured(0.6))
    start = Magnitude().prune(problem).weight
    pruned = FISTAPruner().prune(replace(problem, start=start))
    assert (pruned.mask & (start == 0)).any()
    assert problem.loss(pruned.weight) < problem.loss(refit(problem.weight, problem.gram, start != 0))


@pytest.mark.parametrize("solver", [FISTAPruner(), ALONE], ids=repr)
def test_zeros_of_a_start_with_too_few_stay(solver):
    problem = problem_of(NM(1, 4))
    start = Magnitude().prune(replace(problem, pattern=NM(2, 4))).weight
    pruned = solver.prune(replace(problem, start=start))
    NM(1, 4).check(pruned.mask)
    assert not (pruned.mask & (start == 0)).any()


def test_a_start_with_too_many_zeros_gets_some_back():
    problem = problem_of(Unstructured(0.5))
    start = Magnitude().prune(replace(problem, pattern=Unstructured(0.8))).weight
    for solver in (FISTAPruner(), ALONE):
        solved = solve(solver, replace(problem, start=start))
        assert int(solved.pruned.mask.sum()) == problem.weight.numel() // 2


def test_the_start_is_left_as_it_was_where_nothing_better_is_found():
    problem = problem_of(Unstructured(0.5))
    best = FISTAPruner(base=MRP()).prune(problem)
    again = FISTAPruner().prune(replace(problem, start=best.weight))
    assert problem.loss(again.weight) <= problem.loss(best.weight)


def test_frozen_entries_stay_zero_although_the_target_is_not():
    frozen = torch.zeros(24, 64, dtype=torch.bool)
    frozen[:, ::4] = True
    for pattern in (NM(2, 4), Unstructured(0.5), Unstructured(0.5, "row")):
        for solver in (FISTAPruner(), ALONE):
            pruned = solve(solver, problem_of(pattern, frozen=frozen)).pruned
            assert not (pruned.mask & frozen).any()


def test_a_frozen_half_leaves_weights_alone_to_be_solved():
    frozen = torch.rand(12, 32, generator=torch.Generator().manual_seed(0)).argsort(1) < 16
    problem = problem_of(Unstructured(0.5, "row"), 12, 32, frozen=frozen)
    pruned = solve(FISTAPruner(), problem).pruned
    assert torch.equal(pruned.mask, ~frozen)
    assert problem.loss(pruned.weight) <= 1.01 * problem.loss(refit(problem.weight, problem.gram, ~frozen))


def test_an_error_corrected_run_is_the_plain_run_on_the_corrected_target():
    dense_inputs = correlated_inputs(256, 32, seed=1)
    sparse_inputs = dense_inputs + 0.1 * correlated_inputs(256, 32, seed=2)
    gram, cross = sparse_inputs.T @ sparse_inputs / 256, dense_inputs.T @ sparse_inputs / 256
    weight = random_weight(12, 32)
    target = corrected_target(weight, cross, gram)
    plain = LayerProblem(target, Unstructured(0.5), gram=gram)
    corrected = FISTAPruner().prune(replace(plain, dense=weight, shared={})).weight
    assert torch.equal(corrected, FISTAPruner().prune(plain).weight)
    unaware = FISTAPruner().prune(replace(plain, weight=weight, shared={})).weight

    def error(value: Tensor) -> float:
        return float((dense_inputs @ weight.T - sparse_inputs @ value.T).square().sum())

    assert error(corrected) < error(unaware)


@pytest.mark.parametrize("tokens", [1, 8, 63])
@pytest.mark.parametrize("solver", [FISTAPruner(lambdas=4), FISTAPruner(base=None, scaled=False, lambdas=4)], ids=repr)
def test_fewer_tokens_than_inputs_are_no_obstacle(tokens, solver):
    inputs = correlated_inputs(tokens, 64)
    problem = LayerProblem(random_weight(6, 64), NM(2, 4), gram=inputs.T @ inputs / tokens)
    solved = solve(solver, problem)
    assert solved.loss_after <= solved.loss_before * (1 + 1e-5)


@pytest.mark.parametrize("solver", [FISTAPruner(lambdas=4), FISTAPruner(base=None, scaled=False, lambdas=4)], ids=repr)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5), Unstructured(0.5, "row")], ids=str)
def test_degenerate_layers_are_solved(solver, pattern):
    gram = correlated_gram(16)
    dead = gram.clone()
    dead[3], dead[:, 3], dead[10], dead[:, 10] = 0.0, 0.0, 0.0, 0.0
    for weight, inputs in (
        (torch.zeros(4, 16), gram),
        (torch.ones(4, 16), gram),
        (random_weight(4, 16), dead),
        (random_weight(4, 16), torch.zeros(16, 16)),
        (random_weight(4, 16), torch.ones(16, 16)),
        (1e15 * random_weight(4, 16), 1e-15 * gram),
        (1e-15 * random_weight(4, 16), 1e15 * gram),
    ):
        pruned = solve(solver, LayerProblem(weight, pattern, gram=inputs)).pruned
        pattern.check(pruned.mask, solver.scope)
        assert torch.isfinite(pruned.weight).all()


def test_inputs_that_are_never_active_are_pruned_first():
    problem = problem_of(Unstructured(0.5))
    problem.gram[5], problem.gram[:, 5] = 0.0, 0.0
    for solver in (FISTAPruner(), ALONE):
        assert not solver.prune(replace(problem, shared={})).mask[:, 5].any()


def test_the_path_ends_when_solutions_get_worse(monkeypatch):
    calls = []
    original = fistapruner.fista
    monkeypatch.setattr(fistapruner, "fista", lambda *given: calls.append(1) or original(*given))
    problem = problem_of(NM(2, 4))
    patient = FISTAPruner(lambdas=16, patience=16).prune(problem)
    assert len(calls) == 16
    calls.clear()
    hasty = FISTAPruner(lambdas=16, patience=2).prune(problem)
    assert 2 <= len(calls) < 16
    assert problem.loss(hasty.weight) < 1.02 * problem.loss(patient.weight)


def test_linears_with_the_same_inputs_find_the_step_size_once(monkeypatch):
    calls = []
    original = fistapruner.lipschitz_constant
    monkeypatch.setattr(fistapruner, "lipschitz_constant", lambda gram: calls.append(1) or original(gram))
    first = problem_of(NM(2, 4))
    for seed in range(3):
        FISTAPruner(lambdas=2).prune(replace(first, weight=random_weight(8, 64, seed)))
    assert calls == [1]


def test_needs_and_scope_are_those_of_the_base():
    assert FISTAPruner(base=Wanda()).needs == {"gram", "diag"}
    assert FISTAPruner(base=Wanda()).scope == "row"
    assert ALONE.needs == {"gram"}
    assert ALONE.scope == "layer"


@given(seed=seeds)
@settings(max_examples=5, deadline=None)
def test_rounding_from_the_published_start_is_the_smallest_magnitudes(seed):
    value = random_weight(4, 8, seed)
    for pattern, budget in ((NM(2, 4), (0.0, 2, 4)), (Unstructured(0.4), (0.4, 0, 0))):
        rounded = published.round_to(value, *budget)
        assert torch.equal(rounded != 0, pattern.mask(value.abs(), "layer"))


def test_the_loss_of_a_candidate_is_the_loss_of_the_problem():
    problem = problem_of(NM(2, 4))
    metric = FISTAPruner()._metric(problem)
    error = random_weight(24, 64, 5)
    torch.testing.assert_close(
        quadratic_loss(error * metric.scale, metric.gram), quadratic_loss(error, problem.gram), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("field", [{"steps": 0}, {"lambdas": 0}, {"patience": 0}, {"base": "wanda"}])
def test_hyper_parameters_out_of_range_are_refused(field):
    with pytest.raises(ValidationError, match=next(iter(field))):
        FISTAPruner(**field)
