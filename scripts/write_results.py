"""Write docs/results.md from the JSON lines in benchmarks/results; `--check` says whether it is fresh.

Numbers reach this page by this script alone, so each of them was printed by a command of the project.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results"

HEAD = """# Measured results

This page is written by `python scripts/write_results.py` from the JSON lines in `benchmarks/results/`. Those lines were printed
by the scripts in `benchmarks/`, whose first lines say how to run them again, or are rows of `secateur compare`. To lines that
are older than a field, such as a learning rate, the field was added from the command that had printed them.
"""

QUALITY = """## Perplexity after pruning

SmolLM2-135M-Instruct in float32; calibration on 64 random crops of 512 tokens of the WikiText-2 validation text, evaluation on
the first 20 windows of 1024 tokens of its test text. *plain* rows take a block's statistics from its dense weights, as the
published programs do; the others calibrate true-sequentially. Both texts are of one domain, which flatters all rows that look
at data. CPU seconds are those of pruning and tuning, on one thread of a shared machine. The command:

    python benchmarks/quality.py MODEL --calibration CAL.txt --evaluation EVAL.txt --row METHOD:PATTERN[:TUNER[:OPTIONS]]
"""

YARDSTICKS = """### What these numbers hang on

Perplexities of a few hundred are those of a broken model, and rounding decides them. `benchmarks/published_walk.py` prunes by
the published program's steps, one sequence at a time, with nothing of this engine. Where its masks and ours first differ, they
do so in a few entries whose scores are equal to the last digits, and the difference grows from block to block.
"""

COMPARISON = """## One table of all pruners

`secateur compare` with `--statistics shared`: every row is solved on the same Gram matrices, those of the dense model, so
the rows differ by their solver alone. They are worse than those above, where each linear sees what was pruned before it.
Model and calibration are the same, evaluation is on the first 10 windows. Seconds are wall time on a shared machine whose load
was not the same for all rows, the shared walk included: compare methods' costs in the table of speed. The command:

    secateur compare MODEL --methods all --pattern 70% --pattern 2:4 \\
        --statistics shared --calibration CAL.txt --samples 64 --length 512 --perplexity EVAL.txt --lines --limit 10
"""

OWN = """## Planners and tuners

`secateur compare`, each row calibrated on its own pruned path as `secateur prune` does it; model, texts and windows as in the
first table, whose true-sequential rows are the uniform ones to compare with. What is not a default stands behind its name.
Planning counts in the seconds of each row. *Former defaults* are those before the last changes of ALPS: to
its damping, and to the start and growth of its penalty. SCOPE, whose base it is, followed. The commands:

    secateur compare MODEL --methods sparsegpt,alps --pattern 70% --plan owl,loss-curves,mixed-sparsity \\
        --calibration CAL.txt --samples 64 --length 512 --perplexity EVAL.txt --lines --limit 20
    secateur compare MODEL --methods sparsegpt,alps --pattern 2:4 --tuner ebft --refit --set ebft.epochs=1 \\
        --set ebft.batch_size=2 ...
    python benchmarks/record_compare.py DIR/report.json --out benchmarks/results/compare-own-smollm2.jsonl
"""

FINETUNE = """## Fine-tuning a sparse model

SmolLM2-135M-Instruct, pruned by SparseGPT or dense, then tuned on multiple-choice questions, packed, {tokens} tokens a step.
Rows to compare have about as many trained values. *learned* says whether the loss counts questions and answers or answers alone;
*held out* is that loss of questions that nobody was trained on. Perplexity is that of the first {windows} windows of the
WikiText-2 test text, another domain; accuracy is the mean over ARC-easy, PIQA, OpenBookQA and WinoGrande, with the
number of all questions, so differences of a few points mean nothing; rows that were measured on less text leave them out.
Merged and unmerged logits differ by at most {difference:.0e} of the largest, for adapters of ours by {ours:.0e}. The command,
with `--completion-only` and `--set` where a row says so:

    python benchmarks/quality_finetune.py MODEL --data SFT.jsonl --evaluation EVAL.txt --tasks TASK.jsonl ... \\
        --steps N --windows {windows} --documents N --learning-rate spp=8e-3 masked_lora=1e-3 ... --rows ROW
"""

ENOUGH = 100  # questions that an accuracy is worth showing for

RATIOS = """## Speed

`ratio` is the CPU time of a plain re-implementation of the published algorithm over ours, measured side by side on one thread,
same inputs (`benchmarks/bench_*.py`); `spread` is the half-range of the ratio as a fraction. `objective` is our loss over
theirs, on other tokens in brackets. `kept` is what waits in memory for backward, our bytes over theirs, where something is
trained. In rows of *mrp foresight* the other side is MRP without it.
"""


def read(name: str) -> list[dict[str, Any]]:
    """Return the JSON lines of one result file, none if it is missing."""
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


def quality() -> str:
    """Return the section on perplexity."""
    rows = [
        [
            line["case"].split("?")[0] + options(line),
            "plain" if line["plain"] else "true-sequential",
            f"{line['sparsity']:.3f}",
            f"{line['perplexity']:.2f}",
            f"{line['cpu_seconds']:.0f}",
        ]
        for line in sorted(read("quality-smollm2.jsonl"), key=by_pattern)
    ]
    head = ["method : pattern : tuner", "statistics", "sparsity", "perplexity", "CPU s"]
    return QUALITY + "\n" + table(head, rows) if rows else ""


def by_pattern(line: dict[str, Any]) -> tuple[str, int, float]:
    """Return what puts the dense row first, then rows of one pattern together, untuned before tuned, worst first."""
    case = line["case"].split(":", 1)
    pattern = "" if len(case) == 1 else case[1].split(":ebft")[0]
    return (pattern, int(line["tuner"] is not None), -line["perplexity"])


def yardsticks() -> str:
    """Return the section on what the numbers above hang on."""
    walks, ties = read("published-walk.jsonl"), read("ties.jsonl")
    parts = [YARDSTICKS] if walks or ties else []
    if walks:
        rows = [[line["case"], f"{line['perplexity']:.2f}", agreement(line)] for line in walks]
        parts.append(table(["published walk", "perplexity", "entries that our masks have not in common"], rows))
    if ties:
        share = ties[0]["tied_groups"]
        rows = [[line["case"], f"{line['perplexity']:.1f}"] for line in ties]
        parts.append(
            f"Magnitude at 2:4: {share:.1%} of the groups hold equal magnitudes at the cut (the weights were stored in four "
            "bits once), and the perplexity is that of the rule that breaks the ties; ours is `lower`, by "
            "`benchmarks/bench_ties.py`:\n\n" + table(["of equal weights, kept", "perplexity"], rows)
        )
    return "\n".join(parts)


def agreement(line: dict[str, Any]) -> str:
    """Return where the masks of the published walk begin to differ from ours, in words."""
    counts = line["differing_entries_by_block"]
    first = next((index for index, count in enumerate(counts) if count), None)
    if first is None:
        return "none"
    return f"none in blocks 0 to {first - 1}, {counts[first]} in block {first}, {counts[-1]:,} in the last"


def options(line: dict[str, Any]) -> str:
    """Return what a row's tuner was given, in words."""
    tuner = line.get("tuner")
    if not tuner:
        return ""
    refit = ", exact refit first" if line["case"].endswith("refit") else ""
    return f" ({tuner['epochs']} epochs, batch {tuner['batch_size']}{refit})"


def called(line: dict[str, Any]) -> str:
    """Return the method of a row, with what it was given, in words."""
    words = [f"{name} {value}" for name, value in (line.get("changed") or {}).get("method", {}).items()]
    words += ["former defaults"] if line.get("former") else []
    return f"{line['method']} ({', '.join(words)})" if words else str(line["method"])


def comparison() -> str:
    """Return the section on the table of all pruners."""
    lines = read("compare-smollm2.jsonl")
    rows = [
        [
            called(line),
            line["pattern"] or "",
            f"{line['sparsity']:.3f}",
            f"{next(iter(line['perplexity'].values())):.2f}",
            f"{line['seconds']:.0f}",
            "" if line.get("layer_loss") is None else f"{line['layer_loss']:.4f}",
        ]
        for line in sorted(lines, key=lambda line: (line["pattern"] or "", -next(iter(line["perplexity"].values()))))
    ]
    head = ["method", "pattern", "sparsity", "perplexity", "seconds", "mean relative layer loss"]
    return COMPARISON + "\n" + table(head, rows) if rows else ""


def own() -> str:
    """Return the section on planners and tuners."""
    lines = [line for line in read("compare-own-smollm2.jsonl") if line["pattern"]]

    def named(line: dict[str, Any], kind: str) -> str:
        """Return a method with what was changed of it, in words."""
        words = [f"{name} {value}" for name, value in line["changed"][kind].items()]
        words += ["exact refit"] if kind == "tuner" and line["refit"] else []
        name = line[kind] or "uniform"
        return f"{name} ({', '.join(words)})" if words else name

    rows = [
        [
            called(line),
            named(line, "plan"),
            named(line, "tuner"),
            line["pattern"],
            f"{line['sparsity']:.3f}",
            f"{next(iter(line['perplexity'].values())):.2f}",
            f"{line['seconds']:.0f}",
        ]
        for line in sorted(
            lines, key=lambda line: (line["pattern"], line["tuner"] != "none", -next(iter(line["perplexity"].values())))
        )
    ]
    head = ["method", "plan", "tuner", "pattern", "sparsity", "perplexity", "seconds"]
    return OWN + "\n" + table(head, rows) if rows else ""


def finetuning() -> str:
    """Return the section on fine-tuning."""
    lines = read("finetune-smollm2.jsonl")
    if not lines:
        return ""

    def answered(line: dict[str, Any]) -> str:
        """Return the accuracy with how many questions it comes from, nothing where they are few."""
        questions = line["documents"] * len(line["tasks"])
        return f"{line['accuracy']:.3f} of {questions}" if questions >= ENOUGH else ""

    def digits(value: float | None, places: int) -> str:
        return "" if value is None else f"{value:.{places}f}"

    def titled(line: dict[str, Any]) -> str:
        """Return the row's name with what was changed of its adapter."""
        words = ", ".join(f"{name} {value}" for name, value in (line.get("changed") or {}).items())
        return f"{line['row']} ({words})" if words else str(line["row"])

    models = list(dict.fromkeys(line["model"] for line in lines))

    def place(line: dict[str, Any]) -> tuple[int, bool, int]:
        """Return where the row stands: rows to compare side by side, those that were added later too."""
        amount = line.get("trainable")
        return models.index(line["model"]), bool(line.get("completion_only")), round(math.log2(amount)) if amount else 0

    rows = [
        [
            line["model"],
            titled(line),
            f"{line['trainable']:,}" if line.get("trainable") else "",
            "" if not line.get("trainable") else str(line["steps"]),
            "" if line.get("learning_rate") is None else f"{line['learning_rate']:g}",
            "" if not line.get("trainable") else "answers" if line.get("completion_only") else "all",
            f"{line['sparsity']:.4f}",
            digits(line.get("held_out_before"), 3),
            digits(line.get("held_out_after"), 3),
            digits(line["perplexity"] if line["windows"] == lines[0]["windows"] else None, 1),
            answered(line),
        ]
        for line in sorted(lines, key=place)
    ]
    head = ["model", "row", "trained", "steps", "rate", "learned", "sparsity", "held out before", "after"]
    first = lines[0]
    words = FINETUNE.format(
        tokens=first["tokens_per_step"],
        windows=first["windows"],
        difference=max(line.get("logits_difference") or 0.0 for line in lines),
        ours=max(line.get("logits_difference") or 0.0 for line in lines if not line["row"].startswith("lora")),
    )
    return words + "\n" + table([*head, "perplexity", "accuracy"], rows)


def ratios() -> str:
    """Return the section on speed."""
    lines = [line for path in sorted(RESULTS.glob("*.jsonl")) for line in read(path.name)]

    def kept(line: dict[str, Any]) -> float | None:
        """Return the ratio of the bytes that are kept for backward, if it was measured."""
        found: float | None = line.get("bytes_ratio", (line.get("quality") or {}).get("saved_ratio"))
        return found

    def objective(line: dict[str, Any]) -> str:
        """Return the ratio of the losses, if there is one."""
        quality = line.get("quality") or {}
        words = [f"{quality['objective_ratio']:.3f}"] if "objective_ratio" in quality else []
        return " ".join(words + ([f"({quality['unseen']:.3f})"] if "unseen" in quality else []))

    rows = [
        [
            line["job"],
            line["case"],
            f"{line['ref_ms']:.1f}",
            f"{line['ours_ms']:.1f}",
            f"{line['ratio']:.2f}",
            "" if line.get("spread") is None else f"{line['spread']:.2f}",
            "" if line.get("gate") is None else f"{line['gate']:g}",
            objective(line),
            "" if kept(line) is None else f"{kept(line):.2f}",
        ]
        for line in lines
        if "ratio" in line and "ours_ms" in line
    ]
    return (
        RATIOS
        + "\n"
        + table(["job", "case", "published, ms", "ours, ms", "ratio", "spread", "aim", "objective", "kept"], rows)
    )


def memory() -> str:
    """Return the section on memory."""
    lines = read("rss.jsonl")
    if not lines:
        return ""
    rows = [
        [
            line["case"],
            f"{line['samples']} x {line['length']}",
            f"{line['model_bytes'] / 2**20:.0f}",
            f"{line['planned_bytes'] / 2**20:.0f}",
            f"{line['growth_bytes'] / 2**20:.0f}",
        ]
        for line in lines
    ]
    head = ["case", "calibration", "model, MiB", "planned, MiB", "measured growth, MiB"]
    return "## Memory\n\nGrowth of the peak resident size in a fresh process (`benchmarks/bench_rss.py`).\n\n" + table(
        head, rows
    )


def page() -> str:
    """Return the whole page."""
    return "\n".join(
        part for part in (HEAD, quality(), yardsticks(), own(), comparison(), finetuning(), ratios(), memory()) if part
    )


def main() -> int:
    """Write the page, or check it; return the exit code."""
    if "--check" in sys.argv:
        if PAGE.read_text() != page():
            sys.stderr.write("stale: docs/results.md; run `make docs`\n")
            return 1
        return 0
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
