"""Perplexity after pruning, at the settings of the published code: one JSON line per row.

Calibration: 64 random crops of 512 tokens (seed 0) of one text, tokenised once. Evaluation: the non-empty lines of
another text joined by blank lines, tokenised once, the first 20 windows of 1024 tokens. With `--plain` the statistics
of a block come from its dense weights, as published; without it calibration is true-sequential.

    python benchmarks/quality.py MODEL --calibration CAL.txt --evaluation EVAL.txt --row wanda:50% --row sparsegpt:2:4
    python benchmarks/quality.py MODEL ... --row 'sparsegpt:70%:ebft?epochs=3&batch_size=2' --out benchmarks/results/quality.jsonl
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.data.calibration import sample
from secateur.data.text import load_text, tokenise
from secateur.engine.budget import assign
from secateur.engine.memory import peak_memory
from secateur.engine.sweep import Sweep
from secateur.evaluate.perplexity import perplexity
from secateur.models.linears import find_all_linears
from secateur.recipe.build import build_method, describe


def method_of(text: str, kind: Any) -> Any:
    """Return the method that `name?field=value&field=value` describes; values are JSON where they parse as such."""
    name, _, query = text.partition("?")
    fields = {}
    for key, value in parse_qsl(query):
        try:
            fields[key] = json.loads(value)
        except ValueError:
            fields[key] = value
    return build_method({"name": name, **fields}, kind)


def sparsity(model: torch.nn.Module) -> float:
    """Return the fraction of zeros over all linears of the blocks."""
    weights = [linear.read() for linear in find_all_linears(model)]
    return 1 - sum(int(torch.count_nonzero(weight)) for weight in weights) / sum(weight.numel() for weight in weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument(
        "--row", action="append", default=[], help="METHOD:PATTERN[:TUNER[:OPTION,OPTION]]; `dense` for none"
    )
    parser.add_argument("--plain", action="store_true", help="statistics of the dense block, as published")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens of one calibration batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    dense = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    crops = sample(load_text(given.calibration), tokenizer, samples=given.samples, length=given.length, seed=given.seed)
    ids = tokenise(load_text(given.evaluation, lines=True), tokenizer)
    for row in given.row or ["dense"]:
        model, report, seconds, cpu = dense, None, 0.0, 0.0
        options: list[str] = []
        if row != "dense":
            method, pattern, tuner, options = parse_row(row)
            model = copy.deepcopy(dense)
            started, cpu_started = time.perf_counter(), time.process_time()
            sweep = Sweep(
                patterns=assign(model, pattern),
                pruner=method_of(method, "pruner"),
                tuner=method_of(tuner, "block tuner") if tuner else None,
                sequential=not (given.plain or "plain" in options),
                refit="refit" in options,
                error_correction="corrected" in options,
                guard="unguarded" not in options,
                seed=given.seed,
                device=torch.device(given.device),
                batch_tokens=given.batch_tokens,
            )
            report = sweep.run(model, crops.ids)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
        value = perplexity(model, ids, length=given.window, limit=given.windows)
        line = {
            "job": "quality",
            "case": row,
            "perplexity": value.value,
            "sparsity": sparsity(model) if row != "dense" else 0.0,
            "plain": given.plain or "plain" in options,
            "wall_seconds": seconds,
            "cpu_seconds": cpu,
            "peak_rss_bytes": peak_memory(torch.device("cpu")),
            "method": describe(sweep.pruner) if report else None,
            "tuner": describe(sweep.tuner) if report and sweep.tuner else None,
            "block_errors": [
                [block.tuned.before / block.tuned.scale, block.tuned.after / block.tuned.scale]
                for block in (report.blocks if report else [])
                if block.tuned
            ],
            "samples": given.samples,
            "length": given.length,
            "windows": given.windows,
            "window": given.window,
            "seed": given.seed,
            "batch_tokens": given.batch_tokens,
            "threads": given.threads,
            "device": given.device,
            "versions": {name: version(name) for name in ("secateur", "torch", "transformers")},
        }
        text = json.dumps(line)
        print(text, flush=True)
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            with given.out.open("a") as file:
                file.write(text + "\n")


def parse_row(row: str) -> tuple[str, str, str, list[str]]:
    """Return method, pattern, tuner and options of `METHOD:PATTERN[:TUNER[:OPTIONS]]`; an N:M pattern holds a colon."""
    method, _, rest = row.partition(":")
    parts = rest.split(":")
    if len(parts) > 1 and parts[0].isdigit() and parts[1].isdigit():
        parts = [f"{parts[0]}:{parts[1]}", *parts[2:]]
    pattern, tuner, options = (*parts, "", "")[:3]
    return method, pattern, tuner, [option for option in options.split(",") if option]


if __name__ == "__main__":
    main()
