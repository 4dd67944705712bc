from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import magnitude as published

from secateur.core.pattern import NM, Unstructured
from secateur.core.problem import LayerProblem
from secateur.methods.pruners.magnitude import Magnitude
from strategies import patterns, random_weight, seeds, weights

quick = settings(max_examples=30, deadline=None)


def test_the_smallest_weights_go():
    problem = LayerProblem(torch.tensor([[3.0, -1.0, 2.0, 0.5]]), Unstructured(0.5))
    assert Magnitude().prune(problem).weight.tolist() == [[3.0, 0.0, 2.0, 0.0]]


@given(rows=st.integers(1, 8), groups=st.integers(1, 6), percent=st.integers(0, 99), seed=seeds)
@quick
def test_masks_are_those_of_the_published_program_at_an_exact_budget(rows, groups, percent, seed):
    weight = random_weight(rows, 4 * groups, seed)
    layer = Magnitude().prune(LayerProblem(weight, Unstructured(percent / 100))).mask
    assert torch.equal(layer, published.mask(weight, (percent + 1e-9) / 100))
    assert torch.equal(Magnitude().prune(LayerProblem(weight, NM(1, 4))).mask, published.mask(weight, n=1, m=4))


def test_the_published_comparison_prunes_one_too_many():
    weight = random_weight(6, 10)
    assert int((~published.mask(weight, 0.5, exact=False)).sum()) == 31
    assert int((~Magnitude().prune(LayerProblem(weight, Unstructured(0.5))).mask).sum()) == 30


@given(data=st.data(), weight=weights(), scale=st.sampled_from([2.0**-10, 8.0]))
@quick
def test_signs_and_scale_do_not_matter(data, weight, scale):
    pattern = data.draw(patterns(weight.shape[1]))
    mask = Magnitude().prune(LayerProblem(weight, pattern)).mask
    assert torch.equal(Magnitude().prune(LayerProblem(-scale * weight, pattern)).mask, mask)


def test_equal_weights_are_pruned_to_the_count():
    pruned = Magnitude().prune(LayerProblem(torch.full((4, 5), 0.25), Unstructured(0.35)))
    assert int(pruned.mask.sum()) == 13
    assert pruned.mask.reshape(-1)[:13].all()


def test_a_start_is_what_is_scored_and_kept():
    weight, start = torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 4.0]])
    assert Magnitude().prune(LayerProblem(weight, Unstructured(0.5), start=start)).weight.tolist() == [[5.0, 0.0]]
