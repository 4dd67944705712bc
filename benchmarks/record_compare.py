"""Keep the rows of comparisons: the parts of `report.json` that a table of results shows, one JSON line per row.

A row that is there already, of the same method, plan, tuner, pattern and settings, is replaced.

    python benchmarks/record_compare.py DIR/report.json ... --out benchmarks/results/compare-own-smollm2.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from secateur.methods.registry import REGISTRY
from secateur.recipe.build import fields_of

KEPT = ("method", "plan", "tuner", "pattern", "sparsity", "perplexity", "seconds", "peak_memory_bytes", "layer_loss")


def changed(spec: dict[str, Any] | None) -> dict[str, Any]:
    """Return the fields of a method that are not its defaults."""
    if not spec:
        return {}
    usual = fields_of(REGISTRY.find(spec["name"]))
    return {name: value for name, value in spec.items() if name != "name" and value != usual.get(name)}


def line_of(row: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Return what is kept of a row."""
    found = {name: row[name] for name in KEPT}
    found["perplexity"] = {Path(text).name: value for text, value in row["perplexity"].items()}
    found["refit"] = report["settings"]["refit"]
    found["changed"] = {kind: changed(row["settings"][kind]) for kind in ("method", "plan", "tuner")}
    return found


def key(line: dict[str, Any]) -> str:
    """Return what tells a row from others."""
    names = ("method", "plan", "tuner", "pattern", "refit", "changed")
    return json.dumps([line.get(name) for name in names], sort_keys=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    known = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    lines = {key(line): line for line in known}
    for path in given.reports:
        report = json.loads(path.read_text())
        for row in report["rows"]:
            if row["error"] is None:
                line = line_of(row, report)
                lines[key(line)] = line
                print(json.dumps(line))
    given.out.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))


if __name__ == "__main__":
    main()
