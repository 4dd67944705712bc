from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import scope as published
from torch import Tensor

from secateur.core.contracts import Pruner
from secateur.core.errors import RecipeError
from secateur.core.linalg import refit_exact
from secateur.core.pattern import NM, Pattern, Unstructured
from secateur.core.problem import LayerProblem
from secateur.core.solve import solve
from secateur.methods.pruners import scope
from secateur.methods.pruners.alps import ALPS, standardised
from secateur.methods.pruners.dsnot import DSnoT, row_losses
from secateur.methods.pruners.magnitude import Magnitude
from secateur.methods.pruners.scope import SCOPE, splice
from secateur.methods.pruners.sparsegpt import SparseGPT
from secateur.methods.pruners.wanda import Wanda
from strategies import correlated_gram, correlated_inputs, patterns, random_weight, seeds, weights

quick = settings(max_examples=30, deadline=None)
BASES = [Magnitude(), Wanda(), SparseGPT(), ALPS()]


def problem_of(pattern: Pattern, rows: int = 12, columns: int = 32, seed: int = 0, **given) -> LayerProblem:
    inputs = correlated_inputs(4 * columns, columns, seed=seed, offset=1.0)
    gram = given.pop("gram", inputs.T @ inputs / len(inputs))
    weight = given.pop("weight", random_weight(rows, columns, seed))
    return LayerProblem(weight, pattern, gram=gram, diag=gram.diagonal().clone(), mean=inputs.mean(0), **given)


def losses(weight: Tensor, problem: LayerProblem) -> Tensor:
    error = (weight - problem.weight).double()
    return ((error @ problem.gram.double()) * error).sum(1)


def fitted_losses(row: Tensor, gram: Tensor, masks: list[list[int]]) -> Tensor:
    """The loss of one row on each of the supports, solved exactly, `(masks,)`."""
    kept = torch.tensor(masks)
    right = (row @ gram)[kept][:, :, None]  # (masks, kept, 1)
    solution = torch.linalg.solve(gram[kept[:, :, None], kept[:, None, :]], right)
    return row @ gram @ row - (right * solution).sum((1, 2))


def neighbours(kept: list[int], columns: int, group: int | None = None) -> list[list[int]]:
    """All supports that one exchange leads to."""
    dropped = [k for k in range(columns) if k not in kept]
    return [sorted({*kept, k} - {j}) for j in kept for k in dropped if group is None or j // group == k // group]


def state(columns: int, seed: int, group: int | None = None, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """A float64 target, Gram and mask."""
    target = random_weight(rows, columns, seed).double()
    gram = correlated_gram(columns, seed=seed).double()
    gram = gram / gram.diagonal().sqrt() / gram.diagonal().sqrt()[:, None]
    gram.diagonal().mul_(1.01)
    pattern = NM(group // 2, group) if group else Unstructured(0.5, "row")
    return target, gram, pattern.mask(random_weight(rows, columns, seed + 1).abs(), "row")


def a_round(target: Tensor, gram: Tensor, mask: Tensor, important: int, group: int | None) -> scope._Round:
    """A round up to where its exchanges begin."""
    columns = len(gram)
    bordered = torch.zeros(columns + 1, columns + 1, dtype=gram.dtype)
    bordered[:columns, :columns] = gram
    found = scope._Round(target, bordered, target * mask, mask, torch.full((len(target),), 1000))
    found.choose_(torch.ones(columns, dtype=gram.dtype), important, group, None)
    found.reduce_()
    return found


def table_of(row: Tensor, gram: Tensor, kept: list[int], chosen: list[int]) -> Tensor:
    """The rows of [[-A, T, w], [T', B, R]] of the chosen columns, kept or not, from their definitions."""
    size = len(gram)
    dropped = [k for k in range(size) if k not in kept]
    inverse = torch.linalg.inv(gram[kept][:, kept])
    weight = inverse @ gram[kept] @ row
    error = row.clone()
    error[kept] -= weight
    full = torch.zeros(size, size + 1, dtype=gram.dtype)
    answer = inverse @ gram[kept][:, dropped]
    for place, one in enumerate(kept):
        full[one, kept], full[one, dropped], full[one, size] = -inverse[place], answer[place], weight[place]
    for place, one in enumerate(dropped):
        full[one, kept] = answer[:, place]
        full[one, dropped] = gram[one, dropped] - gram[one, kept] @ answer
        full[one, size] = error @ gram[:, one]
    return full[chosen][:, [*chosen, size]]


@pytest.mark.parametrize("important", [8, 16, 64])
@pytest.mark.parametrize("group", [None, 4, 8])
def test_a_hundred_exchanges_leave_the_table_exact(group, important):
    target, gram, mask = state(24, 3, group)
    around = a_round(target, gram, mask, important, group)
    generator = torch.Generator().manual_seed(0)
    kept, size = around.kept, around.chosen.shape[1]
    for row in range(3):
        now = mask[row].nonzero().squeeze(1).tolist()
        expected = table_of(target[row], gram, now, around.chosen[row].tolist())
        torch.testing.assert_close(around.table[row], expected, rtol=1e-8, atol=1e-8)
        assert float(around.loss[row]) == pytest.approx(float(fitted_losses(target[row], gram, [now])), rel=1e-9)
    place = torch.arange(size).expand(3, -1).clone()
    for _ in range(100):
        out = torch.randint(kept, (3,), generator=generator)
        into = torch.randint(kept, size, (3,), generator=generator)
        scope._exchange_(around.table, place, out, into, torch.tensor([True, True, False]))
    assert torch.equal(place[2], torch.arange(size))  # the row that does not go
    for row in range(3):
        chosen = around.chosen[row][place[row]].tolist()
        rest = set(mask[row].nonzero().squeeze(1).tolist()) - set(around.chosen[row].tolist())
        expected = table_of(target[row], gram, sorted({*rest, *chosen[:kept]}), chosen)
        torch.testing.assert_close(around.table[row], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("columns", [12, 40])
@pytest.mark.parametrize("important", [8, 128])
def test_the_gain_of_the_best_exchange_is_that_of_refitting_every_pair(columns, group, important):
    target, gram, mask = state(columns, 5, group)
    around = a_round(target, gram, mask, important, group)
    gain, out, into = scope._best(around.table, around.kept, around.shut, around.groups)
    for row in range(3):
        kept = mask[row].nonzero().squeeze(1).tolist()
        chosen = around.chosen[row].tolist()
        near = neighbours(kept, columns, group)
        near = [other for other in near if set(other) ^ set(kept) <= set(chosen)]
        best = fitted_losses(target[row], gram, near).min()
        exchanged = sorted({*kept, chosen[into[row]]} - {chosen[out[row]]})
        assert float(fitted_losses(target[row], gram, [exchanged])) == pytest.approx(float(best), rel=1e-8)
        assert around.loss[row] - gain[row] == pytest.approx(float(best), rel=1e-8)


@given(seed=seeds, important=st.integers(2, 40), pattern=st.sampled_from([NM(2, 4), NM(1, 8), Unstructured(0.6)]))
@quick
def test_however_few_columns_are_important_no_row_loses(seed, important, pattern):
    problem = problem_of(pattern, 6, 32, seed)
    first = Wanda().prune(problem)
    group = pattern.m if isinstance(pattern, NM) else None
    target, gram = problem.weight.double(), problem.gram.double() + 1e-3 * torch.eye(32)
    exact = refit_exact(target, gram, first.mask, 0.0)
    found = splice(target, gram, first.mask, group=group, important=important)
    pattern.check(found.mask, "row")
    assert torch.equal(found.mask.sum(1), first.mask.sum(1))
    torch.testing.assert_close(found.weight, refit_exact(target, gram, found.mask, 0.0), rtol=1e-6, atol=1e-8)
    assert (row_losses(found.weight - target, gram) <= row_losses(exact - target, gram) * (1 + 1e-9)).all()


@pytest.mark.parametrize("pattern", [Unstructured(0.6, "row"), Unstructured(0.6), NM(2, 4)], ids=str)
def test_where_nothing_may_come_in_the_mask_stays_and_the_weights_are_exact(pattern):
    problem = problem_of(pattern)
    mask = Wanda().prune(problem).mask
    gram = problem.gram + 1e-2 * torch.eye(32)
    found = splice(problem.weight, gram, mask, barred=~mask, group=4 if isinstance(pattern, NM) else None)
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.weight, refit_exact(problem.weight, gram, mask, 0.0), rtol=1e-3, atol=1e-4)


def test_empty_and_whole_rows_are_batches_like_others(monkeypatch):
    monkeypatch.setattr(scope, "CPU_BYTES", 1)  # one row at a time
    target, gram, _ = state(16, 3, rows=4)
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[1], mask[2, :5], mask[3, 0] = True, True, True
    found = splice(target, gram, mask)
    assert found.mask.sum(1).tolist() == [0, 16, 5, 1]
    assert torch.equal(found.weight[0], torch.zeros(16, dtype=torch.float64))
    torch.testing.assert_close(found.weight[1], target[1])
    for kind in (mask[:1], mask[1:2]):
        assert torch.equal(splice(target[:1], gram, kind).mask, kind)


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("columns", [12, 48])
def test_at_the_end_no_exchange_helps(columns, group):
    target, gram, mask = state(columns, 7, group, rows=4)
    found = splice(target, gram, mask, group=group, tolerance=1e-9)
    assert torch.equal(found.mask.sum(1), mask.sum(1))
    for row in range(4):
        kept = found.mask[row].nonzero().squeeze(1).tolist()
        now = float(fitted_losses(target[row], gram, [kept]))
        best = float(fitted_losses(target[row], gram, neighbours(kept, columns, group)).min())
        assert best >= now * (1 - 1e-7)
        error = found.weight[row] - target[row]
        assert float(error @ gram @ error) == pytest.approx(now, rel=1e-8)


@given(
    weight=weights(st.integers(1, 6), st.integers(2, 24)),
    base=st.sampled_from(BASES),
    seed=seeds,
    data=st.data(),
)
@quick
def test_no_row_is_worse_than_the_base_left_it(weight, base, seed, data):
    columns = weight.shape[1]
    problem = problem_of(data.draw(patterns(columns)), columns=columns, weight=weight, seed=seed)
    first, found = base.prune(problem), SCOPE(base=base).prune(problem)
    problem.pattern.check(found.mask, base.scope)
    assert torch.equal(found.mask.sum(1), first.mask.sum(1))
    assert (losses(found.weight, problem) <= losses(first.weight, problem) * (1 + 1e-5) + 1e-6 * problem.size()).all()


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(4, 8)], ids=str)
@pytest.mark.parametrize("base", BASES, ids=repr)
def test_it_beats_the_exact_refit_of_its_base(base: Pruner, pattern):
    problem = problem_of(pattern, 32, 64)
    refitted = solve(base, problem, refit=True).loss_after
    polished = solve(SCOPE(base=base), problem, refit=True).loss_after
    assert polished <= refitted * (1.0 + 1e-6)
    if not isinstance(base, ALPS):
        assert polished < 0.95 * refitted


@pytest.mark.parametrize(("columns", "kept"), [(8, 4), (10, 5), (10, 3)])
def test_nine_of_ten_small_rows_are_the_best_of_all_masks(columns, kept):
    masks = [list(each) for each in itertools.combinations(range(columns), kept)]
    ratios = []
    for seed in range(12):
        problem = problem_of(Unstructured(1 - kept / columns, "row"), 4, columns, seed)
        found = losses(solve(SCOPE(damping=1e-3), problem, refit=True).pruned.weight, problem)
        best = [fitted_losses(row.double(), problem.gram.double(), masks).min() for row in problem.weight]
        ratios.append(found / torch.stack(best))
    ratios = torch.cat(ratios)
    assert ratios.min() > 0.999
    assert (ratios < 1.001).float().mean() >= 0.9
    assert ratios.max() < 1.6


def test_it_is_at_least_as_good_as_the_published_splicing():
    problem = problem_of(Unstructured(0.6, "row"), 32, 48)
    scale, unit = standardised(problem, SCOPE().damping)
    mask = problem.select(problem.weight.abs() * scale, "row")
    theirs = published.prune((problem.weight * scale).double(), unit.double(), mask)
    ours = splice(problem.weight * scale, unit, mask).weight.double()
    error, other = ours - problem.weight * scale, theirs - problem.weight * scale
    assert ((error @ unit.double()) * error).sum() < 0.98 * ((other @ unit.double()) * other).sum()


def test_uncorrelated_inputs_end_at_the_largest_contributions():
    diagonal = torch.rand(32, generator=torch.Generator().manual_seed(0)) + 0.1
    problem = problem_of(Unstructured(0.6, "row"), gram=torch.diag(diagonal))
    found = SCOPE(base=Magnitude(), tolerance=0.0).prune(problem)
    best = problem.select(problem.weight.square() * diagonal, "row")
    assert torch.equal(found.mask.sum(1), best.sum(1))
    assert problem.loss(found.weight) == pytest.approx(problem.loss(problem.weight * best), rel=1e-4)
    torch.testing.assert_close(found.weight[found.mask], problem.weight[found.mask])


def test_equal_columns_do_not_go_round_in_circles():
    inputs = correlated_inputs(200, 8).repeat_interleave(4, dim=1)
    problem = problem_of(Unstructured(0.75, "row"), gram=inputs.T @ inputs / 200)
    for tolerance in (0.0, 1e-4):
        found = SCOPE(tolerance=tolerance, swaps=1000).prune(problem)
        assert problem.loss(found.weight) < 0.01 * problem.size()


@pytest.mark.parametrize("pattern", [Unstructured(0.6), Unstructured(0.6, "row"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_fewer_tokens_than_inputs_are_enough(pattern, tokens):
    inputs = correlated_inputs(tokens, 32)
    problem = problem_of(pattern, gram=inputs.T @ inputs / tokens)
    for damping in (1e-3, 0.02):
        solved = solve(SCOPE(damping=damping), problem, refit=True)
        assert torch.isfinite(solved.pruned.weight).all()
        assert solved.loss_after <= solve(SparseGPT(), problem).loss_after + 1e-6


@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4)], ids=str)
def test_degenerate_layers_are_left_in_order(pattern):
    silent = torch.zeros(32, 32)
    for given_ in ({"weight": torch.zeros(4, 32)}, {"weight": torch.ones(4, 32)}, {"gram": silent}):
        solved = solve(SCOPE(base=Wanda()), problem_of(pattern, **given_))
        pattern.check(solved.pruned.mask, "row")
        assert torch.isfinite(solved.pruned.weight).all()


def test_kept_inputs_that_are_never_active_make_room_for_others():
    problem = problem_of(NM(2, 4))
    for dead in (0, 1, 9):
        problem.gram[dead], problem.gram[:, dead] = 0.0, 0.0
    found = SCOPE(base=Magnitude(), tolerance=0.0).prune(problem)
    assert found.mask[:, [0, 1, 9]].float().mean() < 0.05  # where all that is left in the group is next to nothing


@pytest.mark.parametrize("level", [1e-30, 1e30])
def test_very_loud_and_very_quiet_inputs_are_solved_alike(level):
    problem = problem_of(Unstructured(0.6))
    other = replace(problem, gram=problem.gram * level, shared={})
    for damping in (1e-3, 0.02):
        first, second = (SCOPE(base=Magnitude(), damping=damping).prune(each) for each in (problem, other))
        assert (first.mask == second.mask).float().mean() > 0.97


@given(seed=seeds, pattern=st.sampled_from([NM(2, 4), Unstructured(0.6, "row")]))
@quick
def test_the_units_of_the_inputs_do_not_matter(seed, pattern):
    problem = problem_of(pattern, 6, 16, seed)
    problem = replace(problem, start=Wanda().prune(problem).weight)
    factor = torch.randint(-8, 9, (16,), generator=torch.Generator().manual_seed(seed)).float().exp2()
    other = replace(
        problem,
        weight=problem.weight / factor,
        start=problem.start / factor,
        gram=problem.gram * factor * factor[:, None],
        shared={},
    )
    first, second = (SCOPE(tolerance=1e-3).prune(each) for each in (problem, other))
    assert torch.equal(first.mask, second.mask)
    torch.testing.assert_close(second.weight * factor, first.weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", [Unstructured(0.6, "row"), Unstructured(0.6), NM(2, 4)], ids=str)
def test_the_size_of_a_batch_does_not_matter(monkeypatch, pattern):
    problem = problem_of(pattern, 20)
    whole = SCOPE().prune(problem)
    monkeypatch.setattr(scope, "CPU_BYTES", 1)  # one row at a time
    single = SCOPE().prune(problem)
    assert torch.equal(whole.mask, single.mask)
    torch.testing.assert_close(whole.weight, single.weight, rtol=1e-3, atol=1e-4)


def test_rows_of_unlike_counts_keep_them():
    problem = problem_of(Unstructured(0.5), 12)
    problem.weight[0] *= 30  # the layer's budget keeps this row whole, and takes another one whole
    problem.weight[1] *= 1e-3
    first = Magnitude().prune(problem)
    assert first.mask[0].all()
    assert not first.mask[1].any()
    found = SCOPE(base=Magnitude()).prune(problem)
    assert torch.equal(found.mask.sum(1), first.mask.sum(1))
    assert problem.loss(found.weight) < 0.9 * problem.loss(first.weight)


@pytest.mark.parametrize("pattern", [Unstructured(0.6, "row"), Unstructured(0.6), NM(2, 4)], ids=str)
def test_frozen_zeros_do_not_come_in(pattern):
    frozen = torch.zeros(12, 32, dtype=torch.bool)
    frozen[:, ::4] = True
    frozen[3, 1::8] = True
    pruned = solve(SCOPE(base=Wanda()), problem_of(pattern, frozen=frozen)).pruned
    assert not (pruned.mask & frozen).any()
    full = torch.zeros(12, 32, dtype=torch.bool)
    full[:, ::2] = True
    only = solve(SCOPE(), problem_of(NM(2, 4), frozen=full)).pruned
    assert torch.equal(only.mask, ~full)


def test_a_start_of_the_pattern_is_polished_instead_of_the_base():
    problem = problem_of(NM(2, 4))
    start = Magnitude().prune(problem).weight
    given_, own = SCOPE().prune(replace(problem, start=start)), SCOPE(base=Magnitude()).prune(problem)
    assert torch.equal(given_.mask, own.mask)
    torch.testing.assert_close(given_.weight, own.weight)


def test_zeros_of_a_denser_start_stay_out():
    problem = problem_of(Unstructured(0.75, "row"))
    half = Wanda().prune(replace(problem, pattern=Unstructured(0.5, "row")))
    found = SCOPE().prune(replace(problem, start=half.weight))
    assert not (found.mask & ~half.mask).any()


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_without_exchanges_it_is_the_exact_refit(base):
    problem = problem_of(Unstructured(0.5, "row"))
    found = SCOPE(base=base, swaps=0).prune(problem)
    scale, unit = standardised(problem, SCOPE().damping)
    first = base.prune(problem)
    assert torch.equal(found.mask, first.mask)
    exact = refit_exact(problem.weight * scale, unit, first.mask, 0.0) / scale
    better = (losses(exact, problem) < losses(first.weight, problem))[:, None]
    expected = torch.where(better, exact, first.weight)
    torch.testing.assert_close(losses(found.weight, problem), losses(expected, problem), rtol=1e-3, atol=1e-6)


def test_the_number_of_exchanges_is_limited():
    problem = problem_of(Unstructured(0.6, "row"), 16, 64)
    first = Magnitude().prune(problem)
    one, many = (SCOPE(base=Magnitude(), swaps=n).prune(problem) for n in (1, 200))
    assert ((one.mask != first.mask).sum(1) <= 2).all()
    assert problem.loss(many.weight) < problem.loss(one.weight) < problem.loss(first.weight)


def test_a_row_without_a_factor_is_returned_as_it_came():
    target = random_weight(3, 8)
    mask = Unstructured(0.5, "row").mask(target.abs())
    found = splice(target, -torch.eye(8), mask)
    assert torch.equal(found.mask, mask)
    assert torch.equal(found.weight, target * mask)


def test_needs_scope_and_score_are_the_bases():
    assert SCOPE(base=DSnoT()).needs == {"gram", "diag", "mean"}
    assert (SCOPE().scope, SCOPE(base=Wanda()).scope) == ("layer", "row")
    problem = problem_of(NM(2, 4))
    assert torch.equal(SCOPE(base=Magnitude()).score(problem), problem.weight.abs())

    class Scoreless:
        needs, scope = frozenset(), "row"
        prune = Magnitude.prune

    with pytest.raises(RecipeError, match="`Scoreless` of SCOPE has no score"):
        SCOPE(base=Scoreless()).score(problem)


@pytest.mark.parametrize(
    "field",
    [
        {"swaps": -1},
        {"tolerance": -1.0},
        {"damping": 0.0},
        {"damping": float("nan")},
        {"important": 1},
        {"base": "wanda"},
    ],
)
def test_hyper_parameters_out_of_range_are_refused(field):
    with pytest.raises(ValidationError, match=next(iter(field))):
        SCOPE(**field)
