"""Write the report of a run: one HTML page for people, Markdown for terminals and notes, JSON for programs.

A report is plain data:

    {"title", "created", "recipe": resolved recipe or None, "versions": {package: version},
     "stages": [what each stage returned, in order], "samples": [{"label", "text"}], "outputs": {what: path}}
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.core.errors import ResourceError
from secateur.recipe.headline import headline
from secateur.recipe.page import render
from secateur.recipe.yaml_writer import to_yaml


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write `report.json`, `report.html` and `report.md` into `folder`, each in one step.

    Args:
        report: the report of a run, plain data; NaN and infinities become null in the JSON.
        folder: where to, made if it is not there.

    Raises:
        ResourceError: if a file cannot be written.
    """
    plain = json.loads(json.dumps(finite(report), default=str))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "report.json", json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
        write_text(folder / "report.html", render(plain))
        write_text(folder / "report.md", markdown(plain))
    except OSError as error:
        raise ResourceError(f"the report in `{folder}` cannot be written: {error.strerror}") from error


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown: the headline table, warnings, samples, the recipe."""
    head, rows = headline(report)
    lines = [f"# {inline(report.get('title') or 'Pruning report')}", ""]
    if rows:
        lines += [line_of(head), line_of(["---", *["---:"] * (len(head) - 1)]), *map(line_of, rows), ""]
    warnings = dict.fromkeys(str(words) for stage in report.get("stages", ()) for words in stage.get("warnings") or ())
    if warnings:
        lines += ["## Warnings", "", *(f"- {inline(words)}" for words in warnings), ""]
    if samples := report.get("samples"):
        lines += ["## What the models write", ""]
        for sample in samples:
            text = "\n> ".join(inline(line) for line in str(sample.get("text", "")).splitlines() or [""])
            lines += [f"**{inline(sample.get('label', ''))}**", "", f"> {text}", ""]
    if recipe := report.get("recipe"):
        lines += ["## Recipe", "", *(f"    {line}" for line in to_yaml(recipe).splitlines()), ""]
    if outputs := report.get("outputs"):
        lines += ["## Files", "", *(f"- {inline(name)}: {inline(path)}" for name, path in outputs.items()), ""]
    versions = report.get("versions") or {}
    return "\n".join([*lines, ", ".join(f"{inline(k)} {inline(v)}" for k, v in versions.items())]).rstrip() + "\n"


def line_of(cells: list[str]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(inline(cell) if set(cell) - set('-:') else cell for cell in cells)} |"


def inline(text: Any) -> str:
    """Return `text` on one line with everything escaped that Markdown or HTML would act on."""
    flat = " ".join(str(text).split())
    return "".join({"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(c, f"\\{c}" if c in "\\`*_[]|#!" else c) for c in flat)


def finite(value: Any) -> Any:
    """Return plain data with NaN and infinities as None, which JSON can say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: it is there as a whole or as it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
