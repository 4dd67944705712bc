"""What fine-tuning wins back on a sparse model, by adapter: perplexity and accuracy before, after, and after the merge.

Every adapter has about as many trained values, the same steps and the same examples. Plain LoRA is there as a yardstick:
merged as it is (the zeros are gone) and merged and pruned again to the old zeros. One JSON line per row.

    python benchmarks/quality_finetune.py MODEL --data SFT.jsonl --evaluation EVAL.txt --tasks DIR/arc_easy.jsonl
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur
from secateur.core.versions import versions
from secateur.data.instructions import load_examples
from secateur.models.linears import find_all_linears, sparsity

ADAPTERS: dict[str, dict[str, Any]] = {
    "spp": {"name": "spp", "r": 16, "dropout": 0.0},
    "masked_lora": {"name": "masked_lora", "r": 8, "lora_alpha": 16},
    "lora": {"name": "lora", "r": 8, "lora_alpha": 16},
    "s2ft": {"name": "s2ft", "o": 1, "down": 77},  # as many trained values in SmolLM2-135M
}


def scores(model: nn.Module, tokenizer: Any, given: argparse.Namespace) -> dict[str, Any]:
    """Return perplexity and accuracies of a model."""
    found = secateur.evaluate(
        model,
        tokenizer,
        perplexity=given.evaluation,
        lines=True,
        limit=given.windows,
        tasks=given.tasks,
        task_limit=given.documents,
    )
    tasks = {Path(task).stem: metrics.get("acc,none") for task, metrics in found["tasks"].items()}
    known = [value for value in tasks.values() if value is not None]
    return {
        "perplexity": next(iter(found["perplexity"].values())),
        "accuracy": sum(known) / len(known) if known else None,
        "tasks": tasks,
    }


def supports(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return where each linear of the blocks is not zero."""
    return {view.name: view.read() != 0 for view in find_all_linears(model)}


@torch.no_grad()
def remask_(model: nn.Module, kept: dict[str, torch.Tensor]) -> nn.Module:
    """Set to zero what was zero in `kept`."""
    for view in find_all_linears(model):
        view.write(view.read() * kept[view.name])
    return model


def settings(words: list[str]) -> dict[str, dict[str, Any]]:
    """Return `{adapter: {field: value}}` of `adapter.field=value`."""
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        place, _, value = word.partition("=")
        name, _, field = place.partition(".")
        found.setdefault(name, {})[field] = json.loads(value)
    return found


def rows(model_name: str, given: argparse.Namespace) -> None:
    """Print the rows of one model."""
    loaded = secateur.load(model_name)
    base, tokenizer = loaded.model, loaded.tokenizer
    kept = supports(base)
    every = load_examples(given.data)
    learned, held_out = (
        replace(every, rows=every.rows[: -given.held_out]),
        replace(every, rows=every.rows[-given.held_out :]),
    )
    ids = torch.randint(1000, 20000, (1, 128), generator=torch.Generator().manual_seed(0))

    def write(row: str, model: nn.Module, **more: Any) -> None:
        found = scores(model, tokenizer, given)
        line = {
            "job": "finetune",
            "model": Path(model_name).name,
            "row": row,
            **found,
            **more,
            "steps": given.steps,
            "tokens_per_step": given.length * given.batch_size,
            "windows": given.windows,
            "documents": given.documents,
            "versions": versions(),
        }
        print(json.dumps(line), flush=True)
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    if "before" in given.rows:
        write("before", base, sparsity=sparsity(base))
    for name in given.rows:
        if name not in ADAPTERS:
            continue
        started = time.process_time()
        tuned, report = secateur.finetune(
            base,
            tokenizer,
            data=learned,
            evaluation=held_out,
            adapter={**ADAPTERS[name], **given.set.get(name, {})},
            steps=given.steps,
            length=given.length,
            batch_size=given.batch_size,
            packing=True,
            completion_only=given.completion_only,
            learning_rate=given.learning_rate.get(name),
            log_every=5,
        )
        more = {
            "trainable": report["trainable"],
            "learning_rate": report["learning_rate"],
            "completion_only": given.completion_only,
            "changed": given.set.get(name, {}),
            "cpu_seconds": time.process_time() - started,
            "held_out_before": report["evaluations"][0]["loss"],
            "held_out_after": report["evaluations"][-1]["loss"],
            "losses": [line["loss"] for line in report["losses"]],
        }
        with torch.no_grad():
            beside = tuned(ids).logits
        merged = tuned.merge_and_unload()
        with torch.no_grad():
            difference = float((merged(ids).logits - beside).abs().max() / beside.abs().max())
        same = all(torch.equal(view.read() != 0, kept[view.name]) for view in find_all_linears(merged))
        more |= {"logits_difference": difference, "zeros_identical": same}
        write(f"{name}, merged", merged, sparsity=sparsity(merged), **more)
        if not same and sparsity(base) > 0.01:
            more["held_out_after"] = None  # measured before the second pruning
            again = remask_(copy.deepcopy(merged), kept)
            write(f"{name}, merged and pruned again", again, sparsity=sparsity(again), **more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("--rows", nargs="+", default=["before", "spp", "masked_lora", "lora"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--completion-only", action="store_true", help="learn answers alone, not questions")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--held-out", type=int, default=48, help="examples at the end whose loss is measured")
    parser.add_argument("--documents", type=int, default=80)
    parser.add_argument("--learning-rate", nargs="*", default=[], metavar="NAME=X")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME.FIELD=VALUE", help="of an adapter, value as JSON")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.learning_rate = {name: float(rate) for name, rate in (pair.split("=") for pair in given.learning_rate)}
    given.set = settings(given.set)
    for model in given.models:
        rows(model, given)


if __name__ == "__main__":
    main()
