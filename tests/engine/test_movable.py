"""Masks that a tuner moves are what is checked, reported and written."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from secateur.core.contracts import BlockTask, Tuned
from secateur.core.errors import PatternError
from secateur.core.pattern import NM, Unstructured, parse_pattern
from secateur.engine.budget import assign
from secateur.engine.movable import pattern_of_mask
from secateur.engine.sweep import Sweep
from secateur.methods.pruners.wanda import Wanda
from secateur.models.linears import find_all_linears


@dataclass(frozen=True)
class Mover:
    """A tuner that moves every mask to scores drawn at random; `spoil` keeps one entry more than is allowed."""

    spoil: bool = False
    dense_path: ClassVar[bool] = False

    def tune(self, task: BlockTask) -> Tuned:
        with torch.no_grad():
            for (parameter, mask), select in zip(task.masked, task.select, strict=True):
                score = torch.rand(parameter.shape, generator=task.generator)
                chosen = select(score)
                assert chosen.shape == mask.shape
                if self.spoil:
                    chosen = chosen | (score == score[~chosen].max())
                parameter.copy_((0.5 + score) * chosen)
                mask.copy_(chosen)
        return Tuned(1.0, 0.5, 1.0, 1, 0.0)


def random_gpt2():
    """A GPT-2, whose linears store their weights transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pattern", ["2:4", "70%", "70% layer"])
def test_a_moved_mask_is_the_mask_that_is_written_and_reported(tiny_llama, ids, pattern, transposed):
    model = random_gpt2() if transposed else tiny_llama
    patterns = assign(model, pattern)
    fixed = Sweep(patterns=patterns, pruner=Wanda()).run(random_gpt2() if transposed else copy.deepcopy(model), ids)
    report = Sweep(patterns=patterns, pruner=Wanda(), tuner=Mover()).run(model, ids)
    for linear in find_all_linears(model):
        mask = report.masks[linear.name]
        assert torch.equal(linear.read() != 0, mask)
        assert not torch.equal(mask, fixed.masks[linear.name])
        parse_pattern(pattern).check(mask, "row")
    assert report.zeros == fixed.zeros


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_the_masks_of_a_sparse_model_move_inside_the_pattern_they_have(tiny_llama, ids, pattern):
    Sweep(patterns=assign(tiny_llama, pattern), pruner=Wanda()).run(tiny_llama, ids)
    before = {linear.name: linear.read() != 0 for linear in find_all_linears(tiny_llama)}
    report = Sweep(patterns=assign(tiny_llama, 0.5), tuner=Mover()).run(
        tiny_llama, ids, teacher=copy.deepcopy(tiny_llama)
    )
    for name, mask in report.masks.items():
        assert not torch.equal(mask, before[name])
        parse_pattern(pattern).check(mask, "row")


def test_frozen_zeros_stay_where_they_are(tiny_llama, ids):
    for linear in find_all_linears(tiny_llama):
        linear.read()[:, ::8] = 0.0
    patterns = assign(tiny_llama, "2:4")
    Sweep(patterns=patterns, pruner=Wanda(), tuner=Mover(), freeze_zeros=True).run(tiny_llama, ids)
    assert not any(bool(linear.read()[:, ::8].any()) for linear in find_all_linears(tiny_llama))


@pytest.mark.parametrize("pattern", ["2:4", "50%", "50% layer"])
def test_a_tuner_that_breaks_the_pattern_is_refused(tiny_llama, ids, pattern):
    with pytest.raises(PatternError, match=r"tuner broke the pattern of `model\.layers\.0"):
        Sweep(patterns=assign(tiny_llama, pattern), pruner=Wanda(), tuner=Mover(spoil=True)).run(tiny_llama, ids)


@pytest.mark.parametrize(
    "pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 16), Unstructured(0.5, "row"), Unstructured(0.6, "layer")], ids=str
)
def test_the_pattern_of_a_mask_is_found(pattern):
    score = torch.rand(50, 80, generator=torch.Generator().manual_seed(0))
    mask = pattern.mask(score)
    found = pattern_of_mask(mask)
    found.check(mask)
    assert type(found) is type(pattern)
    assert getattr(found, "scope", None) == getattr(pattern, "scope", None)
