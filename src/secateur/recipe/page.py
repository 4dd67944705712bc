"""The report of a run as one HTML file that needs nothing else: no script, no network; light or dark as you read.

Everything that comes from a model, a text or a recipe is escaped; the page forbids itself to load anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from secateur.core.quantities import duration, number, percent, size
from secateur.recipe.charts import SHADES, Bar, Cell, Pair, bars, grid, levels, pairs
from secateur.recipe.headline import MAKES_MODEL, Measured, headline, measured
from secateur.recipe.markup import chart, details, document, legend, table
from secateur.recipe.scatter import Point, scatter
from secateur.recipe.yaml_writer import to_yaml

_KIND_WORDS = {
    "prune": "Pruning",
    "tune": "Tuning",
    "finetune": "Fine-tuning",
    "evaluate": "Measuring",
    "export": "Exporting",
}


def render(report: Mapping[str, Any]) -> str:
    """Return the report of a run (see `recipe/report.py`) as an HTML page."""
    title = str(report.get("title") or "Pruning report")
    made = [stage for stage in report.get("stages", ()) if stage.get("stage") in MAKES_MODEL]
    sections = [
        _tiles(measured(report)),
        _warnings(report.get("stages", ())),
        _headline(report),
        _perplexity(measured(report)),
        *(section for place, stage in enumerate(made) for section in _stage(stage, first=place == 0)),
        _cost(report.get("stages", ())),
        _samples(report.get("samples") or ()),
        _recipe(report),
    ]
    return document(title, _subtitle(report), sections, _versions(report))


def _subtitle(report: Mapping[str, Any]) -> str:
    recipe = report.get("recipe") or {}
    model = recipe.get("model") or next((s["model"] for s in report.get("stages", ()) if s.get("model")), "")
    words = [f"<code>{escape(str(model))}</code>"] if model else []
    if report.get("created"):
        words.append(escape(str(report["created"])[:19].replace("T", " ")))
    if recipe.get("seed") is not None:
        words.append(f"seed {escape(str(recipe['seed']))}")
    return " · ".join(words)


def _tiles(rows: Sequence[Measured]) -> str:
    """Return the few numbers to remember: sparsity, perplexity, how much of the damage came back, time."""
    if not rows:
        return ""
    last = rows[-1]
    tiles = [(percent(last.sparsity), "zeros in the linears")] if last.sparsity is not None else []
    text = next(iter(last.perplexity), None)
    shown = [row for row in rows if text in row.perplexity]
    if text is not None and len(shown) >= 2:
        first, *_ = values = [row.perplexity[text] for row in shown]
        tiles.append((number(values[-1], 4), f"perplexity; {shown[0].label} {number(first, 4)}"))
        worst = max(values[1:])
        if len(values) >= 3 and worst > first:
            tiles.append((percent((worst - values[-1]) / (worst - first)), "of the damage repaired"))
    elif text is not None:
        tiles.append((number(last.perplexity[text], 4), "perplexity"))
    if last.seconds is not None:
        tiles.append((duration(last.seconds), "to make it"))
    items = "".join(f"<li><b>{escape(value)}</b><span>{escape(words)}</span></li>" for value, words in tiles)
    return f'<ul class="tiles">{items}</ul>'


def _warnings(stages: Iterable[Mapping[str, Any]]) -> str:
    found = list(dict.fromkeys(str(words) for stage in stages for words in stage.get("warnings") or ()))
    if not found:
        return ""
    items = "".join(f"<li>{escape(words)}</li>" for words in found[:50])
    return f'<section class="warnings"><h2>Warnings</h2><ul>{items}</ul></section>'


def _headline(report: Mapping[str, Any]) -> str:
    head, rows = headline(report)
    if not rows:
        return ""
    return f"<section><h2>At a glance</h2>{table(head, rows, range(1, len(head)), 'headline')}</section>"


def _perplexity(rows: Sequence[Measured]) -> str:
    texts = list(dict.fromkeys(text for row in rows for text in row.perplexity))
    if not texts:
        return ""
    parts = [
        "<section><h2>Perplexity</h2>"
        '<p class="why">How many tokens the model hesitates between, on average; less is better. The scale is '
        "logarithmic and begins at 1, so the length of a bar is the loss per token.</p>"
    ]
    for text in texts:
        shown = [row for row in rows if text in row.perplexity]
        data = [
            Bar(row.label, row.perplexity[text], number(row.perplexity[text], 4), min(place, 5))
            for place, row in enumerate(shown)
        ]
        parts.append(
            f"<h3>{escape(text)}</h3>" if len(texts) > 1 else f'<p class="meta"><code>{escape(text)}</code></p>'
        )
        parts.append(bars(data, name=f"perplexity on {text}", logarithmic=True))
    return "".join(parts) + "</section>"


def _stage(stage: Mapping[str, Any], *, first: bool) -> list[str]:
    """Return the sections of one stage that made a model; tuning after the `first` one leaves every zero as it was."""
    kind = _KIND_WORDS[stage["stage"]]
    if stage["stage"] == "finetune":
        return [_curve(stage, kind)]
    heading = f"{kind} with {(stage.get('method') or {}).get('name', 'a method')}"
    found = [_blocks(stage, heading), _linears(stage, heading) if first or stage["stage"] == "prune" else ""]
    return [section for section in found if section]


def _curve(stage: Mapping[str, Any], kind: str) -> str:
    """Return the loss of a training run by steps, and that of held-out data."""
    method = (stage.get("adapter") or {}).get("name", "all weights")
    points = []
    for series, (words, lines) in enumerate((("training", "losses"), ("held out", "evaluations"))):
        for place, line in enumerate(found := stage.get(lines) or ()):
            label = words if place == len(found) - 1 else ""
            step, loss = float(line["step"]), float(line["loss"])
            points.append(Point(step, loss, label, f"step {step:.0f}: {words} {number(loss, 4)}", series, words))
    chart_ = scatter(points, name="loss by steps", axis="step", show=lambda step: f"{step:.0f}")
    if not chart_:
        return ""
    return (
        f"<section><h2>{escape(kind)} with {escape(str(method))}</h2>"
        '<p class="why">Mean loss of a token; the scale is logarithmic.</p>'
        f"{chart(chart_)}</section>"
    )


def _blocks(stage: Mapping[str, Any], heading: str) -> str:
    """Return the reconstruction error of every block before and after tuning."""
    blocks = [block for block in stage.get("blocks") or () if block.get("error_after") is not None]
    if not blocks:
        return ""
    data, rows = [], []
    for block in blocks:
        scale = block.get("scale") or 1.0
        before, after = (block.get("error_before") or 0.0) / scale, block["error_after"] / scale
        data.append(Pair(str(block["index"]), before, after))
        gain = "-" if not before else percent(1 - after / before)
        notes = "; ".join(map(str, block.get("notes") or ()))
        rows.append(
            [
                str(block["index"]),
                number(before, 3),
                number(after, 3),
                gain,
                str(block.get("epochs") or "-"),
                duration(block.get("seconds") or 0.0),
                notes,
            ]
        )
    tuner = (stage.get("tuner") or stage.get("method") or {}).get("name", "the tuner")
    head = ["block", "before", "after", "gone", "epochs", "time", "notes"]
    dots = legend([("d1", f"before {tuner}"), ("c2", f"after {tuner}")])
    svg = pairs(data, name="reconstruction error of each block before and after tuning", axis="block")
    return (
        f"<section><h2>{escape(heading)}: error of each block</h2>"
        "<p class=\"why\">Mean squared error of a block's output against the dense block's, as a share of its "
        f"mean square; logarithmic.</p>{dots}{chart(svg)}{details('All blocks', head, rows, range(6))}</section>"
    )


def _linears(stage: Mapping[str, Any], heading: str) -> str:
    """Return sparsity and loss of every linear: two fields of cells, and a table."""
    layers = stage.get("layers") or ()
    if not layers:
        return ""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for layer in layers:
        groups.setdefault((_role(layer["name"]), int(layer["block"])), []).append(layer)
    losses = {key: _mean([layer.get("loss_after") for layer in group]) for key, group in groups.items()}
    zeros = {key: _mean([layer.get("sparsity") for layer in group]) for key, group in groups.items()}
    parts = [f"<section><h2>{escape(heading)}: linears</h2>"]
    if any(value is not None for value in losses.values()):
        parts.append(
            '<p class="why">Relative loss: what pruning changed in a linear\'s output on the calibration text, as a '
            "share of losing the linear altogether. The scale is logarithmic.</p>"
        )
        parts.append(_field(losses, "relative loss", logarithmic=True, show=lambda value: number(value, 3)))
    parts.append('<h3>Sparsity</h3><p class="why">Fraction of zeros.</p>')
    parts.append(_field(zeros, "sparsity", logarithmic=False, show=percent))
    head = ["linear", "shape", "pattern", "sparsity", "loss, same mask", "loss", "time", "notes"]
    rows = [
        [
            str(layer["name"]),
            " x ".join(map(str, layer.get("shape") or ())),
            str(layer.get("pattern") or "-"),
            percent(layer.get("sparsity")),
            number(layer.get("loss_before"), 3),
            number(layer.get("loss_after"), 3),
            duration(layer.get("seconds") or 0.0),
            "; ".join(map(str, layer.get("notes") or ())),
        ]
        for layer in layers
    ]
    return "".join(parts) + details(f"All {len(rows)} linears", head, rows, (3, 4, 5, 6)) + "</section>"


def _field(values: Mapping[tuple[str, int], float | None], what: str, *, logarithmic: bool, show: Any) -> str:
    shades = levels(values.values(), logarithmic=logarithmic)
    cells = [
        Cell(role, block, shade, f"{role}, block {block}: {what} {show(value)}")
        for ((role, block), value), shade in zip(values.items(), shades, strict=True)
    ]
    known = [value for value in values.values() if value is not None]
    if known and max(known) - min(known) < 5e-4 * abs(max(known)):
        return f"<p>{escape(show(max(known)))} in every linear.</p>"
    svg = chart(grid(cells, name=f"{what} by linear and block", axis="block"))
    squares = "".join(
        f'<svg viewBox="0 0 16 14"><rect class="h{k}" width="16" height="14"/></svg>' for k in range(SHADES)
    )
    ends = (show(min(known)), show(max(known))) if known else ("", "")
    return f'{svg}<p class="legend">{escape(ends[0])} <span class="ramp">{squares}</span> {escape(ends[1])}</p>'


def _cost(stages: Iterable[Mapping[str, Any]]) -> str:
    """Return time and memory of every stage."""
    times, memory, rows = [], [], []
    colours = {"prune": 1, "tune": 2, "finetune": 2, "evaluate": 0, "export": 3}
    for place, stage in enumerate(stages, start=1):
        kind = str(stage.get("stage"))
        subject = (
            stage.get("label")
            or (stage.get("method") or stage.get("adapter") or {}).get("name")
            or stage.get("format")
            or ""
        )
        label = f"{place}. {kind} {subject}".strip()
        seconds, peak, planned = stage.get("seconds"), stage.get("peak_memory_bytes"), stage.get("planned_memory_bytes")
        if seconds is not None:
            times.append(Bar(label, float(seconds), duration(seconds), colours.get(kind, 0)))
        if peak is not None:
            memory.append(Bar(label, float(peak), size(peak), colours.get(kind, 0)))
        rows.append(
            [label, "-" if seconds is None else duration(seconds)]
            + ["-" if value is None else size(value) for value in (peak, planned)]
        )
    if not times and not memory:
        return ""
    parts = ["<section><h2>Time and memory</h2>"]
    if times:
        parts += ["<h3>Time of each stage</h3>", bars(times, name="time of each stage")]
    if memory:
        parts += ["<h3>Peak memory so far</h3>", bars(memory, name="peak memory of each stage")]
    parts.append(details("As a table", ["stage", "time", "peak memory", "planned for the work"], rows, (1, 2, 3)))
    return "".join(parts) + "</section>"


def _samples(samples: Iterable[Mapping[str, Any]]) -> str:
    found = list(samples)
    if not found:
        return ""
    parts = ["<section><h2>What the models write</h2>"]
    for label in dict.fromkeys(str(sample.get("label", "")) for sample in found):
        parts.append(f"<h3>{escape(label)}</h3>")
        parts += [
            f"<blockquote>{escape(str(s.get('text', '')))}</blockquote>"
            for s in found
            if str(s.get("label", "")) == label
        ]
    return "".join(parts) + "</section>"


def _recipe(report: Mapping[str, Any]) -> str:
    parts = []
    if report.get("recipe"):
        parts.append(
            '<h2>Recipe</h2><p class="why">Every default written out; <code>secateur run</code> repeats it.</p>'
            f"<pre>{escape(to_yaml(json.loads(json.dumps(report['recipe'], default=str))))}</pre>"
        )
    outputs = [[str(name), str(path)] for name, path in (report.get("outputs") or {}).items()]
    if outputs:
        parts.append(f"<h3>Files</h3>{table(['what', 'where'], outputs, (), 'details-table')}")
    return f"<section>{''.join(parts)}</section>" if parts else ""


def _versions(report: Mapping[str, Any]) -> str:
    found = report.get("versions") or {}
    return escape(" · ".join(f"{name} {version}" for name, version in found.items())) or "secateur"


def _role(name: str) -> str:
    """Return what a linear is inside its block: its name after the block's number, experts taken together."""
    parts = str(name).split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    return re.sub(r"\.\d+\.", ".*.", ".".join(parts[first + 1 :]) or str(name))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
