"""The table of a comparison, as cells, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.core.quantities import duration, number, percent, size
from secateur.recipe.comparison import NO_TUNER, UNIFORM
from secateur.recipe.report import inline, line_of

SHARED_WORDS = (
    "All methods and patterns were solved on one set of statistics, those of the dense model's inputs. That is not what "
    "`secateur prune` does, which calibrates each linear on what is pruned before it: only methods that look at no data "
    "give the same model here and there. A tuner then works on the pruned model as `secateur tune` does."
)
OWN_WORDS = "Every row is what `secateur prune` and `secateur evaluate` give with the same settings."


def about(report: Mapping[str, Any]) -> str:
    """Return how the rows were calibrated, in words."""
    return SHARED_WORDS if report.get("statistics") == "shared" else OWN_WORDS


def texts(report: Mapping[str, Any]) -> list[str]:
    """Return the evaluation texts of all rows, in the order they first appear."""
    return list(dict.fromkeys(text for row in report.get("rows", ()) for text in row.get("perplexity") or {}))


def table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows as texts; plan, tuner and error have a column only where there is more than the usual."""
    rows = report.get("rows", ())
    measured = texts(report)
    planned = any(row.get("plan") not in (None, UNIFORM) for row in rows)
    tuned = any(row.get("tuner") not in (None, NO_TUNER) for row in rows)
    failed = any(row.get("error") for row in rows)
    head = ["method", *(["plan"] if planned else []), *(["tuner"] if tuned else []), "pattern", "sparsity"]
    head += [f"perplexity {text}" for text in measured] if len(measured) > 1 else ["perplexity"] * len(measured)
    head += ["time", "peak memory", *(["error"] if failed else [])]
    body = []
    for row in rows:
        seconds, peak = row.get("seconds"), row.get("peak_memory_bytes")
        cells = [str(row.get("method"))]
        cells += [str(row.get("plan") or "-")] if planned else []
        cells += [str(row.get("tuner") or "-")] if tuned else []
        cells += [str(row.get("pattern") or "-"), percent(row.get("sparsity"))]
        cells += [number((row.get("perplexity") or {}).get(text), 4) for text in measured]
        cells += ["-" if seconds is None else duration(seconds), "-" if peak is None else size(peak)]
        cells += [str(row.get("error") or "")] if failed else []
        body.append(cells)
    return head, body


def numeric(head: Sequence[str]) -> list[int]:
    """Return which columns hold numbers."""
    words = ("sparsity", "perplexity", "time", "peak memory")
    return [place for place, name in enumerate(head) if name.startswith(words)]


def to_csv(report: Mapping[str, Any]) -> str:
    """Return the rows as comma-separated values: bytes, seconds and fractions, full precision, empty where unknown."""
    measured = texts(report)
    plain = ("method", "plan", "tuner", "pattern", "sparsity")
    more = ("seconds", "peak_memory_bytes", "evaluation_seconds", "layer_loss", "error")
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*plain, *(f"perplexity {text}" for text in measured), *more])
    for row in report.get("rows", ()):
        values = [row.get("perplexity", {}).get(text) for text in measured]
        writer.writerow([*(row.get(name) for name in plain), *values, *(row.get(name) for name in more)])
    return stream.getvalue()


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return the table and how it was made."""
    head, rows = table(report)
    right = set(numeric(head))
    rule = ["---:" if place in right else "---" for place in range(len(head))]
    lines = [f"# {inline(report.get('title') or 'Comparison')}", "", inline(about(report)).replace("\\`", "`"), ""]
    lines += [line_of(head), line_of(rule), *map(line_of, rows), ""]
    versions = report.get("versions") or {}
    return "\n".join([*lines, ", ".join(f"{inline(k)} {inline(v)}" for k, v in versions.items())]).rstrip() + "\n"
