"""True-sequential calibration of a block in one traversal against the five passes of the published program.

The published way runs the block again before each of the four groups of linears (q k v, o, gate up, down), one sequence
at a time, with a full Gram for each of the seven linears, and once more for its outputs. Ours is the sweep, with a
pruner that looks at the Gram and keeps every weight, so that both end with the dense block's own outputs.

    OMP_NUM_THREADS=1 python benchmarks/bench_calibrate.py [--quick]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import ClassVar

import torch
from measure import compare, report
from reference import sparsegpt as published
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.core.pattern import Unstructured
from secateur.core.problem import LayerProblem, Pruned
from secateur.engine.budget import assign
from secateur.engine.sweep import Sweep

LENGTH = 512
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Keep:
    """A pruner that asks for the Gram and prunes nothing."""

    grams: dict[tuple[int, int], Tensor]
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    scope: ClassVar[str] = "row"

    def prune(self, problem: LayerProblem) -> Pruned:
        self.grams[tuple(problem.weight.shape)] = problem.need("gram")
        return Pruned(problem.weight, torch.ones_like(problem.weight, dtype=torch.bool))


def ours(model: LlamaForCausalLM, ids: Tensor) -> dict[tuple[int, int], Tensor]:
    """Return the Gram of one linear of each shape, after a sweep over the model."""
    keep = Keep({})
    Sweep(patterns=assign(model, Unstructured(0.0)), pruner=keep, guard=False).run(model, ids)
    return keep.grams


@torch.no_grad()
def theirs(model: LlamaForCausalLM, ids: Tensor) -> dict[tuple[int, int], Tensor]:
    """Return the same Grams by five passes, one sequence at a time."""
    hidden = model.model.embed_tokens(ids)
    positions = model.model.rotary_emb(hidden[:1], torch.arange(LENGTH)[None])
    block = model.model.layers[0]
    found = {}
    for group in GROUPS:
        state = {name: (torch.zeros(0), 0) for name in group}

        def add(name: str, x: Tensor, state: dict[str, tuple[Tensor, int]] = state) -> None:
            gram, samples = state[name]
            rows = x.reshape(-1, x.shape[-1])
            gram = gram if samples else torch.zeros(rows.shape[1], rows.shape[1])
            state[name] = published.add_batch(gram, samples, rows)

        hooks = [
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, given, name=name, add=add: add(name, given[0])
            )
            for name in group
        ]
        for sequence in hidden.split(1):
            block(sequence, position_embeddings=positions)
        for hook in hooks:
            hook.remove()
        for name in group:
            found[tuple(block.get_submodule(name).weight.shape)] = state[name][0]
    for sequence in hidden.split(1):
        block(sequence, position_embeddings=positions)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repeats")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=512,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    samples = 8 if quick else 32
    sets = [torch.randint(512, (samples, LENGTH)) for _ in range(2)]
    times = compare(
        lambda i: theirs(model, sets[i]),
        lambda i: ours(model, sets[i]),
        warmups=1 if quick else 2,
        repeats=3 if quick else 7,
    )
    mine, slow = ours(model, sets[0]), theirs(model, sets[0])
    ratios = {shape: slow[shape].diagonal().mean() / mine[shape].diagonal().mean() for shape in mine}
    error = max(
        float((slow[shape] / ratios[shape] - mine[shape]).norm() / mine[shape].norm()) for shape in mine
    )  # the published Gram counts sequences, ours tokens
    report("calibrate", f"block of SmolLM2, {samples} x {LENGTH}", times, quality={"gram_error": error}, gate=2.5)


if __name__ == "__main__":
    main()
