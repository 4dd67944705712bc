from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from secateur.core.errors import InputError, NumericError, PatternError
from secateur.core.pattern import NM, Unstructured
from secateur.core.problem import LayerProblem, Pruned
from secateur.core.solve import solve
from secateur.methods.pruners.magnitude import Magnitude
from secateur.methods.pruners.sparsegpt import SparseGPT
from secateur.methods.pruners.wanda import Wanda
from strategies import correlated_gram, random_weight


@dataclass
class Fixed:
    """A pruner that answers what it was told."""

    weight: Tensor
    mask: Tensor

    needs: ClassVar[frozenset[str]] = frozenset()
    scope: ClassVar[str] = "row"

    def prune(self, problem: LayerProblem) -> Pruned:
        return Pruned(self.weight, self.mask)


def realistic(pattern=NM(2, 4), rows: int = 48, columns: int = 64, **given) -> LayerProblem:  # noqa: B008
    gram = correlated_gram(columns)
    return LayerProblem(random_weight(rows, columns), pattern, gram=gram, diag=gram.diagonal().clone(), **given)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5), Unstructured(0.7)])
def test_better_solvers_lose_less_on_realistic_inputs(pattern):
    problem = realistic(pattern)
    refitted = solve(SparseGPT(), problem, refit=True).loss_after
    losses = [refitted, *(solve(pruner, problem).loss_after for pruner in (SparseGPT(), Wanda(), Magnitude()))]
    assert losses == sorted(losses)
    assert losses[0] < 0.8 * losses[1] < 0.8 * losses[2]


def test_losses_are_fractions_of_the_empty_layer():
    problem = realistic()
    solved = solve(Magnitude(), problem)
    assert solved.loss_before == solved.loss_after == problem.loss(solved.pruned.weight) / problem.size()
    assert solve(Magnitude(), realistic(Unstructured(1.0))).loss_after == 1.0
    assert solve(Magnitude(), realistic(Unstructured(0.0))).loss_after == 0.0


def test_every_pruner_may_be_refitted():
    problem = realistic()
    plain, refitted = solve(Magnitude(), problem), solve(Magnitude(), problem, refit=True)
    assert torch.equal(plain.pruned.mask, refitted.pruned.mask)
    assert refitted.loss_after < 0.7 * plain.loss_after
    assert refitted.loss_before == plain.loss_before


def test_a_weight_update_that_hurts_is_dropped_and_noted():
    problem = realistic()
    mask = problem.pattern.mask(problem.weight.abs())
    worse = Fixed(problem.weight * mask * 3, mask)
    solved = solve(worse, problem)
    assert torch.equal(solved.pruned.weight, problem.weight * mask)
    assert solved.notes == ("the weight update was worse than none and was dropped",)
    unguarded = solve(worse, problem, guard=False)
    assert torch.equal(unguarded.pruned.weight, worse.weight)
    assert unguarded.loss_after > unguarded.loss_before


def test_without_update_the_dense_weights_are_what_the_guard_compares_with():
    dense = random_weight(8, 16, seed=5)
    problem = LayerProblem(10 * dense, NM(2, 4), gram=correlated_gram(16), dense=dense)
    solved = solve(Magnitude(), problem)
    assert solved.loss_after < solved.loss_before
    assert torch.equal(solved.pruned.weight, problem.weight * solved.pruned.mask)


def test_dead_inputs_are_counted_in_the_notes():
    problem = realistic()
    problem.gram[3], problem.gram[:, 3], problem.diag[3] = 0.0, 0.0, 0.0
    assert solve(Wanda(), problem).notes == ("1 of 64 inputs are never active",)
    assert solve(SparseGPT(), LayerProblem(problem.weight, problem.pattern, gram=problem.gram)).notes == (
        "1 of 64 inputs are never active",
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.full((2, 4), torch.nan)}, NumericError, "8 values of the weight of `up`"),
        ({"gram": torch.full((4, 4), torch.inf)}, NumericError, "16 values of the gram of `up`"),
        ({"mean": torch.tensor([0.0, torch.nan, 0, 0])}, NumericError, "1 values of the mean of `up`"),
        ({"gram": torch.eye(3)}, InputError, r"gram of `up` must have shape \(4, 4\), got \(3, 3\)"),
        ({"diag": torch.ones(5)}, InputError, "diag of `up` must have shape"),
        ({"pattern": NM(1, 3)}, PatternError, "divisible by 3, `up` has 4"),
    ],
)
def test_problems_that_make_no_sense_are_refused_by_name(change, error, message):
    problem = LayerProblem(**{"weight": torch.ones(2, 4), "pattern": NM(2, 4), **change})
    with pytest.raises(error, match=message):
        solve(Magnitude(), problem, name="up")


MASK = torch.tensor([[True, True, False, False]])


@pytest.mark.parametrize(
    ("answer", "frozen", "error", "message"),
    [
        (Fixed(torch.ones(1, 4), MASK), None, PatternError, "outside its own mask"),
        (Fixed(torch.ones(1, 4), ~torch.zeros_like(MASK)), None, PatternError, "exactly 2 of 4"),
        (Fixed(torch.tensor([[torch.nan, 0, 0, 0]]), MASK), None, NumericError, "NaN or infinity"),
        (Fixed(torch.zeros(1, 4), MASK), ~MASK.flip(1), PatternError, "brought back frozen zeros"),
    ],
)
def test_answers_that_break_a_promise_are_refused(answer, frozen, error, message):
    with pytest.raises(error, match=message):
        solve(answer, LayerProblem(torch.ones(1, 4), NM(2, 4), frozen=frozen))


@pytest.mark.parametrize(
    ("pattern", "frozen", "message"),
    [
        (
            Unstructured(0.25, "layer"),
            [[1, 1, 0, 0], [1, 0, 0, 0]],
            "already has a sparsity of 0.3750, above the target",
        ),
        (NM(3, 4), [[1, 1, 0, 0], [0, 0, 0, 0]], "1 groups of `up` already hold more than the 1 zeros"),
        (Unstructured(0.25, "row"), [[1, 1, 0, 0], [0, 0, 0, 0]], "1 rows of `up` already hold more than the 1 zeros"),
    ],
)
def test_frozen_zeros_that_do_not_fit_are_refused(pattern, frozen, message):
    problem = LayerProblem(torch.ones(2, 4), pattern, frozen=torch.tensor(frozen, dtype=torch.bool))
    with pytest.raises(InputError, match=message):
        solve(Magnitude(), problem, name="up")


def test_a_refit_needs_the_gram():
    with pytest.raises(InputError, match="statistic `gram`"):
        solve(Magnitude(), LayerProblem(torch.ones(2, 4), NM(2, 4)), refit=True)
