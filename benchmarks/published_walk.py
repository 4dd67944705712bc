"""The published walk, with nothing of ours in it but the perplexity: a yardstick for `quality.py`.

Wanda as its program goes: for each block, every sequence alone through the dense block with hooks on its linears, the
mask of `reference/wanda.py` on each, every sequence again through the pruned block. One JSON line per row: its perplexity,
and by block how many entries its masks and our engine's have not in common.

    python benchmarks/published_walk.py MODEL --calibration CAL.txt --evaluation EVAL.txt --row 70% --row 2:4
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from reference import wanda
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.core.pattern import NM, parse_pattern
from secateur.data.calibration import sample
from secateur.data.text import load_text, tokenise
from secateur.engine.budget import assign
from secateur.engine.sweep import Sweep
from secateur.evaluate.perplexity import perplexity
from secateur.methods.pruners.wanda import Wanda
from secateur.models.linears import find_all_linears


def counting(squares: dict[str, tuple[Tensor, int]], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Return the hook that adds the inputs of the linear `name` to its squares."""

    def count(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        squares[name] = wanda.add_batch(*squares[name], arguments[0][0])

    return count


@torch.no_grad()
def prune_(model: nn.Module, ids: Tensor, pattern: str) -> None:
    """Prune a LLaMA-type model in place, one sequence at a time."""
    wanted = parse_pattern(pattern)
    inner = model.model
    hidden = [inner.embed_tokens(row[None]) for row in ids]
    positions = torch.arange(ids.shape[1])[None]
    rotary = inner.rotary_emb(hidden[0], positions)
    given = {"attention_mask": None, "position_ids": positions, "position_embeddings": rotary}
    for block in inner.layers:
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        squares = {name: (torch.zeros(module.in_features), 0) for name, module in linears.items()}
        hooks = []
        for name, module in linears.items():
            hooks.append(module.register_forward_pre_hook(counting(squares, name)))
        for states in hidden:
            block(states, **given)
        for hook in hooks:
            hook.remove()
        for name, module in linears.items():
            if isinstance(wanted, NM):
                mask = wanda.mask(module.weight, squares[name][0], n=wanted.n, m=wanted.m)
            else:
                mask = wanda.mask(module.weight, squares[name][0], wanted.sparsity)
            module.weight *= mask
        hidden = [block(states, **given) for states in hidden]


def differing(one: nn.Module, other: nn.Module) -> list[int]:
    """Return, for each block, how many entries are zero in one model and not in the other."""
    counts: dict[int, int] = {}
    for mine, its in zip(find_all_linears(one), find_all_linears(other), strict=True):
        found = int(((mine.read() == 0) != (its.read() == 0)).sum())
        counts[mine.block] = counts.get(mine.block, 0) + found
    return list(counts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--row", action="append", required=True, help="a pattern")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--attention", default="sdpa", help="sdpa or eager")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    dense = AutoModelForCausalLM.from_pretrained(
        given.model, dtype=torch.float32, attn_implementation=given.attention
    ).eval()
    crops = sample(load_text(given.calibration), tokenizer, samples=given.samples, length=given.length, seed=given.seed)
    ids = tokenise(load_text(given.evaluation, lines=True), tokenizer)
    for row in given.row:
        model, ours = copy.deepcopy(dense), copy.deepcopy(dense)
        prune_(model, crops.ids, row)
        Sweep(patterns=assign(ours, row), pruner=Wanda(), sequential=False).run(ours, crops.ids)
        line = {
            "job": "published walk",
            "case": f"wanda:{row}",
            "perplexity": perplexity(model, ids, length=given.window, limit=given.windows).value,
            "differing_entries_by_block": differing(model, ours),
            "attention": given.attention,
            "samples": given.samples,
            "length": given.length,
            "threads": given.threads,
        }
        text = json.dumps(line)
        print(text, flush=True)
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            with given.out.open("a") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    main()
