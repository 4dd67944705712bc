"""What is done with trained adapters: merge, fuse, switch, and leave as LoRA.

Adapters are PEFT folders: ours (SPP, masked LoRA and DoRA, PST, S2FT) and PEFT's own LoRA and DoRA. The command line calls
these same functions. Every output is published whole or not at all, and no input is ever written to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.core.errors import InputError, RecipeError
from secateur.core.progress import Progress
from secateur.models.linears import sparsity
from secateur.models.publish import publish
from secateur.recipe.adapter_folder import WEIGHTS, AdapterFolder, read_adapter
from secateur.recipe.adapter_list import list_adapters
from secateur.recipe.adapter_loading import adapted, need_peft, open_base, tokenizer_of
from secateur.recipe.job import Job, Result, refuse_existing
from secateur.recipe.merging import Merged, adapter_versions, merge_into, publish_merged, refuse_output, report_of
from secateur.recipe.zero_pattern import ZeroPattern, weight_lines

__all__ = ["export_lora_adapter", "fuse", "list_adapters", "merge", "switch"]

_LINEAR_METHODS = {
    "spp": "its update is a product of two trained vectors, so the sum of two adapters is no SPP adapter",
    "masked_lora": "its row lengths and its mask are not linear in what is trained, so a sum needs both adapters",
    "pst": "each adapter chose a mask of its own, and two masks contradict each other",
    "dora": "its row lengths are not linear in what is trained",
}
_WITH = {"progress", "revision", "allow_pickle", "trust_remote_code", "dtype"}


def merge(
    adapter: str | Path,
    *,
    model: str | Path | nn.Module | None = None,
    tokenizer: Any = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    fill_zeros: bool = False,
    keep_mask: bool = False,
    dtype: str | torch.dtype | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Merge an adapter into its base model; the result is a plain model with the zeros of the base.

    Adapters of this library keep every zero. PEFT's own LoRA and DoRA would fill them, which is refused unless one of
    `fill_zeros` and `keep_mask` says what to do.

    Args:
        adapter: a PEFT adapter folder.
        model: the base: what `load` takes, or a live model, which is copied. None takes the one that the adapter names.
        tokenizer: of a live model. A tokenizer in the adapter folder goes before that of the base.
        output: folder to publish the merged model in; None returns it only. A merged S2FT adapter can be taken out of
            the folder again, see `switch`.
        overwrite: replace an earlier output.
        fill_zeros: let the update fill zeros of the base.
        keep_mask: set the zeros that the update filled to zero again, which loses that part of it.
        dtype: dtype of the merged weights; that of the base if None.
        allow_pickle: see `load`; of the base.
        trust_remote_code: see `load`; of the base.
        revision: see `load`; of the base.
        progress: shown downloads and conversions.

    Returns:
        `Result(model, report)`; the report has sparsity before and after, and the zeros of each linear.

    Raises:
        InputError: the adapter is damaged, for another model or another mask, or would change the zero pattern.
        NumericError: the adapter, or a merged weight, is not finite.
        StateError: the output exists, or a PST adapter whose mask still moves.
    """
    if fill_zeros and keep_mask:
        raise RecipeError("`fill_zeros` and `keep_mask` contradict each other", hint="choose one")
    folder = read_adapter(adapter)
    refuse_existing(output, False, overwrite)
    refuse_output(output, model if model is not None else folder.base, folder.path)
    loading = {name: value for name, value in locals().items() if name in _WITH}
    job = open_base("merge", model, tokenizer, folder, loading)
    words = tokenizer_of(folder, job)
    before = sparsity(job.model)
    done = merge_into(job.model, folder, job.spec, fill_zeros=fill_zeros, keep_mask=keep_mask)
    side = {
        "base_model": job.identity() if output is not None else {},
        "stage": "merge",
        "adapter": folder.identity(),
        "settings": {"fill_zeros": fill_zeros, "keep_mask": keep_mask},
        "versions": adapter_versions(),
        "weights": weight_lines(done.model, (job.side or {}).get("weights") or {}) if output is not None else {},
    }
    notes = [*job.warnings, *done.notes]
    if output is not None:
        job.refuse_changed_source()
        notes += publish_merged(Path(output), overwrite, done, words, side)
    return Result(done.model, report_of("merge", job, folder, done, before, output, notes))


def switch(
    model: str | Path,
    to: str | Path,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    fill_zeros: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Take the merged S2FT adapter out of a model folder and put another in, without the base model.

    The folder holds the few rows and columns that its adapter overwrote. They are put back bit for bit, so that any
    sequence of switches that ends at `none` gives the weights of the base.

    Args:
        model: a folder that `merge` or `switch` wrote.
        to: an S2FT adapter folder, or `none` for the base model's weights.
        output: folder to publish in; None replaces `model` itself, in one step.
        overwrite: replace an earlier output; not needed where `model` itself is replaced.
        fill_zeros: as in `merge`.
        progress: shown conversions.

    Returns:
        `Result(model, report)`.

    Raises:
        InputError: no adapter can be taken out of the model, or the other one does not fit its base.
    """
    from secateur.recipe.switch_file import Switch, read_switch

    need_peft()
    source = Path(model)
    if not source.is_dir():
        raise InputError(f"there is no model folder `{source}`", hint="name a folder that `secateur merge` wrote")
    refuse_existing(output, False, overwrite)
    folder = None if str(to) == "none" else read_adapter(to)
    refuse_output(output, source, None if folder is None else folder.path)
    if folder is not None and (folder.method != "s2ft" or folder.whole_modules):
        raise InputError(
            f"`{folder.path}` is a {folder.method} adapter"
            + (" with whole modules" if folder.whole_modules else "")
            + ", but only rows and columns of S2FT can be switched",
            hint="merge it into the base model with `secateur merge`",
        )
    inside = read_switch(source)
    job = Job("switch", source, None, None, {"progress": progress})
    inside.undo_(job.model, source)
    before = sparsity(job.model)
    if folder is None:
        done = Merged(job.model, ZeroPattern(job.model).changes(job.model), Switch(), [])
    else:
        done = merge_into(job.model, folder, str(source), fill_zeros=fill_zeros)
    former = job.side or {}
    side = {
        "base_model": former.get("base_model"),
        "stage": "merge",
        "adapter": None if folder is None else folder.identity(),
        "settings": {"fill_zeros": fill_zeros, "keep_mask": False},
        "versions": adapter_versions(),
        "weights": weight_lines(done.model, former.get("weights") or {}),
    }
    job.refuse_changed_source()
    notes = [*job.warnings, *done.notes]
    if output is None:
        notes += publish_merged(source, True, done, job.tokenizer, side, carried=source)
    else:
        notes += publish_merged(Path(output), overwrite, done, job.tokenizer, side)
    report = report_of("switch", job, folder, done, before, output or source, notes)
    return Result(done.model, {**report, "taken_out": inside.adapter})


def fuse(
    adapters: Mapping[str | Path, float] | Mapping[str, float] | Mapping[Path, float],
    *,
    output: str | Path,
    model: str | Path | nn.Module | None = None,
    overwrite: bool = False,
    dtype: str | torch.dtype | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the weighted sum of adapters as one adapter: exactly, because nothing is approximated by a smaller rank.

    S2FT adapters are added where their rows and columns meet. LoRA adapters are stacked, so that the rank is the sum of
    their ranks. Other methods are refused, because the sum is no adapter of theirs.

    Args:
        adapters: `{folder: weight}`, all of one method and for one base.
        output: adapter folder to publish.
        model: the base, as in `merge`; opened for S2FT only.
        overwrite: replace an earlier output.
        dtype: see `load`; of the base.
        allow_pickle: see `load`; of the base.
        trust_remote_code: see `load`; of the base.
        revision: see `load`; of the base.
        progress: shown downloads and conversions.

    Returns:
        `{"stage", "output", "method", "adapters", "rank", "lines", "parameters", "bytes", "warnings"}`.

    Raises:
        RecipeError: a weight is not finite, or an adapter is named twice.
        InputError: the adapters are of different methods or bases, or cannot be summed.
    """
    folders = _summands(adapters)
    first = folders[0]
    refuse_existing(output, False, overwrite)
    refuse_output(output, model if model is not None else first.base, *(folder.path for folder in folders))
    weights = [float(weight) for weight in adapters.values()]
    notes: list[str] = []
    if first.method == "s2ft":
        from secateur.methods.adapters.s2ft_exchange import fuse_

        job = open_base("fuse", model, None, first, {name: v for name, v in locals().items() if name in _WITH})
        wrapped: Any = job.model
        for number, folder in enumerate(folders):
            wrapped, more = adapted(wrapped, folder, f"part{number}")
            notes += more
        fuse_(wrapped, {f"part{number}": weight for number, weight in enumerate(weights)}, "default")
        write = _saver(wrapped)
    else:
        from secateur.recipe.lora_stack import stacked

        write = stacked(folders, weights).save
    with publish(Path(output), overwrite) as fresh:
        write(fresh)
    found = read_adapter(output)
    return {
        "stage": "fuse",
        "output": str(output),
        "method": found.method,
        "adapters": [
            {**folder.identity(), "path": str(folder.path), "weight": weight}
            for folder, weight in zip(folders, weights, strict=True)
        ],
        "rank": max(found.ranks, default=None),
        "lines": found.lines,
        "parameters": found.parameters,
        "bytes": found.bytes,
        "versions": adapter_versions(),
        "warnings": list(dict.fromkeys(notes)),
    }


def export_lora_adapter(
    adapter: str | Path,
    *,
    output: str | Path,
    model: str | Path | nn.Module | None = None,
    overwrite: bool = False,
    dtype: str | torch.dtype | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write an S2FT adapter as a LoRA adapter that gives the same outputs in plain PEFT and in LoRA servers.

    Args:
        adapter: an S2FT adapter folder.
        output: adapter folder to publish.
        model: the base, as in `merge`.
        overwrite: replace an earlier output.
        dtype, allow_pickle, trust_remote_code, revision, progress: as in `fuse`.

    Returns:
        `{"stage", "output", "method", "adapter", "rank", "parameters", "bytes", "warnings"}`.

    Raises:
        InputError: the adapter is of another method, or is not for the model.
    """
    folder = read_adapter(adapter)
    if folder.method in ("lora", "dora"):
        raise InputError(f"`{folder.path}` is a {folder.method} adapter of PEFT already", hint="use it as it is")
    if folder.method != "s2ft":
        raise InputError(
            f"`{folder.path}` is a {folder.method} adapter, whose update is no product of two small matrices",
            hint="merge it with `secateur merge`, and serve the merged model",
        )
    refuse_existing(output, False, overwrite)
    refuse_output(output, model if model is not None else folder.base, folder.path)
    job = open_base("export", model, None, folder, {name: v for name, v in locals().items() if name in _WITH})
    wrapped, notes = adapted(job.model, folder)
    from secateur.methods.adapters.s2ft_exchange import export_lora

    export_lora(wrapped, output, overwrite=overwrite)
    found = read_adapter(output)
    return {
        "stage": "export",
        "output": str(output),
        "method": found.method,
        "adapter": {**folder.identity(), "path": str(folder.path)},
        "rank": max(found.ranks, default=None),
        "parameters": found.parameters,
        "bytes": found.bytes,
        "versions": adapter_versions(),
        "warnings": [*job.warnings, *notes],
    }


def _summands(adapters: Mapping[Any, float]) -> list[AdapterFolder]:
    """Return the adapters to fuse, checked against each other.

    Raises:
        RecipeError: there are none, one is named twice, or a weight is not finite.
        InputError: they are of different methods or bases, or of one that cannot be summed.
    """
    if not adapters:
        raise RecipeError("no adapter is given to fuse", hint="name some, such as A=0.7 B=0.3")
    for path, weight in adapters.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise RecipeError(f"the weight of `{path}` must be a finite number, got {weight!r}")
    folders = [read_adapter(path) for path in adapters]
    first = folders[0]
    seen: dict[Path, Path] = {}
    for folder in folders:
        other = seen.setdefault(folder.path.resolve(), folder.path)
        if other is not folder.path:
            raise RecipeError(f"the adapter `{folder.path}` is named twice", hint="add its weights up and name it once")
        if folder.method != first.method:
            raise InputError(
                f"`{first.path}` is a {first.method} adapter and `{folder.path}` is a {folder.method} one, so they have "
                "no sum",
                hint="merge one of them first, and train the other on the merged model",
            )
        if folder.method in _LINEAR_METHODS:
            raise InputError(
                f"`{folder.path}` is a {folder.method} adapter, which cannot be fused: {_LINEAR_METHODS[folder.method]}",
                hint="merge one with `secateur merge`, and train the other on the merged model",
            )
        if folder.whole_modules or folder.config.get("modules_to_save"):
            raise InputError(f"`{folder.path}` trains whole modules beside its adapter, so it cannot be fused")
        if folder.base and first.base and _place(folder.base) != _place(first.base):
            raise InputError(
                f"`{first.path}` is for the base model `{first.base}` and `{folder.path}` for `{folder.base}`",
                hint="adapters of one base can be fused; set `base_model_name_or_path` if it is the same one moved",
            )
    return folders


def _place(base: str) -> str:
    return str(Path(base).resolve()) if Path(base).exists() else base


def _saver(wrapped: Any) -> Any:
    """Return a function that writes the adapter `default` of a PEFT model into a folder."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    def save(folder: Path) -> None:
        tensors = get_peft_model_state_dict(wrapped, adapter_name="default", save_embedding_layers=False)
        config = wrapped.peft_config["default"]
        config.save_pretrained(str(folder))
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})

    return save
