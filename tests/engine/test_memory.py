from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from secateur.core.pattern import NM, Unstructured
from secateur.core.problem import LayerProblem
from secateur.engine.memory import GRAM_COPIES, gram_copies, plan_memory
from secateur.engine.sweep import Sweep
from secateur.methods.pruners.alps import ALPS
from secateur.methods.pruners.scope import SCOPE
from secateur.methods.pruners.sparsegpt import SparseGPT
from secateur.methods.registry import REGISTRY
from secateur.models.blocks import find_blocks


@dataclass
class Hungry:
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    scope: ClassVar[str] = "layer"
    gram_copies: ClassVar[int] = 40

    def prune(self, problem):
        raise NotImplementedError


def test_a_pruner_says_how_many_matrices_of_the_gram_it_holds():
    assert gram_copies(None) == gram_copies(SparseGPT()) == GRAM_COPIES
    assert gram_copies(Hungry()) == 40
    assert gram_copies(ALPS()) == ALPS.gram_copies > GRAM_COPIES
    assert gram_copies(SCOPE(base=ALPS())) >= ALPS.gram_copies  # what it refines works before it


def test_the_plan_holds_what_the_pruner_says(tiny_llama):
    blocks = find_blocks(tiny_llama)
    sweep = Sweep(patterns={}, pruner=SparseGPT())
    plain, hungry = (
        plan_memory(blocks, replace(sweep, pruner=pruner), 4, 16, tiny_llama.config.hidden_size, torch.float32)
        for pruner in (SparseGPT(), Hungry())
    )
    widest = max(p.shape[1] for p in blocks.modules[0].parameters() if p.dim() == 2)
    assert hungry.total - plain.total == 4 * widest**2 * (40 - GRAM_COPIES)


@pytest.mark.parametrize("pattern", [Unstructured(0.7), NM(2, 4)], ids=str)
@pytest.mark.parametrize("entry", [entry for entry in REGISTRY if entry.kind == "pruner"], ids=lambda entry: entry.name)
def test_a_pruner_holds_no_more_of_the_size_of_the_gram_than_is_planned(entry, pattern):
    columns = 384
    inputs = torch.randn(4 * columns, columns, generator=torch.Generator().manual_seed(0))
    gram = inputs.T @ inputs
    weight = torch.randn(4, columns, generator=torch.Generator().manual_seed(1))
    problem = LayerProblem(weight, pattern, gram=gram, diag=gram.diagonal().clone(), mean=inputs.mean(0))
    pruner = entry.load()()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        pruner.prune(problem)
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda each: each.start_ns())
    held = itertools.accumulate(each.nbytes() for each in events if each.name() == "[memory]")
    rows = 0.1  # what is of the size of the weight
    assert max(held, default=0) <= (gram_copies(pruner) + rows) * 4 * columns**2
