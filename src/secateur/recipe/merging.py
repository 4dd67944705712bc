"""Merging one adapter into one model in memory, and what is checked, written and reported about it."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from secateur.core.errors import InputError
from secateur.core.versions import versions
from secateur.engine.memory import peak_memory
from secateur.models.linears import sparsity
from secateur.models.publish import MANIFEST, publish, read_manifest
from secateur.models.save import save_model
from secateur.recipe.adapter_folder import AdapterFolder
from secateur.recipe.adapter_loading import adapted
from secateur.recipe.job import Job
from secateur.recipe.zero_pattern import Change, ZeroPattern


class Merged(NamedTuple):
    """A merged model, what happened to its zeros, what an S2FT adapter overwrote, and notes for the report."""

    model: Any
    changes: list[Change]
    switch: Any
    notes: list[str]


def merge_into(
    model: Any, folder: AdapterFolder, spec: str, *, fill_zeros: bool = False, keep_mask: bool = False
) -> Merged:
    """Merge the adapter of `folder` into `model` in memory.

    Raises:
        InputError: zeros would be filled, and neither of the two ways out is chosen.
    """
    from secateur.train.adapter_linear import smallest_kept

    pattern = ZeroPattern(model)
    wrapped, notes = adapted(model, folder)
    overwritten = None
    if folder.method == "s2ft" and not folder.whole_modules:
        from secateur.recipe.switch_file import overwritten_lines

        wrapped.base_model.merge_adapter(safe_merge=True)
        overwritten = overwritten_lines(wrapped)
        merged = wrapped.unload()
    else:
        if folder.method == "s2ft":
            notes.append("the adapter trains whole modules beside its slices, so it cannot be switched later")
        merged = wrapped.merge_and_unload(safe_merge=True)
    merged.requires_grad_(False)
    changes = pattern.changes(merged)
    filled = sum(change.filled for change in changes)
    if filled and keep_mask:
        pattern.restore_(merged, None if folder.method == "pst" else smallest_kept)
        changes = pattern.changes(merged)
        notes.append(
            f"the update of `{folder.name}` filled {filled:,} zeros, which were set to zero again: that part of it is lost"
        )
    elif filled:
        sparse = [change for change in changes if change.was_sparse and change.filled]
        if sparse and not fill_zeros:
            zeros = sum(change.before for change in changes)
            raise InputError(
                f"merging the {folder.method} adapter `{folder.path}` would fill {filled:,} of the {zeros:,} zeros of "
                f"`{spec}`",
                hint="--keep-mask sets them to zero again, --fill-zeros gives the sparsity up; "
                "spp and masked_lora are trained under the mask",
            )
        notes.append(f"the update of `{folder.name}` filled {filled:,} zeros of {_count(changes)} linears")
    vanished = sum(change.vanished for change in changes)
    if vanished and folder.method != "pst":
        notes.append(f"{vanished:,} weights became zero by the merge")
    found = None
    if overwritten is not None:
        from secateur.recipe.switch_file import Switch

        found = Switch.of(merged, folder.identity(), overwritten)
    return Merged(merged, changes, found, notes)


def _count(changes: list[Change]) -> int:
    return sum(1 for change in changes if change.filled)


def publish_merged(
    target: Path, overwrite: bool, done: Merged, tokenizer: Any, side: dict[str, Any], carried: Path | None = None
) -> list[str]:
    """Publish a merged model with what its switch needs; return notes.

    Args:
        target: the folder.
        overwrite: replace what is there.
        done: the model.
        tokenizer: saved beside it.
        side: what `secateur.json` says.
        carried: folder whose files that nobody published are taken along.
    """
    with publish(target, overwrite) as fresh:
        if done.switch is not None:
            side = {**side, "switch": done.switch.side()}
        notes = save_model(done.model, tokenizer, fresh, side)
        if done.switch is not None:
            done.switch.save(fresh)
        if carried is not None:
            ours = (read_manifest(carried) or {}).get("files", {}).keys() | {MANIFEST}
            for file in sorted(path for path in carried.rglob("*") if path.is_file()):
                name = file.relative_to(carried)
                if name.as_posix() not in ours and not (fresh / name).exists():
                    (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(file, fresh / name)
    return notes


def report_of(
    stage: str,
    job: Job,
    folder: AdapterFolder | None,
    done: Merged,
    before: float,
    output: str | Path | None,
    notes: list[str],
) -> dict[str, Any]:
    """Return the report of a merge."""
    filled = sum(change.filled for change in done.changes)
    vanished = sum(change.vanished for change in done.changes)
    written = sum(parameter.nbytes for parameter in done.model.parameters())
    return {
        "stage": stage,
        "model": job.spec,
        "output": None if output is None else str(output),
        "adapter": None
        if folder is None
        else {**folder.identity(), "path": str(folder.path), "bytes": folder.bytes, "linears": len(folder.modules)},
        "sparsity_before": before,
        "sparsity": sparsity(done.model),
        "zero_pattern": {
            "identical": not filled and not vanished,
            "filled": filled,
            "vanished": vanished,
            "linears": len(done.changes),
            "identical_linears": sum(1 for change in done.changes if not change.filled and not change.vanished),
        },
        "switchable": done.switch is not None,
        "dtype": str(next(done.model.parameters()).dtype).removeprefix("torch."),
        "bytes": written,
        "layers": [change.line() for change in done.changes],
        "seconds": time.perf_counter() - job.started,
        "peak_memory_bytes": peak_memory(torch.device("cpu")),
        "versions": adapter_versions(),
        "warnings": list(dict.fromkeys(notes)),
    }


def adapter_versions() -> dict[str, str]:
    """Return the versions that decide what a merge gives."""
    from importlib.metadata import version

    return {**versions(), "peft": version("peft")}


def refuse_output(output: str | Path | None, base: Any, *adapters: Path | None) -> None:
    """Refuse an output that is, holds, or lies in the base model or an adapter.

    Raises:
        InputError: naming both.
    """
    if output is None:
        return
    target = Path(output).resolve()
    named = [("base model", base), *(("adapter", adapter) for adapter in adapters)]
    for what, path in named:
        if not isinstance(path, str | Path) or not Path(path).is_dir():
            continue
        source = Path(path).resolve()
        if target == source or target in source.parents or source in target.parents:
            how = "is" if target == source else "holds" if target in source.parents else "lies in"
            raise InputError(f"the output `{output}` {how} the folder of the {what} `{path}`", hint="choose another")
