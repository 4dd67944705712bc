"""Results for people to read on stdout: a few lines or a table, legible without colour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from secateur.core.quantities import duration, number, percent, size


def show(kind: str, found: Mapping[str, Any], stream: TextIO) -> None:
    """Write the result `found` of the command `kind` to `stream`."""
    if found.get("dry_run"):
        stream.write(_plan(found))
        return
    lines = _SHOWN[kind](found)
    stream.write("".join(f"{line}\n" for line in lines))


def printable(text: str) -> str:
    """Return `text` with characters that a terminal would act on written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Return `text` of several lines, each as `printable` gives it."""
    return "\n".join(printable(line) for line in text.splitlines())


def columns(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> list[str]:
    """Return a table as lines, columns aligned, those in `numeric` to the right."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[index]) for row in [list(head), *cells]) for index in range(len(head))]
    right = set(numeric)

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return [line(head), line(["-" * width for width in widths]), *map(line, cells)]


def facts(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Return `name  value` lines with the values aligned."""
    known = [(name, printable(value)) for name, value in pairs if value]
    width = max((len(name) for name, _ in known), default=0)
    return [f"{name.ljust(width)}  {value}" for name, value in known]


def method_words(method: Mapping[str, Any] | None) -> str:
    """Return `sparsegpt (damping=0.01, block_size=128)`."""
    if not method:
        return ""
    fields = ", ".join(
        f"{name}={method_words(value) if isinstance(value, Mapping) else value}"
        for name, value in method.items()
        if name != "name"
    )
    return f"{method.get('name')} ({fields})" if fields else str(method.get("name"))


def _sweep(found: Mapping[str, Any]) -> list[str]:
    layers, blocks = found.get("layers", []), found.get("blocks", [])
    losses = [layer["loss_after"] for layer in layers if layer.get("loss_after") is not None]
    tuned = [block for block in blocks if block.get("error_after") is not None]
    before, after = (sum(block[key] for block in tuned) for key in ("error_before", "error_after"))
    pruned = found.get("stage") == "prune"
    return facts(
        [
            ("model", str(found.get("model", ""))),
            ("method", method_words(found.get("method"))),
            ("tuner", method_words(found.get("tuner")) if pruned else ""),
            ("pattern", str(found.get("pattern", "")) if pruned else ""),
            ("plan", method_words(found.get("plan")) if pruned else ""),
            ("sparsity", f"{percent(found.get('sparsity'))} of {len(layers)} linears{_range(found)}"),
            ("layer loss", f"{number(sum(losses) / len(losses))} of the all-zero loss, mean" if losses else ""),
            (
                "block error",
                f"{number(before / len(tuned))} to {number(after / len(tuned))}, mean of {len(tuned)} blocks"
                if tuned
                else "",
            ),
            ("time", duration(found.get("seconds") or 0.0)),
            ("peak memory", size(found["peak_memory_bytes"]) if found.get("peak_memory_bytes") else ""),
            ("output", str(found.get("output") or "")),
        ]
    )


def _range(found: Mapping[str, Any]) -> str:
    """Return the least and the largest sparsity of the linears of a planned run."""
    values = [layer["sparsity"] for layer in found.get("layers", [])]
    return f", {percent(min(values))} to {percent(max(values))}" if values and found.get("plan") else ""


def _evaluate(found: Mapping[str, Any]) -> list[str]:
    tokens = found.get("tokens", {})
    rows = [
        (f"perplexity {text}", f"{number(value, 5)} ({tokens.get(text, 0):,} tokens)")
        for text, value in found.get("perplexity", {}).items()
    ]
    for task, metrics in found.get("tasks", {}).items():
        rows += [(f"{task} {name}", number(value)) for name, value in metrics.items() if isinstance(value, int | float)]
    rows += [("sparsity", percent(found.get("sparsity"))), ("time", duration(found.get("seconds") or 0.0))]
    return facts(rows)


def _inspect(found: Mapping[str, Any]) -> list[str]:
    linears, unknown = found.get("linears", []), found.get("unknown", [])
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    rows = [
        (line["name"], " x ".join(map(str, line["shape"])), percent(line["sparsity"]), str(line.get("pattern") or "-"))
        for line in linears
    ]
    pairs = [
        ("sparsity", f"{percent(found.get('sparsity'))} of {len(linears)} linears"),
        ("not counted", f"{unknown[0]}{more}, of a kind that cannot be pruned" if unknown else ""),
        ("dtype", str(found.get("dtype", ""))),
        ("size", size(found["bytes"]) if found.get("bytes") else ""),
    ]
    for name, saving in found.get("formats", {}).items():
        if "ratio" in saving:
            pairs.append((f"as {name}", f"{size(saving['bytes'])}, {percent(saving['ratio'])} of it"))
        else:
            pairs.append((f"as {name}", f"{saving['linears']} of {saving['of']} linears fit the kernels of GPUs"))
    return [*columns(("linear", "shape", "sparsity", "pattern"), rows, numeric=(1, 2)), "", *facts(pairs)]


def _said(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a method that say something."""
    return {name: value for name, value in method.items() if value is not None}


def _finetune(found: Mapping[str, Any]) -> list[str]:
    losses, tests = found.get("losses") or [], found.get("evaluations") or []
    pairs = [
        ("adapter", method_words(_said(found["adapter"])) if found.get("adapter") else "none, all weights"),
        (
            "trained",
            f"{found['trainable']:,} values, {percent(found['trainable_share'])}" if "trainable" in found else "",
        ),
        ("steps", str(found.get("steps_done") or "")),
        ("loss", f"{number(losses[0]['loss'], 4)} at first, {number(losses[-1]['loss'], 4)} at last" if losses else ""),
        ("held out", f"{number(tests[0]['loss'], 4)} before, {number(tests[-1]['loss'], 4)} after" if tests else ""),
        (
            "sparsity",
            f"{percent(found['sparsity'])}, {percent(found['sparsity_before'])} before" if "sparsity" in found else "",
        ),
        ("time", duration(found.get("seconds") or 0.0)),
        ("memory", size(found["peak_memory_bytes"]) if found.get("peak_memory_bytes") else ""),
        ("output", str(found.get("output") or "")),
    ]
    return facts(pairs)


def _export(found: Mapping[str, Any]) -> list[str]:
    return facts(
        [
            ("format", str(found.get("format", ""))),
            ("size", f"{size(found['bytes'])}, {percent(found['ratio'])} of the dense {size(found['dense_bytes'])}"),
            ("sparsity", percent(found.get("sparsity"))),
            ("output", str(found.get("output", ""))),
        ]
    )


def _merge(found: Mapping[str, Any]) -> list[str]:
    zeros, adapter = found["zero_pattern"], found.get("adapter")
    counts = ", ".join(f"{zeros[name]:,} {name}" for name in ("filled", "vanished") if zeros[name])
    switched = found.get("stage") == "switch"
    taken = (found.get("taken_out") or {}).get("name", "none") if switched else ""
    return facts(
        [
            ("model", str(found.get("model", ""))),
            ("taken out", str(taken)),
            ("adapter", f"{adapter['name']} ({adapter['method']}, {size(adapter['bytes'])})" if adapter else "none"),
            ("sparsity", f"{percent(found['sparsity_before'])} before, {percent(found['sparsity'])} after"),
            (
                "zero pattern",
                f"identical in {zeros['identical_linears']} of {zeros['linears']} linears"
                + (f": {counts}" if counts else ", to the last bit"),
            ),
            ("size", f"{size(found['bytes'])} in {found['dtype']}"),
            ("time", duration(found.get("seconds") or 0.0)),
            ("output", str(found.get("output") or "nothing was written; --output DIR publishes the model")),
        ]
    )


def _adapters(found: Mapping[str, Any]) -> list[str]:
    asked = found.get("model") is not None
    rows, notes = [], []
    for line in found["adapters"]:
        if "error" in line:
            rows.append((line["name"], "-", "-", "-", "-", "-", "-", *(["no"] if asked else [])))
            notes.append((line["name"], line["error"]))
            continue
        width = f"{line['lines']:,} lines" if line["lines"] is not None else f"r={line['rank']}"
        fits = "yes" if line["fits"] else "no"
        rows.append(
            (
                line["name"], line["method"], str(line["base"] or "-"), width, f"{line['linears']:,}",
                f"{line['parameters']:,}", size(line["bytes"]), *([fits] if asked else []),
            )
        )  # fmt: skip
        if line["why"]:
            notes.append((line["name"], line["why"]))
    head = ("name", "method", "base", "width", "linears", "parameters", "size", *(["fits"] if asked else []))
    return [*columns(head, rows, numeric=(3, 4, 5, 6)), *([""] if notes else []), *facts(notes)]


def _adapter(found: Mapping[str, Any]) -> list[str]:
    lines, rank = found.get("lines"), found.get("rank")
    parts = found.get("adapters", ())
    return facts(
        [
            ("sum of", " + ".join(f"{part['weight']:g} {part['name']}" for part in parts)),
            ("adapter", str(found["adapter"]["name"]) if "adapter" in found else ""),
            ("method", str(found["method"])),
            ("width", f"{lines:,} lines" if lines is not None else f"rank {rank} at most"),
            ("parameters", f"{found['parameters']:,}"),
            ("size", size(found["bytes"])),
            ("output", str(found["output"])),
        ]
    )


def _methods(found: Mapping[str, Any]) -> list[str]:
    rows = [
        (line["name"], line["kind"], line["patterns"], ", ".join(line["needs"]) or "nothing", line["paper"])
        for line in found["methods"]
    ]
    return [
        *columns(("name", "kind", "patterns", "needs", "paper"), rows),
        "",
        "secateur methods NAME shows the hyper-parameters",
    ]


def _method(found: Mapping[str, Any]) -> list[str]:
    missing = "none" if found["kind"] == "adapter" else "required"  # adapters can be built without any setting
    fields = [
        (
            f"  {name}",
            method_words(value) if isinstance(value, Mapping) else missing if value is None else str(value),
        )
        for name, value in found["fields"].items()
    ]
    head = [(name, ", ".join(found[name]) if name == "needs" else str(found[name])) for name in _METHOD_FACTS]
    return [*facts(head), "", "hyper-parameters and their defaults", *(facts(fields) or ["  none"])]


def _run(found: Mapping[str, Any]) -> list[str]:
    from secateur.recipe.headline import headline

    head, rows = headline(found)
    lines = columns(head, rows, numeric=range(1, len(head))) if rows else []
    for sample in found.get("samples", ()):
        lines += ["", f"{printable(str(sample['label']))}:", f"  {printable(str(sample['text']))}"]
    outputs = [(str(name), str(path)) for name, path in found.get("outputs", {}).items()]
    return [*lines, *([""] if lines and outputs else []), *facts(outputs)]


def _compare(found: Mapping[str, Any]) -> list[str]:
    from secateur.recipe.compare_table import numeric, table

    head, rows = table(found)
    lines = columns(head, rows, numeric=numeric(head))
    if found.get("statistics") == "shared":
        lines += ["", "statistics: shared, which is not what `secateur prune` does"]
    outputs = [(str(name), str(path)) for name, path in found.get("outputs", {}).items()]
    return [*lines, "", *facts(outputs)]


def _suggest(found: Mapping[str, Any]) -> list[str]:
    rows = []
    for choice in found["choices"]:
        seconds = "-" if choice["seconds"] is None else duration(choice["seconds"])
        rows.append((choice["label"], f"{choice['samples']} x {choice['length']}", seconds, choice["why"] or "fits"))
    lines = columns(("option, best first", "calibration", "expected", "verdict"), rows, numeric=(1, 2))
    lines += ["", printable_lines(found["yaml"])]
    if found.get("output"):
        command = f"secateur run {found['output']} --output DIR"
        lines += ["", *facts([("recipe", str(found["output"])), ("to run it", command)])]
    return lines


def _plan(found: Mapping[str, Any]) -> str:
    from secateur.recipe.yaml_writer import to_yaml

    lines = ["nothing was done (dry run)"]
    if memory := found.get("memory_plan"):
        lines += facts(
            [("needs", size(found.get("planned_memory_bytes") or 0)), *((f"  {k}", size(v)) for k, v in memory.items())]
        )
    if "linears" in found:
        lines.append(f"{found['linears']} linears")
    plain = found.get("recipe") or found.get("arguments") or {}
    return "\n".join([*lines, "", to_yaml(plain)])


_METHOD_FACTS = ("name", "kind", "summary", "paper", "patterns", "needs")
_SHOWN = {
    "prune": _sweep,
    "tune": _sweep,
    "finetune": _finetune,
    "evaluate": _evaluate,
    "inspect": _inspect,
    "export": _export,
    "methods": _methods,
    "method": _method,
    "run": _run,
    "compare": _compare,
    "suggest": _suggest,
    "merge": _merge,
    "switch": _merge,
    "adapters": _adapters,
    "fuse": _adapter,
    "adapter": _adapter,
}
