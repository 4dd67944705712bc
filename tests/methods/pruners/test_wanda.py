from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import wanda as published

from secateur.core.pattern import NM, Unstructured
from secateur.core.problem import LayerProblem
from secateur.engine.statistics import LayerStats
from secateur.methods.pruners.magnitude import Magnitude
from secateur.methods.pruners.wanda import Wanda, wanda_score
from strategies import correlated_inputs, patterns, random_weight, seeds, weights

quick = settings(max_examples=30, deadline=None)


def test_weights_with_quiet_inputs_go_first():
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    pruned = Wanda().prune(LayerProblem(weight, Unstructured(0.5), diag=torch.tensor([16.0, 1.0, 1.0, 1.0])))
    assert wanda_score(weight, torch.tensor([4.0, 1.0, 1.0, 1.0])).tolist() == [[4.0, 2.0, 3.0, 4.0]]
    assert pruned.weight.tolist() == [[1.0, 0.0, 0.0, 4.0]]


@given(rows=st.integers(1, 8), groups=st.integers(1, 6), percent=st.integers(0, 100), seed=seeds)
@quick
def test_masks_are_those_of_the_published_program(rows, groups, percent, seed):
    columns = 8 * groups
    weight, inputs = random_weight(rows, columns, seed), correlated_inputs(48, columns, seed=seed)
    squares, samples = torch.zeros(columns), 0
    for sequence in inputs.split(16):
        squares, samples = published.add_batch(squares, samples, sequence)
    diag = squares / 16  # a mean per token instead of a sum over the tokens of a sequence
    row = Wanda().prune(LayerProblem(weight, Unstructured(percent / 100), diag=diag)).mask
    assert torch.equal(row, published.mask(weight, diag, (percent + 1e-9) / 100))
    groups_of_eight = Wanda().prune(LayerProblem(weight, NM(3, 8), diag=diag)).mask
    assert torch.equal(groups_of_eight, published.mask(weight, diag, n=3, m=8))


def test_collected_statistics_are_the_published_running_mean():
    inputs = correlated_inputs(64, 24)
    squares, samples, stats = torch.zeros(24), 0, LayerStats(24, {"diag"})
    for sequence in inputs.split(16):
        squares, samples = published.add_batch(squares, samples, sequence)
        stats.update(sequence)
    torch.testing.assert_close(16 * stats.diag, squares)


@given(data=st.data(), weight=weights())
@quick
def test_equally_loud_inputs_give_magnitude_masks(data, weight):
    pattern = data.draw(patterns(weight.shape[1]))
    pattern = pattern if isinstance(pattern, NM) else Unstructured(pattern.sparsity, "row")
    problem = LayerProblem(weight, pattern, diag=torch.full((weight.shape[1],), 4.0))
    assert torch.equal(Wanda().prune(problem).mask, Magnitude().prune(problem).mask)


@given(weight=weights(columns=st.just(12)), seed=seeds)
@quick
def test_moving_scale_from_inputs_to_weights_changes_nothing(weight, seed):
    power = torch.randint(-4, 5, (12,), generator=torch.Generator().manual_seed(seed))
    diag = correlated_inputs(32, 12, seed=seed).square().mean(0)
    plain = LayerProblem(weight, Unstructured(0.5), diag=diag)
    moved = LayerProblem(weight * 2.0**power, Unstructured(0.5), diag=diag * 4.0**-power)
    assert torch.equal(Wanda().prune(plain).mask, Wanda().prune(moved).mask)


def test_survivors_keep_their_bytes():
    weight = random_weight(6, 16)
    pruned = Wanda().prune(LayerProblem(weight, NM(2, 4), diag=torch.rand(16) + 0.1))
    assert torch.equal(pruned.weight[pruned.mask], weight[pruned.mask])


def test_a_layer_budget_lets_rows_differ():
    weight = random_weight(8, 32) * torch.arange(1.0, 9.0)[:, None]
    problem = LayerProblem(weight, Unstructured(0.5, "layer"), diag=torch.ones(32))
    assert Wanda().prune(problem).mask.sum(1).unique().numel() > 1
