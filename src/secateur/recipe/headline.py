"""The one table of a run: a line for the model at each point where it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.core.quantities import duration, number, percent, size

MAKES_MODEL = ("prune", "tune", "finetune")


@dataclass(frozen=True)
class Measured:
    """One model of a run, as it was measured.

    Attributes:
        label: what to call it.
        sparsity: fraction of zeros, 0..1.
        perplexity: `{text: value}`, without those that were not finite.
        tasks: `{"task metric": value}`, one metric per task.
        seconds: spent on making it, all stages before it together; None for the model as it came.
        peak_memory_bytes: of the stage that made it, or of measuring it as it came.
    """

    label: str
    sparsity: float | None
    perplexity: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    peak_memory_bytes: float | None = None


def measured(report: Mapping[str, Any]) -> list[Measured]:
    """Return the models of a run report in the order they were measured; one that never was has no perplexity."""
    rows: list[Measured] = []
    seconds: float | None = None
    maker: Mapping[str, Any] | None = None
    for stage in report.get("stages", ()):
        if stage.get("stage") in MAKES_MODEL:
            if maker is not None:
                rows.append(_unmeasured(maker, seconds))
            seconds = (seconds or 0.0) + (stage.get("seconds") or 0.0)
            maker = stage
        elif stage.get("stage") == "evaluate":
            label = str(stage.get("label") or stage.get("model") or f"model {len(rows) + 1}")
            peak = (maker or stage).get("peak_memory_bytes")
            texts = {text: value for text, value in (stage.get("perplexity") or {}).items() if value is not None}
            rows.append(Measured(label, stage.get("sparsity"), texts, _scores(stage.get("tasks") or {}), seconds, peak))
            maker = None
    if maker is not None:
        rows.append(_unmeasured(maker, seconds))
    return rows


def headline(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the table of a run report as texts: its head and its rows, columns without any value left out."""
    rows = measured(report)
    texts = list(dict.fromkeys(text for row in rows for text in row.perplexity))
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    names = [f"perplexity {text}" for text in texts] if len(texts) > 1 else ["perplexity"] * len(texts)
    head = ["model", "sparsity", *names, *tasks, "time", "peak memory"]
    body = [
        [
            row.label,
            percent(row.sparsity),
            *(number(row.perplexity.get(text), 4) for text in texts),
            *("-" if task not in row.tasks else f"{row.tasks[task]:.3f}" for task in tasks),
            "-" if row.seconds is None else duration(row.seconds),
            "-" if row.peak_memory_bytes is None else size(row.peak_memory_bytes),
        ]
        for row in rows
    ]
    return head, body


def _unmeasured(stage: Mapping[str, Any], seconds: float | None) -> Measured:
    label = {"prune": "pruned", "tune": "tuned"}[stage["stage"]]
    return Measured(label, stage.get("sparsity"), seconds=seconds, peak_memory_bytes=stage.get("peak_memory_bytes"))


def _scores(tasks: Mapping[str, Any]) -> dict[str, float]:
    """Return one number per task: normalised accuracy, accuracy, or the first metric that is no standard error."""
    found: dict[str, float] = {}
    for task, metrics in tasks.items():
        if not isinstance(metrics, Mapping):
            continue
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in name
        }
        preferred = [name for name in ("acc_norm,none", "acc_norm", "acc,none", "acc") if name in numbers]
        if name := next(iter([*preferred, *numbers]), None):
            found[f"{task} {name.removesuffix(',none')}"] = numbers[name]
    return found
