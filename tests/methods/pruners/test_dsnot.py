from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import dsnot as published
from torch import Tensor

from secateur.core.errors import InputError, RecipeError
from secateur.core.pattern import NM, Unstructured
from secateur.core.problem import LayerProblem
from secateur.core.solve import solve
from secateur.methods.pruners.dsnot import DSnoT, first_of_rows, refine, row_losses
from secateur.methods.pruners.magnitude import Magnitude
from secateur.methods.pruners.sparsegpt import SparseGPT
from secateur.methods.pruners.wanda import Wanda, wanda_score
from strategies import correlated_inputs, random_weight, seeds

quick = settings(max_examples=30, deadline=None)


def problem_of(pattern, rows: int = 24, columns: int = 32, seed: int = 0, offset: float = 1.0, **given) -> LayerProblem:
    inputs = correlated_inputs(4 * columns, columns, seed=seed, offset=offset)
    gram = inputs.T @ inputs / len(inputs)
    return LayerProblem(
        random_weight(rows, columns, seed),
        pattern,
        gram=gram,
        diag=gram.diagonal().clone(),
        mean=inputs.mean(0),
        **given,
    )


def expected_error(problem: LayerProblem, weight: Tensor) -> Tensor:
    return (problem.weight - weight).double() @ problem.mean.double()


ONE_ROW = {"dense": torch.ones(1, 4), "variance": torch.ones(4), "score": torch.ones(1, 4), "threshold": 0.1}
KEEPS_FIRST_TWO = torch.tensor([[True, True, False, False]])


def by_hand(mean: list[float], **given) -> list[bool]:
    sparse = ONE_ROW["dense"] * KEEPS_FIRST_TWO
    return refine(sparse=sparse, mask=KEEPS_FIRST_TWO, mean=torch.tensor(mean), **{**ONE_ROW, **given})[0].tolist()


def test_a_row_without_a_partner_to_prune_stops_cleanly():
    assert by_hand([1.0, 2.0, 3.0, -1.0]) == [True, True, False, False]


def test_a_swap_that_turns_the_sign_needs_permission():
    assert by_hand([-1.0, 2.0, 3.0, -1.0], cycles=1) == [False, True, True, False]
    assert by_hand([-1.0, 2.0, 3.0, -1.0], cycles=2) == [False, False, True, True]  # and back from the other end
    assert by_hand([-1.0, 2.0, 3.0, -1.0], same_sign=True) == [True, True, False, False]


def test_an_error_within_the_threshold_is_left_alone():
    assert by_hand([-1.0, 2.0, 3.0, -1.0], threshold=2.0) == [True, True, False, False]
    assert by_hand([-1.0, 2.0, 3.0, -1.0], threshold=1.0, relative=True) == [True, True, False, False]


def test_frozen_entries_do_not_grow():
    assert by_hand([-1.0, 2.0, 3.0, -1.0], frozen=torch.tensor([[False, False, True, False]]))[2] is False


@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 4),
    m=st.sampled_from([0, 4]),
    cycles=st.sampled_from([0, 1, 3, 50]),
    power=st.sampled_from([0.0, 1.0, 2.0]),
    same_sign=st.booleans(),
    seed=seeds,
)
@quick
def test_all_rows_at_once_equal_a_plain_loop(rows, groups, m, cycles, power, same_sign, seed):
    problem = problem_of(NM(2, 4), rows, 4 * groups, seed)
    weight = problem.weight.clone()
    weight[:, 0] = 0.0
    score = wanda_score(weight, problem.diag.sqrt())
    mask = (NM(2, 4) if m else Unstructured(0.5, "layer")).mask(score)
    variance = (problem.diag - problem.mean.square()).clamp_min(1e-6)
    given_ = {"cycles": cycles, "threshold": 0.01, "same_sign": same_sign}
    ours = refine(
        weight, weight * mask, mask, problem.mean, variance, score, variance_power=power, group=m or None, **given_
    )
    assert torch.equal(ours, published.refine(weight, mask, problem.mean, variance, score, power=power, m=m, **given_))


@given(
    pattern=st.sampled_from([NM(2, 4), NM(1, 8), Unstructured(0.5, "row"), Unstructured(0.7, "layer")]),
    columns=st.sampled_from([8, 32]),
    sign=st.sampled_from([0, 1, -1]),
    seed=seeds,
)
@quick
def test_every_row_and_group_keeps_its_count(pattern, columns, sign, seed):
    problem = problem_of(pattern, 8, columns, seed)
    if sign:  # all contributions of one sign
        problem = replace(problem, weight=sign * problem.weight.abs(), mean=problem.mean.abs())
    first, refined = Wanda().prune(problem), DSnoT(guard=False, cycles=200).prune(problem)
    assert torch.equal(first.mask.sum(1), refined.mask.sum(1))
    pattern.check(refined.mask, "row")


def test_the_expected_error_shrinks_when_its_sign_must_stay():
    problem = problem_of(Unstructured(0.6), 64)
    before = expected_error(problem, Wanda().prune(problem).weight).abs()
    after = expected_error(problem, DSnoT(guard=False, without_same_sign=False).prune(problem).weight).abs()
    assert (after <= before + 1e-6).all()
    assert after.sum() < 0.7 * before.sum()


def test_inputs_without_a_mean_leave_the_mask_alone():
    problem = replace(problem_of(Unstructured(0.5)), mean=torch.zeros(32))
    assert torch.equal(DSnoT(threshold=0).prune(problem).mask, Wanda().prune(problem).mask)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6), Unstructured(0.7, "layer")], ids=str)
@pytest.mark.parametrize("base", [Wanda(), Magnitude(), SparseGPT()], ids=repr)
def test_with_the_guard_no_row_gets_worse(base, pattern):
    problem = problem_of(pattern, 300, offset=2.0)
    first, refined = base.prune(problem), DSnoT(base=base, cycles=1).prune(problem)
    old = row_losses(first.weight - problem.weight, problem.gram)
    new = row_losses(refined.weight - problem.weight, problem.gram)
    changed = (first.mask != refined.mask).any(1)
    assert changed.any() or isinstance(base, SparseGPT)  # after a sweep hardly any swap pays
    assert (new[changed] < old[changed]).all()
    assert torch.equal(refined.weight[~changed], first.weight[~changed])


def test_without_the_guard_rows_may_get_worse_and_no_gram_is_needed():
    problem = problem_of(Unstructured(0.5), 64)
    solver = DSnoT(guard=False)
    assert solver.needs == {"diag", "mean"}
    refined = solver.prune(replace(problem, gram=None))
    old = row_losses(Wanda().prune(problem).weight - problem.weight, problem.gram)
    assert (row_losses(refined.weight - problem.weight, problem.gram) > old).any()


def test_kept_weights_stay_and_grown_ones_come_back_from_the_target():
    problem = problem_of(Unstructured(0.6), 48)
    first, refined = SparseGPT().prune(problem), DSnoT(base=SparseGPT(), guard=False).prune(problem)
    stayed, grown = first.mask & refined.mask, refined.mask & ~first.mask
    assert grown.any()
    assert torch.equal(refined.weight[stayed], first.weight[stayed])
    assert torch.equal(refined.weight[grown], problem.weight[grown])


def test_the_error_counts_what_a_compensating_base_changed():
    problem = problem_of(Unstructured(0.5, "row"))
    swept = SparseGPT().prune(problem).weight
    shifted = replace(problem, start=swept + (swept != 0) * 0.3)  # a point whose expected error is large
    refined = DSnoT(guard=False, without_same_sign=False).prune(shifted)
    before, after = expected_error(problem, shifted.start).abs(), expected_error(problem, refined.weight).abs()
    assert (after <= before + 1e-6).all()
    assert after.sum() < 0.7 * before.sum()


def test_a_start_replaces_the_base():
    problem = problem_of(NM(2, 4))
    start = Magnitude().prune(problem).weight
    assert torch.equal(DSnoT().prune(replace(problem, start=start)).mask, DSnoT(base=Magnitude()).prune(problem).mask)


def test_a_start_that_does_not_fit_the_pattern_is_refused():
    problem = problem_of(NM(2, 4))
    with pytest.raises(InputError, match="zeros of `start`"):
        DSnoT().prune(replace(problem, start=problem.weight))


def test_a_relative_threshold_does_not_know_the_scale_of_activations():
    problem = problem_of(Unstructured(0.5))
    louder = replace(problem, mean=8 * problem.mean, diag=64 * problem.diag, gram=64 * problem.gram)
    relative = DSnoT(relative=True)
    assert torch.equal(relative.prune(problem).mask, relative.prune(louder).mask)
    absolute = DSnoT(threshold=2000.0, guard=False)
    assert not torch.equal(absolute.prune(problem).mask, absolute.prune(louder).mask)


def test_the_absolute_threshold_is_for_sums_over_a_sequence():
    problem = problem_of(Unstructured(0.5))
    one, other = DSnoT(threshold=100.0, length=2048), DSnoT(threshold=25.0, length=512)
    assert torch.equal(one.prune(problem).mask, other.prune(problem).mask)


def test_a_constant_input_and_a_dead_one_stay_finite():
    problem = problem_of(Unstructured(0.5))
    problem.mean[0] = problem.diag[0].sqrt()  # no variance
    problem.gram[1], problem.gram[:, 1], problem.diag[1], problem.mean[1] = 0.0, 0.0, 0.0, 0.0
    for power in (0.0, 1.0, 4.0):
        solved = solve(DSnoT(variance_power=power), problem)
        assert torch.isfinite(solved.pruned.weight).all()


def test_candidates_come_in_order_with_the_lower_column_first():
    key = torch.tensor([[3.0, 1.0, 3.0, 2.0, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    valid = torch.tensor([[True, True, True, True, False], [False, True, False, False, False]])
    columns, available = first_of_rows(key, valid, 3)
    assert columns[0].tolist() == [0, 2, 3]
    assert columns[1, 0] == 1
    assert available.tolist() == [3, 1]


def test_the_score_is_the_base_pruners():
    problem = problem_of(NM(2, 4))
    assert torch.equal(DSnoT(base=Magnitude()).score(problem), problem.weight.abs())

    class Scoreless:
        needs, scope = frozenset(), "row"
        prune = Magnitude.prune

    with pytest.raises(RecipeError, match="`Scoreless` of DSnoT has no score"):
        DSnoT(base=Scoreless()).score(problem)


def test_needs_and_scope_follow_the_base():
    assert DSnoT(base=SparseGPT(), guard=False).needs == {"gram", "diag", "mean"}
    assert (DSnoT().scope, DSnoT(base=SparseGPT()).scope) == ("row", "layer")


@pytest.mark.parametrize(
    "field",
    [
        {"cycles": -1},
        {"threshold": -1.0},
        {"variance_power": float("nan")},
        {"length": 0},
        {"base": "wanda"},
        {"base": None},
    ],
)
def test_hyper_parameters_out_of_range_are_refused(field):
    with pytest.raises(ValidationError, match=next(iter(field))):
        DSnoT(**field)
