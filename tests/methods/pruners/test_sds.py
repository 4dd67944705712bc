"""SDS: the re-dense step against explicit gradient steps, its limits, and what each step does to the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from secateur.core.errors import InputError, NumericError, PatternError, RecipeError
from secateur.core.linalg import refit
from secateur.core.pattern import NM, Pattern, Unstructured
from secateur.core.problem import LayerProblem, Pruned
from secateur.core.solve import solve
from secateur.methods.pruners.dsnot import DSnoT
from secateur.methods.pruners.magnitude import Magnitude
from secateur.methods.pruners.sds import SDS, Spectrum, adjust, largest_eigenvalue, mean_diagonal, redense, redense_l1
from secateur.methods.pruners.sparsegpt import SparseGPT
from secateur.methods.pruners.wanda import Wanda
from strategies import correlated_inputs, random_weight, seeds

quick = settings(max_examples=15, deadline=None)
PATTERNS: list[Pattern] = [NM(2, 4), NM(1, 4), Unstructured(0.7, "row"), Unstructured(0.6, "layer")]
BASES = [Wanda(), SparseGPT(block_size=16), Magnitude(), DSnoT()]
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
each_base = pytest.mark.parametrize("base", BASES, ids=lambda base: type(base).__name__)


def problem_of(
    pattern: Pattern, rows: int = 24, columns: int = 32, seed: int = 0, tokens: int | None = None, **given
) -> LayerProblem:
    inputs = correlated_inputs(tokens or 4 * columns, columns, seed=seed, offset=0.5)
    gram = inputs.T @ inputs / len(inputs)
    weight = given.pop("weight", random_weight(rows, columns, seed))
    return LayerProblem(weight, pattern, gram=gram, diag=gram.diagonal().clone(), mean=inputs.mean(0), **given)


def half_pruned(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return a pruned weight, the dense one and their Gram, float64."""
    problem = problem_of(Unstructured(0.5, "row"), seed=seed)
    return Wanda().prune(problem).weight.double(), problem.weight.double(), problem.gram.double()


def descended(sparse: Tensor, target: Tensor, gram: Tensor, rate: float, steps: int, l1=0.0, l2=0.0) -> Tensor:
    """Return the weight after explicit (proximal) gradient steps, the gradient taken by autograd."""
    unit, weight = gram / gram.diagonal().mean(), sparse.clone().requires_grad_()
    threshold = rate * l1 * target.square().mean().sqrt()
    for _ in range(steps):
        error = weight - target
        loss = ((error @ unit) * error).sum() / 2 + l2 / 2 * weight.square().sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            moved = weight - rate * gradient
            weight = (moved.abs() - threshold).clamp_min(0) * moved.sign()
        weight.requires_grad_()
    return weight.detach()


@pytest.mark.parametrize("l2", [0.0, 0.3])
@pytest.mark.parametrize("steps", [1, 7, 200])
def test_the_closed_form_equals_explicit_gradient_steps(steps, l2):
    sparse, target, gram = half_pruned()
    rate = 0.02
    closed = redense(sparse, target, Spectrum.of(gram), rate * steps, l2=l2, steps=steps)
    expected = descended(sparse, target, gram, rate, steps, l2=l2)
    torch.testing.assert_close(closed, expected, rtol=1e-10, atol=1e-10)


def test_many_steps_are_the_flow():
    sparse, target, gram = half_pruned()
    spectrum = Spectrum.of(gram)
    flow = redense(sparse, target, spectrum, 3.0, l2=0.1)
    errors = [(redense(sparse, target, spectrum, 3.0, l2=0.1, steps=n) - flow).norm() for n in (100, 1000, 10000)]
    assert errors[2] < 0.2 * errors[1] < 0.04 * errors[0]


def test_without_time_nothing_moves_and_with_endless_time_the_dense_weight_comes_back():
    sparse, target, gram = half_pruned()
    spectrum = Spectrum.of(gram)
    torch.testing.assert_close(redense(sparse, target, spectrum, 0.0), sparse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(redense(sparse, target, spectrum, 1e9), target, rtol=1e-8, atol=1e-8)


def test_with_l2_endless_time_gives_the_ridge_solution():
    sparse, target, gram = half_pruned()
    unit = gram / gram.diagonal().mean()
    ridge = torch.linalg.solve(unit + 0.3 * torch.eye(len(unit)).double(), unit @ target.T).T
    torch.testing.assert_close(redense(sparse, target, Spectrum.of(gram), 1e6, l2=0.3), ridge, rtol=1e-9, atol=1e-9)


def test_directions_without_any_input_keep_the_pruned_weight():
    sparse, target, _ = half_pruned()
    inputs = correlated_inputs(8, sparse.shape[1]).double()  # 8 tokens, 32 inputs
    gram = inputs.T @ inputs / len(inputs)
    free = torch.eye(len(gram), dtype=torch.float64) - torch.linalg.pinv(inputs) @ inputs
    for l2 in (0.0, 0.2):
        moved = redense(sparse, target, Spectrum.of(gram), 5.0, l2=l2)
        faded = sparse * torch.exp(torch.tensor(-5.0 * l2, dtype=torch.float64))
        torch.testing.assert_close(moved @ free, faded @ free, rtol=1e-7, atol=1e-7)


@given(seed=seeds, l2=st.sampled_from([0.0, 0.1]))
@quick
def test_the_loss_falls_all_the_time(seed, l2):
    sparse, target, gram = half_pruned(seed)
    unit = gram / gram.diagonal().mean()
    spectrum = Spectrum.of(gram)

    def loss(weight: Tensor) -> float:
        error = weight - target
        return float(((error @ unit) * error).sum() / 2 + l2 / 2 * weight.square().sum())

    flow = [loss(redense(sparse, target, spectrum, time, l2=l2)) for time in (0.0, 0.1, 1.0, 10.0, 100.0)]
    assert all(later < earlier for earlier, later in pairwise(flow))
    rate = 0.99 / float(spectrum.values[-1] + l2)
    steps = [loss(redense(sparse, target, spectrum, n * rate, l2=l2, steps=n)) for n in range(1, 30)]
    assert all(later <= earlier for earlier, later in pairwise(steps))


def test_steps_that_diverge_are_refused_with_a_way_out():
    sparse, target, gram = half_pruned()
    spectrum = Spectrum.of(gram)
    least = int(10.0 * float(spectrum.values[-1]) / 2) + 1
    with pytest.raises(NumericError, match="diverge") as caught:
        redense(sparse, target, spectrum, 10.0, steps=least - 1)
    assert f"at least {least} steps" in str(caught.value.hint)
    assert torch.isfinite(redense(sparse, target, spectrum, 10.0, steps=least)).all()
    with pytest.raises(NumericError, match="diverge"):
        redense_l1(sparse, target, gram, 10.0, l1=0.1, steps=2)
    with pytest.raises(NumericError, match="diverge"):
        SDS(redense_steps=1, times=(10.0,)).prune(problem_of(NM(2, 4)))


def test_the_l1_form_takes_proximal_steps():
    sparse, target, gram = half_pruned()
    expected = descended(sparse, target, gram, 0.02, 50, l1=0.4, l2=0.1)
    taken = redense_l1(sparse, target, gram, 1.0, l1=0.4, l2=0.1, steps=50)
    torch.testing.assert_close(taken, expected, rtol=1e-10, atol=1e-10)
    assert (taken == 0).float().mean() > (redense_l1(sparse, target, gram, 1.0, l1=0.01, steps=50) == 0).float().mean()
    without = redense_l1(sparse, target, gram, 1.0, l1=0.0, steps=50)
    closed = redense(sparse, target, Spectrum.of(gram), 1.0, steps=50)
    torch.testing.assert_close(without, closed, rtol=1e-10, atol=1e-10)


def test_the_redense_weight_is_dense_with_a_peak_at_zero():
    sparse, target, gram = half_pruned()
    moved = redense(sparse, target, Spectrum.of(gram), 1.0)
    assert (moved != 0).float().mean() > 0.99
    near = 0.1 * target.std()
    assert (moved.abs() < near).float().mean() > 1.2 * (target.abs() < near).float().mean()


@each_base
@each_pattern
def test_the_result_is_better_than_the_base_pruner_and_its_exact_refit(base, pattern):
    problem = problem_of(pattern)
    first = base.prune(problem)
    refitted = refit(problem.weight, problem.gram, first.mask, start=first.weight)
    found = SDS(base=base).prune(problem)
    pattern.check(found.mask, base.scope)
    assert problem.loss(found.weight) < 0.97 * problem.loss(refitted)


@given(seed=seeds, kind=st.sampled_from(PATTERNS), exact=st.booleans(), scaled=st.booleans(), tokens=st.integers(1, 80))
@quick
def test_the_result_is_never_worse_than_the_base_pruners(seed, kind, exact, scaled, tokens):
    problem = problem_of(kind, rows=6, columns=16, seed=seed, tokens=tokens)
    first = Wanda().prune(problem)
    found = solve(SDS(base=Wanda(), exact=exact, scaled=scaled, decay=(0.0, 0.0)), problem, guard=False).pruned
    assert problem.loss(found.weight) <= problem.loss(first.weight) * (1 + 1e-6)


@each_pattern
def test_each_part_lowers_the_loss(pattern):
    problem = problem_of(pattern, rows=48, columns=64)
    loss = {
        name: problem.loss(SDS(base=Wanda(), **fields).prune(problem).weight)
        for name, fields in {
            "refit": {"times": (), "steps": 0},
            "redense": {"steps": 0},
            "all": {},
            "twice": {"rounds": 3},
        }.items()
    }
    assert loss["redense"] < loss["refit"]
    assert loss["all"] < loss["redense"]
    assert loss["twice"] <= loss["all"]


@each_pattern
def test_the_best_time_is_taken(pattern):
    problem = problem_of(pattern)
    single = [problem.loss(SDS(times=(time,), steps=0, exact=False).prune(problem).weight) for time in (0.3, 3.0, 30.0)]
    together = problem.loss(SDS(times=(0.3, 3.0, 30.0), steps=0, exact=False).prune(problem).weight)
    assert together == pytest.approx(min(single), rel=1e-6)


def test_one_decomposition_serves_all_times_and_all_linears_with_the_same_inputs(monkeypatch):
    calls = []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(matrix.shape) or real(matrix))
    problem = problem_of(NM(2, 4))
    SDS(rounds=2).prune(problem)
    SDS().prune(replace(problem, weight=random_weight(8, 32, seed=5)))
    assert len(calls) == 1


def test_an_early_exit_returns_the_second_pruning_unchanged():
    problem = problem_of(NM(2, 4))
    first = Wanda().prune(problem)
    dense = redense(first.weight, problem.weight, Spectrum.of(problem.gram), 1.0)
    second = Wanda().prune(replace(problem, weight=dense))
    found = SDS(base=Wanda(), times=(1.0,), exact=False, early_exit=True).prune(problem)
    assert torch.equal(found.weight, second.weight)
    assert torch.equal(found.mask, second.mask)
    assert problem.loss(found.weight) < problem.loss(first.weight)


def test_without_any_time_and_steps_the_base_pruners_answer_comes_back():
    problem = problem_of(Unstructured(0.7))
    first = SparseGPT().prune(problem)
    found = SDS(times=(), steps=0, exact=False).prune(problem)
    assert torch.equal(found.weight, first.weight)
    short = SDS(times=(1e-7,), steps=0, exact=False).prune(problem)  # pruned twice: the same mask
    assert (short.mask == first.mask).float().mean() > 0.999


def test_a_start_that_fits_is_the_first_pruning():
    problem = problem_of(NM(2, 4))
    start = Magnitude().prune(problem)
    plain = SDS(base=Wanda(), times=(), steps=0, exact=False)
    assert torch.equal(plain.prune(replace(problem, start=start.weight)).weight, start.weight)


@each_base
def test_any_base_lends_its_scope_needs_and_score(base):
    pruner = SDS(base=base)
    assert pruner.scope == base.scope
    assert pruner.needs == base.needs | {"gram"}
    problem = problem_of(NM(2, 4))
    assert torch.equal(pruner.score(problem), base.score(problem))


@dataclass(frozen=True)
class RowsOnly:
    """A pruner that knows one pattern, has no score, and can be told to break its promise."""

    breaks: bool = False
    needs: ClassVar[frozenset[str]] = frozenset()
    scope: ClassVar[str] = "row"

    def prune(self, problem: LayerProblem) -> Pruned:
        if isinstance(problem.pattern, NM):
            raise PatternError("groups are not supported")
        mask = problem.select(problem.weight.abs(), "row")
        return Pruned.keep(problem.weight, mask ^ self.breaks)


def test_a_base_pruner_that_does_not_know_the_pattern_is_named():
    with pytest.raises(
        PatternError, match="base pruner `RowsOnly` of SDS cannot prune to `2:4`: groups are not supported"
    ):
        SDS(base=RowsOnly()).prune(problem_of(NM(2, 4)))
    with pytest.raises(PatternError, match="base pruner `RowsOnly` of SDS cannot prune to `70%`"):
        SDS(base=RowsOnly(breaks=True)).prune(problem_of(Unstructured(0.7)))
    assert solve(SDS(base=RowsOnly()), problem_of(Unstructured(0.7))).loss_after < 1
    with pytest.raises(RecipeError, match="`RowsOnly` of SDS has no score"):
        SDS(base=RowsOnly()).score(problem_of(NM(2, 4)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base", "wanda"),
        ("times", (0.0,)),
        ("times", (-1.0,)),
        ("times", (float("inf"),)),
        ("l1", -0.1),
        ("l2", -0.1),
        ("rounds", 0),
        ("steps", -1),
        ("momentum", 1.0),
        ("decay", (-1.0, 0.5)),
        ("redense_steps", 0),
    ],
)
def test_senseless_settings_are_refused(field, value):
    with pytest.raises(ValidationError, match=field):
        SDS(**{field: value})


def test_the_gram_is_asked_for():
    with pytest.raises(InputError, match="statistic `gram`"):
        SDS(base=Magnitude()).prune(replace(problem_of(NM(2, 4)), gram=None))
    with pytest.raises(NumericError, match="NaN or infinity"):
        Spectrum.of(torch.full((3, 3), torch.nan))


@each_pattern
def test_weights_and_inputs_of_any_size_are_solved_alike(pattern):
    problem = problem_of(pattern)
    usual = SDS().prune(problem)
    for size in (1e-12, 1e12):
        scaled = LayerProblem(problem.weight * size, pattern, gram=problem.gram / size)
        found = SDS().prune(scaled)
        assert (found.mask == usual.mask).float().mean() > 0.95
        torch.testing.assert_close(
            scaled.loss(found.weight) / scaled.size(), problem.loss(usual.weight) / problem.size(), rtol=1e-2, atol=0
        )


@pytest.mark.parametrize("fields", [{}, {"l1": 0.1}, {"scaled": False}, {"rounds": 2}], ids=str)
@each_pattern
def test_degenerate_layers_are_pruned_too(pattern, fields):
    pruner = SDS(**fields)
    usual = problem_of(pattern)
    zero_gram = torch.zeros(32, 32)
    one_token = usual.gram[:1].T @ usual.gram[:1]  # rank one
    constant = torch.ones(32, 32)
    wide = torch.diag(torch.logspace(-18, 0, 32))
    for gram in (zero_gram, one_token, constant, wide):
        problem = LayerProblem(usual.weight, pattern, gram=gram, diag=gram.diagonal().clone())
        found = solve(pruner, problem).pruned
        assert problem.loss(found.weight) <= 1.001 * problem.loss(solve(SparseGPT(), problem).pruned.weight) + 1e-7
    for weight in (torch.zeros(24, 32), torch.ones(24, 32)):
        solve(pruner, replace(usual, weight=weight))


@each_pattern
def test_frozen_zeros_that_use_up_the_budget_leave_only_the_weights_to_change(pattern):
    problem = problem_of(pattern)
    kept = pattern.mask(torch.rand(24, 32, generator=torch.Generator().manual_seed(0)), "layer")
    problem = replace(problem, weight=problem.weight * kept, frozen=~kept)
    found = solve(SDS(), problem).pruned
    assert torch.equal(found.mask, kept)


def test_the_soft_mask_finds_what_a_brute_force_search_finds():
    best_everywhere = []
    for seed in range(6):
        problem = problem_of(Unstructured(0.5, "row"), rows=1, columns=10, seed=seed)
        found = problem.loss(SDS(base=Magnitude(), times=()).prune(problem).weight)
        best = min(
            problem.loss(refit(problem.weight, problem.gram, mask.reshape(1, 10), damping=1e-6))
            for mask in (torch.tensor(bits) for bits in _choices(10, 5))
        )
        best_everywhere.append(found / best)
    assert sorted(best_everywhere)[2] < 1.02  # the optimum in half of the cases
    assert max(best_everywhere) < 2


def _choices(count: int, kept: int) -> list[list[bool]]:
    return [[column in chosen for column in range(count)] for chosen in combinations(range(count), kept)]


def test_the_adjustment_is_never_worse_than_where_it_starts():
    problem = problem_of(NM(2, 4))
    start = SparseGPT().prune(problem)
    for fields in (
        {"decay": (0.0, 0.0), "momentum": 0.0},
        {"decay": (50.0, 0.0)},
        {"momentum": 0.99},
        {"decay": (0.0, 0.0)},
        {"scaled": False},
    ):
        found = adjust(problem, start, "layer", steps=25, **fields)
        assert problem.loss(found.weight) <= problem.loss(start.weight) * (1 + 1e-6)
    assert adjust(problem, start, "layer", steps=0) is start


def test_the_largest_eigenvalue_is_found():
    gram = problem_of(NM(2, 4)).gram
    exact = float(torch.linalg.eigvalsh(gram)[-1])
    assert exact <= largest_eigenvalue(gram) <= 1.02 * exact
    assert largest_eigenvalue(torch.zeros(3, 3)) == 0.0
    assert mean_diagonal(torch.diag(torch.tensor([0.0, 1.0, 3.0]))) == 2.0
