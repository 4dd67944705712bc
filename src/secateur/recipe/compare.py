"""One table that compares methods, planners, tuners and patterns on the same model with the same texts.

A row is what `prune` and `evaluate` give with the same settings. With `statistics="shared"` all rows are solved on the
statistics of one traversal of the dense model instead, see `engine/shared.py`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import RecipeError, SecateurError, StateError
from secateur.core.pattern import Pattern, parse_pattern
from secateur.core.progress import Progress, Silent, step
from secateur.core.quantities import duration
from secateur.core.quantities import number as shown
from secateur.core.versions import versions
from secateur.data.calibration import Calibration
from secateur.data.text import load_text, tokenise
from secateur.engine.activations import Offload
from secateur.engine.memory import forget_peak, peak_memory
from secateur.engine.stream import return_free_memory
from secateur.engine.sweep import Fallback, Nonfinite
from secateur.evaluate.perplexity import perplexity as measure
from secateur.models.linears import sparsity
from secateur.recipe import stages
from secateur.recipe.build import build_method
from secateur.recipe.compare_folder import CompareFolder, refuse_foreign
from secateur.recipe.compare_page import render
from secateur.recipe.compare_shared import Solved
from secateur.recipe.compare_table import to_csv, to_markdown
from secateur.recipe.comparison import NO_TUNER, UNIFORM, Row, Statistics, rows, spelled_out
from secateur.recipe.job import Job
from secateur.recipe.opening import modes_back
from secateur.recipe.report import finite, write_text

Methods = str | Mapping[str, Any] | object


@modes_back()
def compare(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    methods: Methods | Sequence[Methods],
    pattern: str | float | Pattern | Sequence[str | float | Pattern] = "50%",
    tuner: Methods | Sequence[Methods | None] | None = None,
    plan: Methods | Sequence[Methods | None] | None = None,
    perplexity: str | Path | Sequence[str | Path],
    window: int = 1024,
    limit: int | None = None,
    lines: bool = False,
    batch_size: int | None = None,
    statistics: Statistics = "own",
    calibration: stages.CalibrationData | None = None,
    samples: int = 128,
    length: int = 2048,
    refit: bool = False,
    sequential: bool = True,
    error_correction: bool = False,
    guard: bool = True,
    freeze_zeros: bool = False,
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    overrides: Mapping[str, str | float | Pattern | None] | None = None,
    nonfinite: Nonfinite = "error",
    fallback: Fallback = "error",
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: Offload = "ram",
    batch_tokens: int = 8192,
    field: str = "text",
    skip_bad: int = 0,
    memory_limit: int | None = None,
    output: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    keep_models: bool = False,
    strict: bool = False,
    title: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prune and measure a model in every way that is asked for, and return the table.

    The rows are the dense model and every combination of `methods`, `plan`, `tuner` and `pattern`. A row that fails
    holds its error, and the others go on. Nothing is written outside `output`.

    Args:
        model: what `load` takes, or a live `transformers` causal language model, which is not changed.
        tokenizer: of a live model.
        methods: pruners: names, mappings with a `name`, or objects; one or several; `all` is every one of the shelf that
            is not named beside it.
        pattern: one or several, see `prune`.
        tuner: block tuners; `none` or None tunes nothing.
        plan: planners that give each linear a pattern of its own; `uniform` or None gives all of them the same.
        perplexity: texts to measure on, one or several.
        window: tokens of a window of these texts (the `length` of `evaluate`).
        limit: windows of each text at most.
        lines: see `evaluate`.
        batch_size: see `evaluate`.
        statistics: `own` calibrates every row on what is pruned before each linear, so that it equals `prune`;
            `shared` solves all rows on the statistics of one traversal of the dense model, much faster.
        output: folder of the table, its report, and the state of an unfinished comparison.
        resume: keep the finished rows of an earlier comparison of the same settings, and go on; failed rows are done
            again, and more methods, plans, tuners or patterns than before are welcome.
        overwrite: replace an earlier comparison.
        keep_models: keep the pruned model of every row in `output`.
        strict: raise the error of the first row that fails, and treat warnings of `prune` as errors, also those
            of the calibration text, before the first row.
        title: heading of the report.
        calibration, samples, length, refit, sequential, error_correction, guard, freeze_zeros, ignore, include, overrides,
            nonfinite, fallback, seed, device, dtype, offload, batch_tokens, field, skip_bad, memory_limit, allow_pickle,
            trust_remote_code, revision, progress: as in `prune`, the same for all rows.

    Returns:
        `{"rows": [{"method", "plan", "tuner", "pattern", "sparsity", "perplexity": {text: value}, "seconds",
        "peak_memory_bytes", ...}], "failed": number of rows with an `error`, ...}`.

    Raises:
        RecipeError: if an argument is wrong, before anything starts.
        StateError: if `output` holds something else, or a comparison of other settings.
        SecateurError: of the first failing row, if `strict`.
    """
    given = dict(locals())
    texts = [str(text) for text in _several(perplexity)]
    if not texts:
        raise RecipeError(
            "`perplexity` is missing: a comparison measures its rows", hint="name a text with --perplexity"
        )
    pruners = [build_method(spec, "pruner", where="methods") for spec in spelled_out(methods)]
    tuners = [_built(spec, NO_TUNER, "block tuner", "tuner") for spec in _several(tuner)]
    planners = [_built(spec, UNIFORM, "planner", "plan") for spec in _several(plan)]
    patterns = [str(parse_pattern(text)) for text in _several(pattern)]
    if statistics not in ("own", "shared"):
        raise RecipeError(f"`statistics` is `{statistics}`, but must be `own` or `shared`")
    if statistics == "shared":
        _refuse_unshared(error_correction, include, nonfinite)
    wanted = rows(pruners, planners, tuners, patterns)
    looking = refit or error_correction or any(made.needs for made in pruners)
    if calibration is None and (looking or any(made is not None for made in (*tuners, *planners))):
        raise RecipeError(
            "`calibration` is missing: some of the methods look at data", hint="for example --calibration wikitext2"
        )
    refuse_foreign(Path(output), resume=resume, overwrite=overwrite)
    return Comparing(given, wanted, texts).run()


class Comparing:
    """One comparison under way."""

    def __init__(self, given: dict[str, Any], wanted: Sequence[Row], texts: Sequence[str]) -> None:
        self.given = given
        self.rows = wanted
        self.show: Progress = given["progress"] or Silent()
        job = Job("compare", given["model"], given["tokenizer"], None, {**given, "output": None, "inplace": True})
        self.device = job.device
        self.spec = job.spec
        self.live: nn.Module | None = job.model if job.source is None else None
        self.tokenizer = job.tokenizer
        self.data: Calibration | None = None if given["calibration"] is None else job.calibration(needed=True)
        job.warnings += () if self.data is None else self.data.notes
        job.refuse_warnings()
        self.ids: dict[str, Tensor] = {}
        self.notes: list[str] = job.warnings
        for spec in texts:
            text = load_text(
                spec, field=given["field"], skip_bad=given["skip_bad"], lines=given["lines"], role="evaluation"
            )
            self.notes += text.notes
            self.ids[spec] = tokenise(text, job.need_tokenizer("measure perplexity"))
        self.common = self.identity(job)

    def identity(self, job: Job) -> dict[str, Any]:
        """Return what decides every row alike, as plain data."""
        given = self.given
        names = (
            "window limit lines statistics refit sequential error_correction guard freeze_zeros nonfinite fallback seed "
            "batch_tokens"
        )
        data = self.data
        return {
            "model": job.identity(),
            "dtype": str(next(job.model.parameters()).dtype).removeprefix("torch."),
            "device": self.device.type,
            "calibration": None
            if data is None
            else {"source": data.source, "samples": data.samples, "length": data.length, "digest": data.digest},
            "texts": {
                spec: {"tokens": ids.numel(), "digest": hashlib.sha256(ids.numpy().tobytes()).hexdigest()}
                for spec, ids in self.ids.items()
            },
            **{name: given[name] for name in names.split()},
            "ignore": list(given["ignore"]),
            "include": list(given["include"]),
            "overrides": {
                name: None if wanted is None else str(wanted) for name, wanted in (given["overrides"] or {}).items()
            },
            "keep_models": given["keep_models"],
            "versions": versions(),
        }

    def run(self) -> dict[str, Any]:
        """Do every row that is not there yet, and return the report."""
        given = self.given
        opened = CompareFolder.opened(
            Path(given["output"]), self.common, self.rows, resume=given["resume"], overwrite=given["overwrite"]
        )
        with opened as folder, ExitStack() as journals, step(self.show, "comparing", len(self.rows)) as number:
            done: dict[int, dict[str, Any]] = {}
            for place, row in enumerate(self.rows):
                if known := folder.finished.get(folder.key(row.settings())):
                    done[place] = known
            if done:
                self.show.note(f"{len(done)} of {len(self.rows)} rows are there already")
                self.show.advance(number, len(done))
            solved = Solved(self, folder, journals)
            if given["statistics"] == "shared":
                solved.solve(
                    [row for place, row in enumerate(self.rows) if place not in done and row.method is not None]
                )
            for place, row in enumerate(self.rows):
                if place not in done:
                    done[place] = self.row(row, folder, solved)
                    folder.add(row, done[place])
                    self.show.note(f"row {place + 1} of {len(self.rows)}: {_summary(row, done[place])}")
                    self.write(folder, done)
                    self.show.advance(number, 1)
            report = self.write(folder, done)
            journals.close()
            folder.end()
        return report

    def row(self, row: Row, folder: CompareFolder, solved: Solved) -> dict[str, Any]:
        """Make and measure the model of one row; an error is part of the answer unless asked otherwise."""
        method, plan, tuner = row.names
        record: dict[str, Any] = {
            "method": method,
            "plan": plan,
            "tuner": tuner,
            "pattern": row.pattern,
            "sparsity": None,
            "perplexity": {},
            "seconds": None,
            "peak_memory_bytes": None,
            "tokens": {},
            "evaluation_seconds": None,
            "layer_loss": None,
            "settings": row.settings(),
            "model": None,
            "warnings": [],
            "error": None,
            "error_kind": None,
        }
        return_free_memory()
        forget_peak(self.device)
        try:
            model = self.model_of(row, record, folder, solved)
            self.measure(model, record)
        except StateError:
            raise
        except Exception as error:  # the other rows go on, whatever a method does
            if self.given["strict"]:
                raise
            record |= failure(error)
        return record

    def model_of(self, row: Row, record: dict[str, Any], folder: CompareFolder, solved: Solved) -> nn.Module:
        """Return the model of a row, and note what making it took."""
        if row.method is None:
            record["seconds"] = 0.0
            return self.dense()
        if self.given["statistics"] == "shared":
            return solved.model_of(row, record)
        names = (
            "refit sequential error_correction guard freeze_zeros ignore include overrides nonfinite fallback seed device "
            "offload batch_tokens memory_limit strict progress"
        )
        arguments: dict[str, Any] = {name: self.given[name] for name in names.split()}
        if row.plan is not None:
            arguments |= {"plan": row.plan, "plans": folder.plans}
        made: dict[str, Any] | None = None
        if self.given["keep_models"]:
            made = folder.made(row)
            arguments |= {"output": folder.model(row), "overwrite": True}
            record["model"] = str(folder.model(row))
        else:
            arguments["state"] = folder.state(row.settings())
        result = stages.prune(
            self.live if self.live is not None else self.given["model"],
            self.tokenizer if self.live is not None else None,
            method=row.method,
            pattern=str(row.pattern),
            tuner=row.tuner,
            calibration=self.data if self.looks(row) else None,
            resume=True,
            **arguments,
            **({} if self.live is not None else self.loading()),
        )
        if made is None or result.report["blocks"]:  # else it was found complete, and its report knows no losses
            made = _made(result.report)
            if self.given["keep_models"]:
                folder.note(row, made)
        record |= made
        return result.model

    def looks(self, row: Row) -> bool:
        """Whether a row looks at the calibration text at all."""
        asked = (self.given["refit"], self.given["error_correction"], row.tuner is not None, row.plan is not None)
        return any(asked) or bool(row.method.needs)

    def measure(self, model: nn.Module, record: dict[str, Any]) -> None:
        """Measure a model as `evaluate` does, on texts that are tokenised once for all rows."""
        started = time.perf_counter()
        record["sparsity"] = sparsity(model)
        for spec, ids in self.ids.items():
            found = measure(
                model,
                ids,
                length=self.given["window"],
                limit=self.given["limit"],
                batch_size=self.given["batch_size"],
                device=self.device,
                progress=self.show,
            )
            record["perplexity"][spec], record["tokens"][spec] = found.value, found.tokens
        if record["peak_memory_bytes"] is None:
            record["peak_memory_bytes"] = peak_memory(self.device)
        record["evaluation_seconds"] = time.perf_counter() - started

    def dense(self) -> nn.Module:
        """Return the dense model: the live one itself, or mapped from its files anew, which costs no memory."""
        if self.live is not None:
            return self.live
        loaded = stages.load(self.given["model"], tokenizer=False, progress=self.show, **self.loading())
        model: nn.Module = loaded.model
        return model.eval()

    def loading(self) -> dict[str, Any]:
        """Return how the model is opened."""
        return {name: self.given[name] for name in ("dtype", "allow_pickle", "trust_remote_code", "revision")}

    def write(self, folder: CompareFolder, done: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """Write the table as it is so far, and return it."""
        ordered = [{k: v for k, v in done[place].items() if k != "key"} for place in sorted(done)]
        files = {name: str(folder.path / f"report.{name}") for name in ("html", "md", "json")}
        report: dict[str, Any] = {
            "stage": "compare",
            "title": self.given["title"] or f"Comparison on {self.spec}",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": self.spec,
            "statistics": self.given["statistics"],
            "rows": ordered,
            "unfinished": len(self.rows) - len(done),
            "failed": sum(row["error"] is not None for row in ordered),
            "settings": {name: value for name, value in self.common.items() if name != "versions"},
            "versions": self.common["versions"],
            "warnings": self.notes,
            "outputs": {"report": files["html"], "table": str(folder.path / "rows.csv")},
        }
        plain: dict[str, Any] = json.loads(json.dumps(finite(report), default=str))
        write_text(folder.path / "report.json", json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
        write_text(folder.path / "report.html", render(plain))
        write_text(folder.path / "report.md", to_markdown(plain))
        write_text(folder.path / "rows.csv", to_csv(plain))
        return plain


def _made(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row says of making its model, from the report of `prune`."""
    losses = [layer["loss_after"] for layer in report["layers"] if layer["loss_after"] is not None]
    planned = report.get("planned") or {}
    return {
        # what a plan took counts in every row that it serves
        "seconds": report["seconds"] + (planned["seconds"] if planned.get("again") else 0.0),
        "peak_memory_bytes": report["peak_memory_bytes"],
        "layer_loss": sum(losses) / len(losses) if losses else None,
        "warnings": list(report["warnings"]),
    }


def failure(error: Exception) -> dict[str, str]:
    """Return what a row says of its error: one line, the hint, and the kind."""
    if isinstance(error, SecateurError):
        words = " ".join(str(error).split())
        places = [note for note in getattr(error, "__notes__", ()) if note.startswith("in block")]
        return {
            "error": "; ".join([words, *places]) + (f" (hint: {error.hint})" if error.hint else ""),
            "error_kind": type(error).__name__,
        }
    kind = type(error).__name__
    return {"error": f"unexpected {kind}: {' '.join(str(error).split())[:300] or 'no message'}", "error_kind": kind}


def _summary(row: Row, record: Mapping[str, Any]) -> str:
    """Return one line that says how a row came out."""
    if record["error"] is not None:
        return f"{row.label}: failed: {record['error']}"
    values = ", ".join(shown(value, 4) for value in record["perplexity"].values())
    return f"{row.label}: perplexity {values} in {duration(record['seconds'])}"


def _several(given: Any) -> list[Any]:
    """Return a list of what may be one thing or a sequence of them."""
    return list(given) if isinstance(given, list | tuple) else [given]


def _refuse_unshared(error_correction: bool, include: Sequence[str], nonfinite: str) -> None:
    """Refuse what a walk through the dense model alone cannot do."""
    reasons = {
        "`error_correction` compares the pruned with the dense path": error_correction,
        "`include` prunes what stands behind the pruned blocks": bool(include),
        f"`nonfinite: {nonfinite}` changes the model or its batches on the way": nonfinite != "error",
    }
    for reason, asked in reasons.items():
        if asked:
            raise RecipeError(
                f"{reason}, and shared statistics are those of the dense model alone",
                hint="leave it out, or use --statistics own",
            )


def _built(spec: Any, nothing: str, kind: Any, where: str) -> Any:
    return None if spec is None or spec == nothing else build_method(spec, kind, where=where)
