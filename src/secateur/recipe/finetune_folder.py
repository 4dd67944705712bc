"""What a fine-tuning leaves on disk: the folder of its output, and that of a run that is not finished."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from secateur.core import faults
from secateur.core.errors import StateError
from secateur.engine.journal import Journal
from secateur.models.publish import is_complete, read_manifest
from secateur.recipe.job import Job, digest_of, forget, read_side, state_folder

CHECKPOINTS, ADAPTER = "checkpoints", "adapter"  # in the folder of an unfinished run


def refuse_output(output: str | Path | None, model: str | Path | nn.Module) -> None:
    """Refuse an output that could not be written at the end, or that would take the place of the model.

    Raises:
        StateError: naming the folder.
    """
    if output is None:
        return
    target = Path(output)
    if target.exists() and any(target.iterdir() if target.is_dir() else (target,)) and read_manifest(target) is None:
        raise StateError(
            f"the output `{target}` is no earlier output, so it is not replaced", hint="choose another --output"
        )
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise StateError(
            f"the output `{target}` lies in `{parent}`, which is no folder", hint="choose another --output"
        )
    if isinstance(model, nn.Module) or not Path(model).is_dir():
        return
    inner, outer = target.resolve(), Path(model).resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        place = "is the model's own folder" if inner == outer else "and the model's folder lie in one another"
        raise StateError(f"the output `{target}` {place}", hint="choose an --output beside the model")


@contextmanager
def unfinished(
    target: Path | None, identity: Mapping[str, Any], *, resume: bool, overwrite: bool, main: bool
) -> Iterator[Path | None]:
    """Yield the folder of a run towards `target`, of which the `main` process takes care; removed when all is done."""
    if target is None:
        yield None
        return
    folder = state_folder(target)
    if not main:
        yield folder
        return
    if overwrite and not resume and folder.exists():
        forget(folder)
    journal = Journal(folder, identity, resume=resume)
    try:
        yield folder
    except BaseException:
        from secateur.train.checkpoints import last_whole

        journal.close(remove=last_whole(folder / CHECKPOINTS) is None)  # nothing to go on from, nothing to keep
        raise
    journal.close(remove=True)


def is_done(target: Path, identity: Mapping[str, Any]) -> bool:
    """Return whether `target` is what this very run would publish."""
    return is_complete(target) and (read_side(target) or {}).get("run") == digest_of(identity)


def as_published(target: Path) -> dict[str, Any]:
    """Return the part of the report that an output still tells when it was complete already."""
    return {"steps_done": None, "losses": [], "evaluations": [], "seconds": 0.0, "output": str(target)}


def side_of(identity: Mapping[str, Any], whole: bool, job: Job) -> dict[str, Any]:
    """Return the content of `secateur.json`: only what decides the result, so that equal runs write equal bytes."""
    former = (job.side or {}) if whole else {}
    return {
        "base_model": former.get("base_model") or identity["model"],
        "stage": "finetune",
        "run": digest_of(identity),
        "settings": {name: value for name, value in identity.items() if name not in ("model", "versions")},
        "versions": identity["versions"],
    }


def save_adapter(model: Any, tokenizer: Any, folder: Path, side: Mapping[str, Any]) -> None:
    """Write the adapter as PEFT does, with the tokenizer and `secateur.json` beside it."""
    faults.hit("finetune.save")
    with warnings.catch_warnings():  # PEFT misses the config.json of packed folders and live models
        warnings.filterwarnings("ignore", message="Could not find a config file", category=UserWarning)
        model.save_pretrained(str(folder), safe_serialization=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    (folder / "secateur.json").write_text(json.dumps(side, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def merged(
    model: Any, tokenizer: Any, job: Job, state: Path | None, target: Path | None, side: dict[str, Any]
) -> nn.Module:
    """Return the base model with the adapter in its weights, published at `target`, as `merge` would do it.

    Args:
        model: PEFT's, which is taken apart.
        tokenizer: published beside it.
        job: gets the notes.
        state: folder in which the adapter is kept until the run is over; None: it is not kept.
        target: where to publish; None: nowhere.
        side: what `secateur.json` says.

    Raises:
        InputError: the merge would fill zeros; NumericError: a merged weight is not finite.
    """
    from secateur.recipe.adapter_folder import read_adapter
    from secateur.recipe.merging import merge_into, publish_merged

    with tempfile.TemporaryDirectory() as scratch:
        folder = (state or Path(scratch)) / ADAPTER
        save_adapter(model, None, folder, side)
        done = merge_into(model.unload(), read_adapter(folder), job.spec)
        job.warnings += done.notes
        job.refuse_warnings()
        side = {**side, "weights": weight_sides(done.model, job)}
        if target is not None:
            job.warnings += publish_merged(target, bool(job.options["overwrite"]), done, tokenizer, side)
    merged: nn.Module = done.model
    return merged


def weight_sides(model: nn.Module, job: Job) -> dict[str, Any]:
    """Return what `secateur.json` says of the linears that have zeros."""
    from secateur.recipe.zero_pattern import weight_lines

    return weight_lines(model, (job.side or {}).get("weights", {}))
