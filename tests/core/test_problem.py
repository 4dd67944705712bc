from __future__ import annotations

import pytest
import torch

from secateur.core.errors import InputError
from secateur.core.pattern import NM, Unstructured
from secateur.core.problem import LayerProblem, Pruned
from strategies import correlated_gram, correlated_inputs, random_weight


def test_the_loss_is_the_squared_output_error_per_token():
    inputs, weight = correlated_inputs(50, 8), random_weight(4, 8)
    value = weight * (weight.abs() > 0.5)
    problem = LayerProblem(weight, Unstructured(0.5), gram=inputs.T @ inputs / 50)
    expected = float((inputs @ (value - weight).T).square().sum() / 50)
    assert problem.loss(value) == pytest.approx(expected, rel=1e-4)
    assert problem.loss(weight) == 0
    assert problem.size() == pytest.approx(float((inputs @ weight.T).square().sum() / 50), rel=1e-4)


def test_the_loss_falls_back_to_what_is_known():
    weight, diag = random_weight(4, 8), torch.arange(1.0, 9.0)
    value = torch.zeros_like(weight)
    only_diag = LayerProblem(weight, Unstructured(0.5), diag=diag).loss(value)
    assert only_diag == pytest.approx(
        LayerProblem(weight, Unstructured(0.5), gram=torch.diag(diag)).loss(value), rel=1e-5
    )
    assert LayerProblem(weight, Unstructured(0.5)).loss(value) == pytest.approx(float(weight.square().sum()), rel=1e-5)


def test_frozen_entries_are_pruned_first():
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    frozen = torch.tensor([[True, False, False, False]])
    problem = LayerProblem(weight, NM(2, 4), frozen=frozen)
    assert problem.select(weight.abs(), "row")[0].tolist() == [False, True, True, False]


def test_selecting_does_not_touch_the_score():
    score = random_weight(2, 4)
    copy = score.clone()
    LayerProblem(score, NM(2, 4), frozen=torch.ones(2, 4, dtype=torch.bool)).select(score, "row")
    assert torch.equal(score, copy)


def test_problems_with_the_same_inputs_compute_once():
    calls = []
    shared: dict = {}
    for _ in range(3):
        problem = LayerProblem(torch.ones(2, 2), NM(1, 2), shared=shared)
        assert problem.once("factor", lambda: calls.append(1) or len(calls)) == 1
    assert LayerProblem(torch.ones(2, 2), NM(1, 2)).once("factor", lambda: 7) == 7


def test_a_missing_statistic_is_named():
    with pytest.raises(InputError, match="statistic `gram`"):
        LayerProblem(torch.ones(2, 2), NM(1, 2), diag=torch.ones(2)).need("gram")


def test_the_point_is_the_start_or_the_target():
    weight = torch.ones(2, 2)
    assert LayerProblem(weight, NM(1, 2)).point is weight
    start = torch.zeros(2, 2)
    assert LayerProblem(weight, NM(1, 2), start=start).point is start


def test_kept_weights_keep_their_bytes_and_pruned_ones_are_positive_zero():
    weight = torch.tensor([[-1.5, -2.0, 3.0]])
    pruned = Pruned.keep(weight, torch.tensor([[True, False, True]]))
    assert torch.equal(pruned.weight, torch.tensor([[-1.5, 0.0, 3.0]]))
    assert not torch.signbit(pruned.weight[0, 1])


def test_losses_of_large_errors_stay_finite_and_small_ones_positive():
    gram = correlated_gram(16)
    problem = LayerProblem(random_weight(4, 16), Unstructured(0.5), gram=gram)
    assert problem.loss(problem.weight + 1e-8) >= 0
    assert problem.loss(problem.weight + 1e12) > 1e20
