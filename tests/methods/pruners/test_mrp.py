from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import mrp as published

from secateur.core.errors import PatternError
from secateur.core.linalg import damped, refit, refit_exact
from secateur.core.pattern import NM, Pattern, Unstructured
from secateur.core.problem import LayerProblem
from secateur.core.solve import solve
from secateur.methods.pruners import mrp
from secateur.methods.pruners.magnitude import Magnitude
from secateur.methods.pruners.mrp import (
    MRP,
    group_losses,
    joint_losses,
    own_parts,
    removed_sets,
    single_compensation,
)
from secateur.methods.pruners.sparsegpt import SparseGPT
from strategies import correlated_gram, correlated_inputs, patterns, random_weight, seeds

quick = settings(max_examples=25, deadline=None)
VARIANTS = ("SS", "SM", "MS", "MM")


def problem_of(pattern: Pattern, rows: int = 24, columns: int = 64, seed: int = 0, **given) -> LayerProblem:
    return LayerProblem(random_weight(rows, columns, seed), pattern, gram=correlated_gram(columns, seed=seed), **given)


def in_double(problem: LayerProblem) -> LayerProblem:
    return replace(problem, weight=problem.weight.double(), gram=problem.gram.double())


def optimum(problem: LayerProblem, row: int, keep: int) -> float:
    """The least loss of one row over all masks that keep `keep` entries, weights exact."""
    masks = removed_sets(problem.weight.shape[1] - keep, problem.weight.shape[1])  # the sets of `keep` entries
    many = problem.weight[row].expand(len(masks), -1)
    error = refit_exact(many, problem.gram, masks, damping=0.0) - many
    return float(((error @ problem.gram) * error).sum(1).min())


def in_damped_metric(problem: LayerProblem, damping: float = 0.01) -> LayerProblem:
    return replace(problem, gram=damped(problem.gram, damping))


@given(columns=st.integers(2, 14), rows=st.integers(1, 4), seed=seeds)
@quick
def test_the_closed_form_is_least_squares_on_what_is_kept(columns, rows, seed):
    problem = in_double(problem_of(Unstructured(0.5), rows, columns, seed))
    kept = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    ours = MRP(damping=0.01).compensate(problem, kept).weight
    inverse = torch.linalg.inv(damped(problem.gram, 0.01))
    for row, mask in enumerate(kept):
        lost = (~mask).nonzero()[:, 0]
        formula = problem.weight[row] - problem.weight[row, lost] @ torch.linalg.solve(
            inverse[lost][:, lost], inverse[lost]
        )
        assert not ours[row, lost].any()
        torch.testing.assert_close(ours[row], formula, rtol=1e-5, atol=1e-7)
    residual = ((problem.weight - ours) @ damped(problem.gram, 0.01))[kept]
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-6)


@given(columns=st.integers(2, 10), seed=seeds, data=st.data())
@quick
def test_the_joint_loss_is_the_loss_of_the_compensated_row(columns, seed, data):
    problem = in_damped_metric(in_double(problem_of(Unstructured(0.5), 1, columns, seed)))
    lost = torch.tensor(sorted(data.draw(st.sets(st.integers(0, columns - 1), min_size=1))))
    row, inverse = problem.weight[0], torch.linalg.inv(problem.gram)
    moved = published.compensate(row, lost, inverse)
    expected = float(published.set_loss(row, lost, inverse))
    assert problem.loss(moved[None]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_weights_may_be_removed_one_after_the_other_in_any_order():
    problem = in_double(problem_of(Unstructured(0.5), 1, 8))
    inverse = torch.linalg.inv(damped(problem.gram, 0.01))
    mask = torch.tensor([[True, False, True, True, False, True, False, True]])
    together = MRP().compensate(problem, mask).weight[0]
    for order in ((1, 4, 6), (6, 1, 4)):
        row, left = problem.weight[0], inverse
        for index in order:
            row = row - row[index] / left[index, index] * left[index]
            left = left - torch.outer(left[:, index], left[index]) / left[index, index]
        torch.testing.assert_close(row, together, rtol=1e-6, atol=1e-8)


def test_one_removal_is_the_classical_surgeon_and_both_solutions_agree():
    problem = in_double(problem_of(Unstructured(0.5), 3, 12))
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[:, 5] = False
    inverse = torch.linalg.inv(damped(problem.gram, 0.01))
    expected = problem.weight - problem.weight[:, 5:6] * inverse[5] / inverse[5, 5]
    expected[:, 5] = 0.0
    for variant in ("SS", "SM"):
        torch.testing.assert_close(
            MRP(variant=variant).compensate(problem, mask).weight, expected, rtol=1e-6, atol=1e-8
        )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 8)], ids=str)
@pytest.mark.parametrize("rounds", [1, 16])
def test_groups_are_met_exactly_by_every_variant(variant, pattern, rounds):
    pruned = MRP(variant=variant, rounds=rounds).prune(problem_of(pattern))
    pattern.check(pruned.mask)
    assert not pruned.weight[~pruned.mask].any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("block_size", [None, 4, 12, 64, 100])
def test_one_block_of_all_columns_or_many_meet_the_pattern(variant, block_size):
    pattern = NM(2, 4) if variant[0] == "M" else Unstructured(0.55)
    for each in (pattern, NM(4, 8)):
        each.check(MRP(variant=variant, block_size=block_size).prune(problem_of(each)).mask, "layer")


@given(data=st.data(), rows=st.integers(1, 5), columns=st.integers(1, 24), rounds=st.integers(1, 20), seed=seeds)
@quick
def test_budgets_are_met_whatever_the_rounds(data, rows, columns, rounds, seed):
    pattern = data.draw(patterns(columns))
    block_size = data.draw(st.sampled_from([None, 1, 5, 32]))
    variant = data.draw(st.sampled_from(["SS", "SM"]))
    problem = problem_of(pattern, rows, columns, seed)
    solved = solve(MRP(variant=variant, rounds=rounds, block_size=block_size), problem)
    pattern.check(solved.pruned.mask, "layer")
    assert solved.loss_after <= solved.loss_before * (1 + 1e-5)


@pytest.mark.parametrize(
    ("pattern", "variant"),
    [(Unstructured(0.5), "SM"), (Unstructured(0.7), "SS"), (NM(2, 4), "SM"), (NM(2, 4), "MM"), (NM(4, 8), "MS")],
    ids=str,
)
def test_one_shot_is_the_plain_reading_of_the_formulas(pattern, variant):
    problem = in_double(problem_of(pattern, 12, 32))
    ours = MRP(variant=variant, rounds=1, foresight=False).prune(problem)
    given = {"n": pattern.n, "m": pattern.m} if isinstance(pattern, NM) else {"sparsity": pattern.sparsity}
    theirs = published.prune(problem.weight, problem.gram, variant=variant, **given)
    assert torch.equal(ours.mask, theirs != 0)
    torch.testing.assert_close(ours.weight, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4)], ids=str)
def test_repeated_inputs_do_not_both_look_free(pattern):
    columns = 64
    inputs = correlated_inputs(4 * columns, columns, 1.0)
    inputs[:, : columns // 4] = inputs[:, columns // 4 : columns // 2]
    problem = replace(problem_of(pattern, 32, columns), gram=inputs.T @ inputs / len(inputs))
    budget = {"n": 2, "m": 4} if isinstance(pattern, NM) else {"sparsity": pattern.sparsity}
    ours, theirs = MRP().prune(problem).weight, published.prune(problem.weight, problem.gram, **budget)
    assert problem.loss(ours) < 0.9 * problem.loss(theirs)
    assert problem.loss(ours) < 0.95 * problem.loss(MRP(foresight=False).prune(problem).weight)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_foresight_is_what_random_parts_of_a_row_leave_over(decay, share):
    columns = 96
    gram = correlated_gram(columns, decay)
    scale = gram.diagonal().sqrt()
    unit = gram / scale / scale[:, None]
    parts, generator = torch.zeros(columns), torch.Generator().manual_seed(0)
    counts = torch.zeros(columns)
    for _ in range(300):
        kept = torch.randperm(columns, generator=generator)[: round(share * columns)]
        parts[kept] += 1.0 / torch.linalg.inv(unit[kept][:, kept]).diagonal()
        counts[kept] += 1
    expected = parts / counts
    torch.testing.assert_close(own_parts(unit, share).mean(), expected.mean(), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4)], ids=str)
def test_scoring_with_one_inverse_costs_little_against_one_for_each_row(pattern):
    problem = problem_of(pattern, 48, 128)
    given = {"n": pattern.n, "m": pattern.m} if isinstance(pattern, NM) else {"sparsity": pattern.sparsity}
    theirs = problem.loss(published.prune(problem.weight, problem.gram, block_size=16, **given))
    ours = problem.loss(MRP(block_size=16).prune(problem).weight)
    assert ours < 1.05 * theirs


def test_rounds_beat_one_shot_and_the_sweep():
    for pattern in (Unstructured(0.5), Unstructured(0.7)):
        problem = problem_of(pattern, 48, 128)
        losses = [problem.loss(MRP(rounds=rounds).prune(problem).weight) for rounds in (1, 4, 16)]
        assert losses[0] > losses[1] > losses[2]
        swept = SparseGPT().prune(problem).mask
        assert losses[2] < 0.9 * problem.loss(refit(problem.weight, problem.gram, swept))


@given(columns=st.sampled_from([8, 16]), seed=seeds, pattern=st.sampled_from([Unstructured(0.5), NM(2, 4), NM(2, 8)]))
@quick
def test_on_one_mask_the_joint_compensation_is_never_worse_than_the_single_one(columns, seed, pattern):
    problem = in_damped_metric(in_double(problem_of(pattern, 4, columns, seed)))
    single, joint = (MRP(variant=v, rounds=1, damping=0.0).prune(problem) for v in ("SS", "SM"))
    assert torch.equal(single.mask, joint.mask)
    assert problem.loss(joint.weight) <= problem.loss(single.weight) * (1 + 1e-9)


@given(m=st.sampled_from([2, 4, 6, 8]), keep=st.integers(0, 8), seed=seeds)
@quick
def test_in_a_single_group_the_joint_mask_is_the_optimum(m, keep, seed):
    keep = min(keep, m)
    problem = in_damped_metric(in_double(problem_of(NM(keep, m), 5, m, seed)))
    joint, single = (MRP(variant=v, damping=0.0).prune(problem) for v in ("MM", "SM"))
    assert problem.loss(joint.weight) <= problem.loss(single.weight) * (1 + 1e-9)
    best = sum(optimum(problem, row, keep) for row in range(5))
    assert problem.loss(joint.weight) == pytest.approx(best, rel=1e-5, abs=1e-9)


@given(n=st.integers(0, 5), seed=seeds)
@quick
def test_joint_losses_are_those_of_the_formula(n, seed):
    weight, inverse = (
        random_weight(3, 10, seed).double(),
        torch.linalg.inv(correlated_gram(10, 0.5, seed=seed).double()),
    )
    found = group_losses(weight, joint_losses(inverse, n, 5), 5)
    for row, group in product(range(3), range(2)):
        part = inverse[5 * group : 5 * group + 5, 5 * group : 5 * group + 5]
        for index, lost in enumerate(combinations(range(5), 5 - n)):
            expected = published.set_loss(
                weight[row, 5 * group : 5 * group + 5], torch.tensor(lost, dtype=torch.long), part
            )
            torch.testing.assert_close(found[row, group, index], expected, rtol=1e-6, atol=1e-9)


def test_of_equal_sets_the_first_goes():
    problem = LayerProblem(torch.ones(2, 4), NM(2, 4), gram=torch.eye(4))
    assert MRP(variant="MM").prune(problem).mask.tolist() == [[False, False, True, True]] * 2


def test_small_rows_come_close_to_the_optimum_over_all_masks():
    gaps = []
    for seed in range(8):
        problem = in_double(problem_of(Unstructured(0.5), 1, 10, seed))
        best = optimum(problem, 0, 5)
        gaps.append(problem.loss(refit_exact(problem.weight, problem.gram, MRP().prune(problem).mask, 0.0)) / best)
    assert min(gaps) > 1 - 1e-9
    assert sorted(gaps)[4] < 1.02  # the median
    assert max(gaps) < 1.6


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5, "row"), Unstructured(0.5, "layer")], ids=str)
@pytest.mark.parametrize("variant", ["SS", "SM"])
def test_uncorrelated_inputs_need_no_compensation_and_give_the_optimum(pattern, variant):
    weight, diag = random_weight(8, 32), torch.rand(32, generator=torch.Generator().manual_seed(0)) + 0.1
    problem = LayerProblem(weight, pattern, gram=torch.diag(diag))
    pruned = MRP(variant=variant, damping=0).prune(problem)
    assert torch.equal(pruned.mask, pattern.mask(weight.square() * diag, "layer"))
    torch.testing.assert_close(pruned.weight[pruned.mask], weight[pruned.mask])


@pytest.mark.parametrize("variant", VARIANTS)
def test_frozen_zeros_go_first_and_their_loss_is_compensated(variant):
    pattern = NM(2, 4)
    frozen = torch.zeros(24, 64, dtype=torch.bool)
    frozen[:, ::4] = True
    frozen[3, 1::4] = True
    problem = problem_of(pattern, frozen=frozen)  # a corrected target is not zero where the weight is frozen
    pruned = solve(MRP(variant=variant), problem).pruned
    assert not (pruned.mask & frozen).any()


def test_a_frozen_half_leaves_nothing_to_choose():
    frozen = torch.rand(12, 32, generator=torch.Generator().manual_seed(0)).argsort(1) < 16
    problem = problem_of(Unstructured(0.5, "row"), 12, 32, frozen=frozen)
    pruned = solve(MRP(), problem).pruned
    assert torch.equal(pruned.mask, ~frozen)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_that_are_never_active_are_pruned_first(variant):
    problem = problem_of(NM(2, 4))
    for dead in (0, 5, 6):
        problem.gram[dead], problem.gram[:, dead] = 0.0, 0.0
    pruned = MRP(variant=variant).prune(problem)
    assert not pruned.mask[:, [0, 5, 6]].any()
    assert torch.isfinite(pruned.weight).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_zeros_of_a_start_stay_zero(variant):
    problem = problem_of(NM(1, 4))
    start = Magnitude().prune(replace(problem, pattern=NM(2, 4))).weight
    pruned = MRP(variant=variant).prune(replace(problem, start=start))
    assert not (pruned.mask & (start == 0)).any()


@pytest.mark.parametrize("tokens", [1, 8, 63])
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fewer_tokens_than_inputs_are_no_obstacle(tokens, damping, variant):
    inputs = correlated_inputs(tokens, 64)
    problem = LayerProblem(random_weight(6, 64), NM(2, 4), gram=inputs.T @ inputs / tokens)
    solved = solve(MRP(variant=variant, damping=damping), problem)
    assert solved.loss_after <= solved.loss_before * (1 + 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_degenerate_layers_are_solved(variant):
    gram = correlated_gram(16)
    for weight, inputs in (
        (torch.zeros(4, 16), gram),
        (torch.ones(4, 16), gram),
        (random_weight(4, 16), torch.zeros(16, 16)),
        (random_weight(4, 16), torch.ones(16, 16)),
        (1e18 * random_weight(4, 16), 1e-18 * gram),
        (1e-18 * random_weight(4, 16), 1e18 * gram),
    ):
        pruned = solve(MRP(variant=variant), LayerProblem(weight, NM(2, 4), gram=inputs)).pruned
        NM(2, 4).check(pruned.mask)
        assert torch.isfinite(pruned.weight).all()


def test_linears_with_the_same_inputs_factor_once(monkeypatch):
    calls = []
    original = mrp.inverse_factor
    monkeypatch.setattr(mrp, "inverse_factor", lambda *given: calls.append(1) or original(*given))
    first = problem_of(NM(2, 4))
    for variant in VARIANTS:
        MRP(variant=variant).prune(replace(first, weight=random_weight(8, 64, 1)))
    assert calls == [1]


def test_joint_masks_are_refused_where_sets_cannot_be_compared():
    with pytest.raises(PatternError, match="variant `MM` of MRP"):
        MRP(variant="MM").prune(problem_of(Unstructured(0.5)))
    with pytest.raises(PatternError, match="at most 1000 sets"):
        MRP(variant="MS").prune(problem_of(NM(8, 16)))


def test_the_score_is_the_loss_of_removing_one_weight():
    problem = in_damped_metric(in_double(problem_of(NM(2, 4), 3, 12)))
    score = MRP(damping=0).score(problem)
    for row, column in ((0, 0), (1, 5), (2, 11)):
        mask = torch.ones(3, 12, dtype=torch.bool)
        mask[row, column] = False
        assert float(score[row, column]) == pytest.approx(
            problem.loss(refit_exact(problem.weight, problem.gram, mask, 0.0)), rel=1e-6
        )


def test_the_single_solution_adds_up_moves():
    weight, inverse = torch.tensor([[2.0, 3.0, 5.0]]), torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 1.0], [0.0, 1.0, 4.0]])
    moved = single_compensation(weight, torch.tensor([[False, True, False]]), inverse)
    torch.testing.assert_close(moved, torch.tensor([[0.0, 3 - 2 / 2 - 5 / 4, 0.0]]))


@pytest.mark.parametrize("field", [{"damping": -0.1}, {"rounds": 0}, {"block_size": 0}, {"variant": "XM"}])
def test_hyper_parameters_out_of_range_are_refused(field):
    with pytest.raises(ValidationError, match=next(iter(field))):
        MRP(**field)
