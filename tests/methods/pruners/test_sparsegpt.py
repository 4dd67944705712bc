from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import sparsegpt as published
from torch import Tensor

from secateur.core.linalg import damped, quadratic_loss, refit_exact
from secateur.core.pattern import NM, Unstructured, pruned_count
from secateur.core.problem import LayerProblem
from secateur.methods.pruners import sparsegpt
from secateur.methods.pruners.magnitude import Magnitude
from secateur.methods.pruners.sparsegpt import SparseGPT, slab_keeps, sweep_
from strategies import correlated_gram, correlated_inputs, grams, random_weight, seeds

quick = settings(max_examples=25, deadline=None)


def problem_of(pattern, rows: int = 24, columns: int = 64, **given) -> LayerProblem:
    return LayerProblem(random_weight(rows, columns), pattern, gram=correlated_gram(columns), **given)


def in_double(problem: LayerProblem) -> LayerProblem:
    return replace(problem, weight=problem.weight.double(), gram=problem.gram.double())


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(4, 8), NM(1, 8)], ids=str)
@pytest.mark.parametrize("decay", [0.5, 1.5])
def test_masks_and_losses_are_those_of_the_published_sweep(pattern, decay):
    weight, gram = random_weight(96, 320, seed=1), correlated_gram(320, decay)
    problem = LayerProblem(weight, pattern, gram=gram)
    ours = SparseGPT().prune(problem)
    if isinstance(pattern, NM):
        theirs = published.prune(weight, gram, n=pattern.n, m=pattern.m)
    else:
        theirs = published.prune(weight, gram, sparsity=pattern.sparsity)
    assert ((theirs != 0) == ours.mask).float().mean() >= 0.999
    assert problem.loss(ours.weight) == pytest.approx(problem.loss(theirs), rel=1e-3)


def test_in_float64_the_published_sweep_is_followed_to_the_last_entry():
    problem = in_double(problem_of(NM(2, 4), 32, 160))
    ours = SparseGPT().prune(problem)
    theirs = published.prune(problem.weight, problem.gram, n=2, m=4)
    assert torch.equal(ours.mask, theirs != 0)
    torch.testing.assert_close(ours.weight, theirs, rtol=1e-9, atol=1e-9)


def test_two_weights_by_hand():
    gram = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    problem = LayerProblem(torch.tensor([[3.0, 5.0]]), Unstructured(0.5), gram=gram)
    pruned = SparseGPT(damping=0).compensate(problem, torch.tensor([[False, True]]))
    torch.testing.assert_close(pruned.weight, torch.tensor([[0.0, 5 + 3 * 1 / 4]]))


def test_the_first_column_alone_is_the_classical_surgeon():
    problem = in_double(problem_of(NM(1, 2)))
    mask = torch.ones(24, 64, dtype=torch.bool)
    mask[:, 0] = False
    inverse = torch.linalg.inv(problem.gram)
    expected = problem.weight - problem.weight[:, :1] * inverse[0] / inverse[0, 0]
    expected[:, 0] = 0.0
    torch.testing.assert_close(SparseGPT(damping=0).compensate(problem, mask).weight, expected)


@given(columns=st.integers(2, 24), prefix=st.integers(1, 23), seed=seeds)
@quick
def test_a_pruned_prefix_is_compensated_exactly(columns, prefix, seed):
    gram = correlated_gram(columns, decay=0.5, seed=seed).double()
    weight = random_weight(3, columns, seed).double()
    mask = torch.arange(columns).expand(3, columns) >= prefix
    problem = LayerProblem(weight, Unstructured(0.5), gram=gram)
    exact = refit_exact(weight, gram, mask, damping=0.01)
    torch.testing.assert_close(SparseGPT().compensate(problem, mask).weight, exact, rtol=1e-7, atol=1e-8)


@given(data=st.data(), rows=st.integers(1, 5), columns=st.integers(1, 40), seed=seeds)
@quick
def test_what_is_lost_accounts_for_the_whole_loss(data, rows, columns, seed):
    gram, weight = data.draw(grams(columns)).double(), random_weight(rows, columns, seed).double()
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    problem = LayerProblem(weight, Unstructured(0.5), gram=gram)
    solver = SparseGPT(block_size=16)
    error = weight - solver.compensate(problem, mask).weight
    pivot, factor = solver._factor(problem)
    lost = torch.linalg.solve_triangular(factor, error, upper=True, left=False)
    torch.testing.assert_close(lost * mask, torch.zeros_like(lost), rtol=0, atol=1e-7)
    expected = (lost / pivot).square().sum()
    torch.testing.assert_close(quadratic_loss(error, damped(gram, 0.01)), expected, rtol=1e-6, atol=1e-9)


@given(block_size=st.integers(1, 60), group=st.sampled_from([1, 2, 4, 5, 20]), seed=seeds)
@quick
def test_blocking_does_not_change_the_result(block_size, group, seed):
    gram, weight = correlated_gram(40, seed=seed).double(), random_weight(4, 40, seed).double()
    kept = (torch.rand(4, 40, generator=torch.Generator().manual_seed(seed)) < 0.5).T
    problem = LayerProblem(weight, Unstructured(0.5), gram=gram)
    _, factor = SparseGPT()._factor(problem)
    columns = weight.T.contiguous()
    mask = sweep_(columns, factor, lambda values, start, stop: kept[start:stop], block_size, group)
    assert torch.equal(mask, kept)
    expected = SparseGPT().compensate(problem, kept.T).weight
    torch.testing.assert_close(columns.T, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5, "row"), Unstructured(0.5, "layer")], ids=str)
def test_uncorrelated_inputs_need_no_compensation(pattern):
    weight = random_weight(8, 32)
    diag = torch.rand(32, generator=torch.Generator().manual_seed(0)) + 0.1
    pruned = SparseGPT(damping=0).prune(LayerProblem(weight, pattern, gram=torch.diag(diag)))
    torch.testing.assert_close(pruned.weight[pruned.mask], weight[pruned.mask])


def test_white_inputs_give_magnitude_masks():
    problem = LayerProblem(random_weight(8, 32), NM(2, 4), gram=3 * torch.eye(32))
    assert torch.equal(SparseGPT().prune(problem).mask, Magnitude().prune(problem).mask)


def test_compensation_pays_for_any_mask_in_total():
    problem = problem_of(NM(2, 4), 64)
    mask = Magnitude().prune(problem).mask
    plain, swept = problem.loss(problem.weight * mask), problem.loss(SparseGPT().compensate(problem, mask).weight)
    exact = problem.loss(refit_exact(problem.weight, problem.gram, mask, damping=0.0))
    assert exact < swept < 0.8 * plain


def test_groups_wider_than_the_inner_block_and_no_divisor_of_the_slab_are_never_split():
    for pattern in (NM(12, 48), NM(20, 40), NM(5, 24)):
        pruned = SparseGPT().prune(problem_of(pattern, 6, 240))
        pattern.check(pruned.mask)


@pytest.mark.parametrize("scope", ["row", "layer"])
@pytest.mark.parametrize("some_frozen", [False, True])
@given(rows=st.integers(1, 6), columns=st.integers(1, 50), width=st.integers(1, 60), percent=st.integers(0, 100))
@quick
def test_slabs_share_the_budget_exactly(some_frozen, scope, rows, columns, width, percent):
    frozen = torch.rand(rows, columns, generator=torch.Generator().manual_seed(percent)) < 0.3 if some_frozen else None
    pattern = Unstructured(percent / 100, scope)
    problem = LayerProblem(torch.ones(rows, columns), pattern, gram=torch.eye(columns), frozen=frozen)
    unit = 1 if scope == "row" else rows
    sizes = torch.tensor([unit * min(width, columns - start) for start in range(0, columns, width)])[:, None]
    keeps = torch.stack([torch.as_tensor(keep).reshape(-1) for keep in slab_keeps(problem, scope, width)])
    assert (keeps.sum(0) == unit * columns - pruned_count(percent / 100, unit * columns)).all()
    assert (keeps >= 0).all()
    assert (keeps <= sizes).all()


def test_frozen_zeros_in_one_slab_spare_the_others():
    frozen = torch.zeros(4, 256, dtype=torch.bool)
    frozen[:, :128] = True
    problem = LayerProblem(torch.ones(4, 256), Unstructured(0.5), gram=torch.eye(256), frozen=frozen)
    assert slab_keeps(problem, "layer", 128) == [0, 512]


def test_dead_inputs_leave_zero_columns_and_count_as_pruned():
    problem = problem_of(Unstructured(0.5), 16, 64)
    for dead in (0, 1, 2, 40):
        problem.gram[dead], problem.gram[:, dead] = 0.0, 0.0
    pruned = SparseGPT(block_size=8).prune(problem)
    assert not pruned.weight[:, [0, 1, 2, 40]].any()
    assert not pruned.mask[:, [0, 1, 2, 40]].any()
    problem.pattern.check(pruned.mask, "layer")


def test_a_row_budget_is_met_in_every_row():
    pruned = SparseGPT(block_size=20).prune(problem_of(Unstructured(0.55, "row")))
    assert (pruned.mask.sum(1) == 64 - 35).all()


def test_linears_with_the_same_inputs_factor_once(monkeypatch):
    calls = []
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: calls.append(1) or original(matrix))
    first = problem_of(NM(2, 4))
    for seed in range(3):
        SparseGPT().prune(replace(first, weight=random_weight(8, 64, seed)))
    assert calls == [1]
    SparseGPT(damping=0.1).prune(first)
    assert calls == [1, 1]


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6), Unstructured(0.6, "row")], ids=str)
def test_other_devices_sweep_alike(monkeypatch, pattern):
    problem = in_double(problem_of(pattern, 12, 80))
    expected = SparseGPT(block_size=32).prune(problem)
    monkeypatch.setattr(sparsegpt, "_plain", lambda tensor: tensor)
    result = SparseGPT(block_size=32).prune(problem)
    assert torch.equal(result.mask, expected.mask)
    torch.testing.assert_close(result.weight, expected.weight)


def test_a_singular_gram_is_no_obstacle():
    inputs = correlated_inputs(8, 64)
    problem = LayerProblem(random_weight(6, 64), NM(2, 4), gram=inputs.T @ inputs / 8)
    pruned = SparseGPT(damping=0).prune(problem)
    assert torch.isfinite(pruned.weight).all()


def test_the_score_is_the_loss_of_removing_one_weight():
    problem = in_double(problem_of(NM(2, 4), 3, 12))
    score = SparseGPT(damping=0).score(problem)
    for row, column in ((0, 0), (1, 5), (2, 11)):
        mask = torch.ones(3, 12, dtype=torch.bool)
        mask[row, column] = False
        exact = problem.loss(refit_exact(problem.weight, problem.gram, mask, damping=0.0))
        assert float(score[row, column]) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("field", [{"damping": -0.1}, {"damping": float("inf")}, {"block_size": 0}])
def test_hyper_parameters_out_of_range_are_refused(field):
    with pytest.raises(ValidationError, match=next(iter(field))):
        SparseGPT(**field)


def test_more_damping_moves_weights_less():
    problem = problem_of(NM(2, 4))

    def moved(damping: float) -> Tensor:
        pruned = SparseGPT(damping=damping).compensate(problem, Magnitude().prune(problem).mask)
        return (pruned.weight - problem.weight * pruned.mask).norm()

    assert moved(1e-3) > moved(0.1) > moved(100.0)
    assert moved(100.0) < 0.05 * problem.weight.norm()
