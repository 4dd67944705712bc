"""How much perplexity hangs on ties: magnitude 2:4 under different rules for which of equal weights stays.

A model whose weights were stored in few bits has equal magnitudes everywhere, so "the two largest of four" is often not
one answer. One JSON line per rule: `lower` and `upper` keep the lower and the upper column, `topk` whatever
`torch.topk` keeps (as the published program), `random:SEED` any.

    python benchmarks/bench_ties.py MODEL --evaluation EVAL.txt --out benchmarks/results/ties.jsonl
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.reference.magnitude import groups

from secateur.core.select import top_of_groups
from secateur.data.text import load_text, tokenise
from secateur.evaluate.perplexity import perplexity
from secateur.models.linears import find_all_linears


def shuffled(seed: int) -> Callable[[Tensor], Tensor]:
    """Return a rule that breaks ties at random."""
    generator = torch.Generator().manual_seed(seed)

    def mask(weight: Tensor) -> Tensor:
        order = torch.rand(weight.shape, generator=generator).reshape(-1, 4).argsort(1)
        mixed = weight.abs().reshape(-1, 4).gather(1, order)
        kept = top_of_groups(mixed, 2, 4)
        return torch.zeros_like(kept).scatter_(1, order, kept).reshape(weight.shape)

    return mask


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "lower": lambda weight: top_of_groups(weight.abs(), 2, 4),
    "upper": lambda weight: top_of_groups(weight.abs().flip(1).contiguous(), 2, 4).flip(1),
    "topk": lambda weight: groups(weight.abs(), 2, 4),
    "random:0": shuffled(0),
    "random:1": shuffled(1),
    "random:2": shuffled(2),
}


def tied(weight: Tensor) -> float:
    """Return the fraction of groups of four in which the second and the third largest are equal."""
    ranked = weight.abs().reshape(-1, 4).sort(1).values
    return float((ranked[:, 1] == ranked[:, 2]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    dense = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    ids = tokenise(load_text(given.evaluation, lines=True), tokenizer)
    for rule, mask in RULES.items():
        model = copy.deepcopy(dense)
        shares = []
        for linear in find_all_linears(model):
            weight = linear.read()
            shares.append(tied(weight))
            linear.write(weight * mask(weight))
        line = {
            "job": "ties",
            "case": rule,
            "perplexity": perplexity(model, ids, length=given.window, limit=given.windows).value,
            "tied_groups": sum(shares) / len(shares),
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
