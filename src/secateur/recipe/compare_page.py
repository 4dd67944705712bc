"""The report of a comparison as one HTML file that needs nothing else: the table, and perplexity against time and zeros."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from secateur.core.pattern import NM, parse_pattern
from secateur.core.quantities import duration, number, percent
from secateur.recipe.compare_table import about, numeric, texts
from secateur.recipe.compare_table import table as cells
from secateur.recipe.comparison import DENSE, NO_TUNER, UNIFORM
from secateur.recipe.markup import chart, details, document, table
from secateur.recipe.scatter import Point, scatter, swatch
from secateur.recipe.yaml_writer import to_yaml

WIDE = 8.0  # times between the shortest and the longest row beyond which time is drawn on a logarithmic scale


def render(report: Mapping[str, Any]) -> str:
    """Return the report of `compare` as an HTML page."""
    title = str(report.get("title") or "Comparison")
    made = [row for row in report.get("rows", ()) if row.get("method") != DENSE]
    series = {name: place for place, name in enumerate(dict.fromkeys(_way(row) for row in made))}
    sections = [_table(report), _failures(report)]
    for text in texts(report):
        sections += [_against_time(report, text, series), _against_sparsity(report, text, series)]
    sections.append(_settings(report))
    words = [f"<code>{escape(str(report.get('model') or ''))}</code>"]
    if report.get("created"):
        words.append(escape(str(report["created"])[:19].replace("T", " ")))
    versions = report.get("versions") or {}
    footer = escape(" · ".join(f"{name} {version}" for name, version in versions.items())) or "secateur"
    return document(title, " · ".join(words), sections, footer)


def _way(row: Mapping[str, Any]) -> str:
    """Return method, plan and tuner of a row: what looks alike in the charts."""
    words = str(row.get("method"))
    words += f", {row['plan']}" if row.get("plan") not in (None, UNIFORM) else ""
    return words + (f" + {row['tuner']}" if row.get("tuner") not in (None, NO_TUNER) else "")


def _table(report: Mapping[str, Any]) -> str:
    head, rows = cells(report)
    if "error" in head:
        place = head.index("error")
        head = head[:place]
        rows = [[*row[:place]] if not row[place] else [f"{row[0]} (failed)", *row[1:place]] for row in rows]
    words = escape(about(report)).replace("`secateur prune`", "<code>secateur prune</code>")
    for command in ("evaluate", "tune"):
        words = words.replace(f"`secateur {command}`", f"<code>secateur {command}</code>")
    return (
        f'<section><h2>All rows</h2><p class="why">{words}</p>{table(head, rows, numeric(head), "headline")}</section>'
    )


def _failures(report: Mapping[str, Any]) -> str:
    lines = [
        f"<li><b>{escape(_way(row))}, {escape(str(row.get('pattern') or DENSE))}</b>: {escape(str(row['error']))}</li>"
        for row in report.get("rows", ())
        if row.get("error")
    ]
    return f'<section class="warnings"><h2>Rows that failed</h2><ul>{"".join(lines)}</ul></section>' if lines else ""


def _measured(report: Mapping[str, Any], text: str) -> tuple[list[Mapping[str, Any]], tuple[float, str] | None]:
    """Return the pruned rows that have a perplexity on `text`, and the dense model's as a line to compare with."""
    rows = [row for row in report.get("rows", ()) if (row.get("perplexity") or {}).get(text) is not None]
    dense = next((row["perplexity"][text] for row in rows if row.get("method") == DENSE), None)
    return [row for row in rows if row.get("method") != DENSE], None if dense is None else (dense, DENSE)


def _against_time(report: Mapping[str, Any], text: str, series: Mapping[str, int]) -> str:
    """Return one chart for each pattern: what a minute more buys."""
    rows, reference = _measured(report, text)
    parts = []
    for pattern in dict.fromkeys(str(row.get("pattern")) for row in rows):
        points = [
            Point(row["seconds"], row["perplexity"][text], _way(row), _words(row, text), series[_way(row)])
            for row in rows
            if str(row.get("pattern")) == pattern and row.get("seconds") is not None
        ]
        times = [point.x for point in points if point.x > 0]
        drawn = scatter(
            points,
            name=f"perplexity on {text} against seconds at {pattern}",
            axis="time to prune and tune",
            show=duration,
            logarithmic=len(times) == len(points) > 0 and max(times) > WIDE * min(times),
            reference=reference,
        )
        parts.append(f"<h3>{escape(pattern)}</h3>{chart(drawn)}" if drawn else "")
    if not any(parts):
        return ""
    return (
        f"<section><h2>Perplexity against time</h2>{_on(report, text)}"
        '<p class="why">Less is better in both directions: what lies furthest down on the left. Perplexity is on a '
        f"logarithmic scale.</p>{''.join(parts)}</section>"
    )


def _against_sparsity(report: Mapping[str, Any], text: str, series: Mapping[str, int]) -> str:
    """Return perplexity over the fraction of zeros; unstructured patterns of one way are joined."""
    rows, reference = _measured(report, text)
    points = [
        Point(
            row["sparsity"],
            row["perplexity"][text],
            str(row.get("pattern")) if _structured(row) else "",
            _words(row, text),
            series[_way(row)],
            None if _structured(row) else _way(row),
        )
        for row in rows
        if row.get("sparsity") is not None
    ]
    drawn = scatter(
        points,
        name=f"perplexity on {text} against sparsity",
        axis="zeros in the linears",
        show=percent,
        reference=reference,
    )
    if not drawn:
        return ""
    present = dict.fromkeys(_way(row) for row in rows)
    items = "".join(f"<span>{swatch(series[way])}{escape(way)}</span>" for way in present)
    return (
        f"<section><h2>Perplexity against sparsity</h2>{_on(report, text)}"
        '<p class="why">Unstructured patterns of one method are joined; marks with a name are N:M patterns.</p>'
        f'<p class="legend swatch">{items}</p>{chart(drawn)}</section>'
    )


def _on(report: Mapping[str, Any], text: str) -> str:
    return f'<p class="meta">on <code>{escape(text)}</code></p>'


def _words(row: Mapping[str, Any], text: str) -> str:
    seconds = row.get("seconds")
    return (
        f"{_way(row)}, {row.get('pattern')}: perplexity {number(row['perplexity'][text], 4)}, {percent(row.get('sparsity'))} "
        f"zeros{'' if seconds is None else f', {duration(seconds)}'}"
    )


def _structured(row: Mapping[str, Any]) -> bool:
    return isinstance(parse_pattern(str(row.get("pattern"))), NM)


def _settings(report: Mapping[str, Any]) -> str:
    parts = ["<section><h2>Settings</h2>"]
    if common := report.get("settings"):
        parts.append(
            '<p class="why">What all rows have in common; the hyper-parameters of each row are in '
            f"<code>report.json</code>.</p><pre>{escape(to_yaml(json.loads(json.dumps(common, default=str))))}</pre>"
        )
    lines: list[Sequence[str]] = [
        [_way(row), str(row.get("pattern") or DENSE), str(words)]
        for row in report.get("rows", ())
        for words in row.get("warnings") or ()
    ]
    if lines:
        parts.append(details("Warnings", ["row", "pattern", "warning"], lines, ()))
    files = [[str(name), str(path)] for name, path in (report.get("outputs") or {}).items()]
    if files:
        parts.append(f"<h3>Files</h3>{table(['what', 'where'], files, (), 'details-table')}")
    return "".join(parts) + "</section>"
