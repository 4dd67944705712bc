"""What every pruner of the shelf promises, shown for each line of the registry."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from secateur.core.contracts import Pruner, Scoring
from secateur.core.errors import InputError, NumericError, PatternError
from secateur.core.pattern import NM, Pattern, Unstructured
from secateur.core.problem import LayerProblem
from secateur.core.solve import solve
from secateur.methods.pruners.dsnot import DSnoT
from secateur.methods.pruners.sparsegpt import SparseGPT
from secateur.methods.registry import REGISTRY
from strategies import correlated_inputs, random_weight

ENTRIES = {entry.name: entry for entry in REGISTRY if entry.kind == "pruner"}
PRUNERS: dict[str, Pruner] = {name: entry.load()() for name, entry in ENTRIES.items()}
PRUNERS["dsnot on sparsegpt"] = DSnoT(base=SparseGPT(block_size=16))
ROWS, COLUMNS = 12, 40
PATTERNS: list[Pattern] = [
    NM(2, 4),
    NM(1, 4),
    NM(4, 8),
    NM(3, 5),
    NM(7, 20),
    NM(0, 4),
    Unstructured(0.5),
    Unstructured(0.7),
    Unstructured(0.55, "row"),
    Unstructured(0.937, "layer"),
]

each_pruner = pytest.mark.parametrize("pruner", PRUNERS.values(), ids=list(PRUNERS))
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def problem_of(pattern: Pattern = NM(2, 4), rows: int = ROWS, columns: int = COLUMNS, **given) -> LayerProblem:  # noqa: B008
    """A layer with every statistic and inputs that have a mean."""
    inputs = correlated_inputs(4 * columns, columns, seed=1, offset=1.0)
    gram = inputs.T @ inputs / len(inputs)
    weight = given.pop("weight", random_weight(rows, columns))
    return LayerProblem(weight, pattern, gram=gram, diag=gram.diagonal().clone(), mean=inputs.mean(0), **given)


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.numpy().tobytes() == right.numpy().tobytes()


@each_pruner
@each_pattern
def test_the_pattern_is_met_exactly(pruner, pattern):
    pruned = pruner.prune(problem_of(pattern))
    pattern.check(pruned.mask, pruner.scope)
    assert not pruned.weight[~pruned.mask].any()


@each_pruner
@each_pattern
def test_shape_and_dtype_are_those_of_the_weight(pruner, pattern):
    pruned = pruner.prune(problem_of(pattern))
    assert pruned.weight.shape == pruned.mask.shape == (ROWS, COLUMNS)
    assert (pruned.weight.dtype, pruned.mask.dtype) == (torch.float32, torch.bool)
    assert pruned.weight.is_contiguous()
    assert pruned.mask.is_contiguous()
    assert not torch.signbit(pruned.weight[~pruned.mask]).any()


@each_pruner
@each_pattern
def test_equal_problems_have_equal_answers(pruner, pattern):
    first, second = pruner.prune(problem_of(pattern)), pruner.prune(problem_of(pattern))
    assert same_bytes(first.weight, second.weight)
    assert torch.equal(first.mask, second.mask)


@each_pruner
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=str)
def test_problems_with_shared_statistics_are_solved_alike(pruner, pattern):
    problem = problem_of(pattern)
    pruner.prune(problem)
    again = pruner.prune(replace(problem, weight=problem.weight.clone()))  # the same shared factors
    assert same_bytes(again.weight, pruner.prune(problem_of(pattern)).weight)


@each_pruner
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6), Unstructured(0.6, "row")], ids=str)
def test_the_problem_is_left_as_it_was(pruner, pattern):
    start = random_weight(ROWS, COLUMNS)
    start = start * pattern.mask(start.abs(), pruner.scope)
    frozen = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    frozen[:, ::7] = start[:, ::7] == 0
    problem = problem_of(pattern, start=start, frozen=frozen)
    names = ("weight", "gram", "diag", "mean", "start", "frozen")
    before = {name: getattr(problem, name).clone() for name in names}
    pruned = pruner.prune(problem)
    pruned.weight.fill_(7.0)
    pruned.mask.fill_(False)
    for name in names:
        assert same_bytes(getattr(problem, name), before[name]), name


@each_pruner
@pytest.mark.parametrize("pattern", [Unstructured(0.0), Unstructured(0.0, "row"), NM(4, 4), NM(1, 1)], ids=str)
def test_without_sparsity_nothing_changes(pruner, pattern):
    problem = problem_of(pattern)
    pruned = pruner.prune(problem)
    assert pruned.mask.all()
    assert same_bytes(pruned.weight, problem.weight)


@each_pruner
@pytest.mark.parametrize("pattern", [Unstructured(1.0), Unstructured(1.0, "row"), NM(0, 5), NM(0, 1)], ids=str)
def test_full_sparsity_leaves_zeros(pruner, pattern):
    pruned = pruner.prune(problem_of(pattern))
    assert not pruned.mask.any()
    assert same_bytes(pruned.weight, torch.zeros(ROWS, COLUMNS))


@each_pruner
@pytest.mark.parametrize(
    "pattern", [NM(2, 4), NM(3, 8), Unstructured(0.7), Unstructured(0.7, "row"), Unstructured(0.7, "layer")], ids=str
)
def test_frozen_zeros_stay(pruner, pattern):
    problem = problem_of(pattern)
    frozen = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    frozen[:, ::4] = True
    frozen[0, 1::8] = True  # rows that differ
    problem = replace(problem, weight=problem.weight.masked_fill(frozen, 0.0), frozen=frozen)
    pruned = solve(pruner, problem).pruned
    assert not (pruned.mask & frozen).any()
    assert not pruned.weight[frozen].any()


@each_pruner
@each_pattern
def test_dead_inputs_do_no_harm(pruner, pattern):
    problem = problem_of(pattern)
    for dead in (0, 5, COLUMNS - 1):
        problem.gram[dead], problem.gram[:, dead] = 0.0, 0.0
        problem.diag[dead], problem.mean[dead] = 0.0, 0.0
    pruned = solve(pruner, problem).pruned
    pattern.check(pruned.mask, pruner.scope)
    assert torch.isfinite(pruned.weight).all()


@each_pruner
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6, "row"), Unstructured(0.6, "layer")], ids=str)
def test_the_order_of_rows_does_not_matter(pruner, pattern):
    problem = problem_of(pattern)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    straight, shuffled = pruner.prune(problem), pruner.prune(replace(problem, weight=problem.weight[order], shared={}))
    assert torch.equal(straight.mask[order], shuffled.mask)
    torch.testing.assert_close(straight.weight[order], shuffled.weight, rtol=1e-4, atol=1e-5)


@each_pruner
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 4), (3, 4), (1, 1)])
@pytest.mark.parametrize("pattern", [NM(1, 4), Unstructured(0.5), Unstructured(0.5, "row")], ids=str)
def test_tiny_layers_are_pruned_too(pruner, pattern, rows, columns):
    if isinstance(pattern, NM) and columns % 4:
        pattern = NM(0, 1)
    problem = problem_of(pattern, rows, columns)
    before = problem.weight.clone()
    pruned = solve(pruner, problem).pruned
    pattern.check(pruned.mask, pruner.scope)
    assert torch.equal(problem.weight, before)


@pytest.mark.parametrize("pruner", [p for p in PRUNERS.values() if not isinstance(p, DSnoT)], ids=repr)
def test_the_zeros_of_a_start_are_kept_where_the_pattern_asks_for_more(pruner):
    dense = problem_of(Unstructured(0.5, "row"))
    half = pruner.prune(dense)
    more = pruner.prune(replace(dense, pattern=Unstructured(0.75, "row"), start=half.weight))
    assert not (more.mask & ~half.mask).any()


@each_pruner
@pytest.mark.parametrize("what", ["weight", "gram", "diag", "mean"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(pruner, what, value):
    problem = problem_of()
    getattr(problem, what).view(-1)[3] = value
    with pytest.raises(NumericError, match=f"1 values of the {what} of `up`"):
        solve(pruner, problem, name="up")


@each_pruner
def test_a_width_that_the_groups_do_not_divide_is_refused(pruner):
    with pytest.raises(PatternError, match="divisible by 3"):
        solve(pruner, problem_of(NM(1, 3)))


@each_pruner
def test_every_statistic_it_needs_is_asked_for_by_name(pruner):
    for statistic in pruner.needs:
        with pytest.raises(InputError, match=f"statistic `{statistic}`"):
            pruner.prune(replace(problem_of(), **{statistic: None}))


@each_pruner
def test_no_other_statistic_is_read(pruner):
    problem = problem_of()
    lean = replace(problem, **dict.fromkeys({"gram", "diag", "mean"} - pruner.needs))
    assert torch.equal(pruner.prune(lean).mask, pruner.prune(problem).mask)


@pytest.mark.parametrize("name", ENTRIES)
def test_the_registry_line_agrees_with_the_class(name):
    entry, pruner = ENTRIES[name], PRUNERS[name]
    assert set(entry.needs) == pruner.needs
    assert pruner.needs <= {"gram", "diag", "mean"}
    assert pruner.scope in ("row", "layer")
    assert isinstance(pruner, Pruner)
    assert REGISTRY.entry_of(pruner) is entry


@pytest.mark.parametrize("name", ENTRIES)
def test_a_method_is_its_hyper_parameters(name):
    cls, pruner = ENTRIES[name].load(), PRUNERS[name]
    assert cls() == pruner
    assert hash(cls()) == hash(pruner)
    with pytest.raises(ValidationError, match="dampening"):
        cls(dampening=1)
    with pytest.raises(AttributeError):
        pruner.damping = 1


@pytest.mark.parametrize("pruner", [p for p in PRUNERS.values() if isinstance(p, Scoring)], ids=repr)
def test_scores_are_finite_and_not_negative(pruner):
    problem = problem_of()
    problem.gram[2], problem.gram[:, 2], problem.diag[2] = 0.0, 0.0, 0.0
    score = pruner.score(problem)
    assert score.shape == (ROWS, COLUMNS)
    assert torch.isfinite(score).all()
    assert (score >= 0).all()
