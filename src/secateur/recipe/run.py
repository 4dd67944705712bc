"""A recipe, run: one folder that holds the resolved recipe, each stage's result, and the report.

    recipe.yaml     the resolved recipe, every default written out
    stages.json     which stages are done, and their reports
    1-prune/        the model as a stage left it
    report.html     what happened, with plots; report.json and report.md say the same

A stage takes the model from the folder of the last stage that made one, so a resumed run sees what an uninterrupted one
saw.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from secateur.core.errors import ResourceError, StateError
from secateur.core.faults import hit
from secateur.core.progress import Progress, Silent
from secateur.core.versions import versions
from secateur.data.text import Text, load_text, overlap
from secateur.recipe import stages
from secateur.recipe.headline import MAKES_MODEL
from secateur.recipe.report import write_report
from secateur.recipe.schema import Recipe, Step

DONE = "stages.json"
SEEN = 0.01  # of an evaluation text may stand in the calibration text before it is worth a warning


def run(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    samples: list[dict[str, str]] | None = None,
) -> dict[str, Any]:
    """Run every stage of `recipe` in the folder `output` and return the report of the run.

    Args:
        recipe: what to do.
        output: run folder; a new one, or an earlier one with `resume` or `overwrite`.
        resume: go on after the last finished stage (and, inside a stage, after its last finished block).
        overwrite: delete an earlier run in `output` first.
        progress: shown every step.
        samples: generated texts to show in the report, `{"label", "text"}`.

    Returns:
        `{"title", "created", "recipe", "versions", "stages", "samples", "outputs"}`, also written as `report.json`.

    Raises:
        StateError: if `output` holds something else, another recipe's run, or a run under way.
        SecateurError: of a stage; finished stages are kept.
    """
    recipe.check()
    show = progress or Silent()
    resolved = recipe.resolved()
    with _run_folder(output, recipe.digest(), resolved, resume, overwrite):
        recipe.save(output / "recipe.yaml")
        done: list[dict[str, Any]] = _read(output / DONE).get("stages", [])
        for number, step in enumerate(recipe.steps()):
            if number < len(done):
                continue
            show.note(f"stage {number + 1} of {len(recipe.stages)}: {step.kind}")
            hit("run.stage")
            done.append(_run_stage(recipe, step, number, done, output, show))
            _write(output / DONE, {"digest": recipe.digest(), "recipe": resolved, "stages": done})
        report = {
            "title": recipe.title or f"{recipe.model}",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "recipe": resolved,
            "versions": versions(),
            "stages": done,
            "samples": samples or [],
            "outputs": _outputs(done, output),
        }
        write_report(report, output)
    return report


def model_after(done: list[dict[str, Any]], recipe: Recipe) -> str:
    """Return the model as the finished stages left it: a stage's folder, or the recipe's own."""
    made = [stage["output"] for stage in done if stage["stage"] in MAKES_MODEL]
    return made[-1] if made else recipe.model


def _run_stage(
    recipe: Recipe, step: Step, number: int, done: list[dict[str, Any]], output: Path, show: Progress
) -> dict[str, Any]:
    """Run one stage and return its report."""
    arguments: dict[str, Any] = dict(step.arguments)
    model = model_after(done, recipe)
    if model == recipe.model:
        arguments |= recipe.loading()
    folder = output / f"{number + 1}-{step.kind}"
    if step.kind in MAKES_MODEL:
        if step.kind == "tune" and arguments.get("teacher") is None:
            arguments["teacher"] = recipe.model
        # a stage that was published but not yet written down is done again: its folder may be replaced
        report = getattr(stages, step.kind)(
            model, output=folder, resume=True, overwrite=True, progress=show, **arguments
        ).report
        return dict(report)
    if step.kind == "export":
        return stages.export(model, output=folder, overwrite=True, **arguments)
    report = stages.evaluate(
        model, progress=show, **{"label": _label(done), **{k: v for k, v in arguments.items() if v is not None}}
    )
    report["warnings"] += _seen_before(recipe, arguments)
    return report


def _seen_before(recipe: Recipe, evaluation: dict[str, Any]) -> list[str]:
    """Return a warning for every evaluation text of which a part stands in a calibration text of the recipe."""
    found: list[str] = []
    loaded: dict[tuple[str, str, str], Text] = {}

    def text(spec: str, field: str, role: Literal["calibration", "evaluation"], skip_bad: int) -> Text:
        if (spec, field, role) not in loaded:
            loaded[spec, field, role] = load_text(spec, field=field, role=role, skip_bad=skip_bad)
        return loaded[spec, field, role]

    for step in recipe.steps():
        used = step.arguments
        if (source := used.get("calibration")) is None:
            continue
        for spec in evaluation.get("perplexity") or ():
            seen = overlap(
                text(source, used["field"], "calibration", used["skip_bad"]),
                text(spec, evaluation["field"], "evaluation", evaluation["skip_bad"]),
            )
            sentence = f"{seen:.1%} of `{spec}` stands in the calibration text `{source}`, so its perplexity flatters"
            if seen > SEEN and sentence not in found:
                found.append(sentence)
    return found


def _label(done: list[dict[str, Any]]) -> str:
    """Return what a model is called in the report: by what was done to it."""
    words = {"prune": "pruned", "tune": "tuned", "finetune": "fine-tuned"}
    made = [stage for stage in done if stage["stage"] in MAKES_MODEL]
    if not made:
        return "dense"
    last = made[-1]
    return "pruned and tuned" if last["stage"] == "prune" and last.get("tuner") else words[last["stage"]]


def _outputs(done: list[dict[str, Any]], output: Path) -> dict[str, str]:
    found = {"report": str(output / "report.html")}
    for stage in done:
        if stage["stage"] in MAKES_MODEL:
            found["model"] = stage["output"]
        elif stage["stage"] == "export":
            found["export"] = stage["output"]
    return found


@contextmanager
def _run_folder(output: Path, digest: str, resolved: dict[str, Any], resume: bool, overwrite: bool) -> Iterator[None]:
    """Hold the lock of the run folder; refuse what is not this recipe's run."""
    if output.is_dir() and any(output.iterdir()):
        earlier = _read(output / DONE)
        ours = (output / "recipe.yaml").is_file() and (output / "lock").is_file()
        if not ours:
            raise StateError(f"`{output}` exists and is not a run folder", hint="choose another --output")
        if overwrite and not resume:
            with locked(output):
                shutil.rmtree(output)
        elif not resume:
            raise StateError(
                f"`{output}` holds an earlier run", hint="go on with --resume, or replace it with --overwrite"
            )
        elif earlier and earlier.get("digest") != digest:
            keys = ", ".join(differing(earlier.get("recipe", {}), resolved)[:6])
            raise StateError(
                f"`{output}` holds the run of another recipe (different: {keys})",
                hint="repeat that recipe, or replace the run with --overwrite",
            )
    elif output.exists() and not output.is_dir():
        raise StateError(f"`{output}` is a file", hint="choose another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"the run folder `{output}` cannot be made: {error.strerror}") from error
    with locked(output):
        yield


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock of a run folder.

    Raises:
        StateError: if another process holds it.
        ResourceError: if the folder cannot be written.
    """
    try:
        handle = (output / "lock").open("w")
    except OSError as error:
        raise ResourceError(f"the run folder `{output}` cannot be written: {error.strerror}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StateError(f"another process is working in `{output}`", hint="wait for it") from error
        yield


def differing(one: Any, other: Any, place: str = "") -> list[str]:
    """Return the dotted places at which two resolved recipes differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            found
            for key in sorted({*one, *other})
            for found in differing(one.get(key), other.get(key), f"{place}.{key}".lstrip("."))
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            found
            for index, (left, right) in enumerate(zip(one, other, strict=True))
            for found in differing(left, right, f"{place}.{index}")
        ]
    return [] if one == other else [place]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        hit("run.rename")
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(f"`{path}` could not be written: {error.strerror}") from error
