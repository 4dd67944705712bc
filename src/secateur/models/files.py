"""A model from whatever names one: a folder, a Hub id, a GGUF file, or `builtin:`.

Every path ends in a local folder or file that was checked before a library opens it (`folder_checks.py`,
`gguf_header.py`). Then the model is built once without memory, on the meta device, to see that configuration and
weights fit; only then are the weights mapped. They stay mapped: memory is taken when a weight is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from secateur.core.errors import InputError, NumericError, RecipeError, did_you_mean
from secateur.core.progress import Progress
from secateur.models.builtin import MODELS, builtin_model
from secateur.models.fingerprint import fingerprint
from secateur.models.folder_checks import Survey, check_folder, survey
from secateur.models.gguf import load_gguf
from secateur.models.hub import is_hub_id, snapshot
from secateur.models.model_checks import (
    opening,
    refuse_empty_tokenizer,
    refuse_misfit,
    refuse_noncausal,
    refuse_unready,
)
from secateur.models.publish import publish, refuse_other_tokenizer
from secateur.models.quiet import quiet
from secateur.models.save import save_model
from secateur.models.weights import TORCH_DTYPES, belies_tie

__all__ = [
    "Loaded",
    "Source",
    "check_folder",
    "fingerprint",
    "load",
    "publish",
    "refuse_nonfinite",
    "save_model",
]

_MAX_TABLES = 2**30  # bytes that a model of any size may compute instead of storing them


@dataclass(frozen=True)
class Source:
    """Where a model came from.

    Args:
        spec: what the caller named.
        kind: "folder", "hub", "gguf", "builtin", or "bitmask".
        path: the local folder or file that was opened.
        revision: commit of a Hub model.
        fingerprint: see `fingerprint.py`.
        notes: sentences for the report about what was not as one might expect.
    """

    spec: str
    kind: str
    path: Path | None
    revision: str | None
    fingerprint: str
    notes: tuple[str, ...] = ()


class Loaded(NamedTuple):
    """A model in eval mode on CPU, its tokenizer if there is one, and where both came from."""

    model: Any
    tokenizer: Any
    source: Source


def load(
    spec: str | Path,
    *,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    tokenizer: bool = True,
    progress: Progress | None = None,
) -> Loaded:
    """Load a causal language model, and its tokenizer if it has one.

    A local folder never causes a network request; a Hub id honours `HF_HUB_OFFLINE`.

    Args:
        spec: a `save_pretrained` folder, a Hub id, a `.gguf` file, or `builtin:NAME`.
        dtype: dtype of the weights. None keeps the stored one and maps the weights; another one copies them all.
            Quantised GGUF weights become float32.
        allow_pickle: read pickled weights if there are no others, with torch's `weights_only` loader.
        trust_remote_code: run Python code that comes with the model; a Hub id then needs a full commit as `revision`.
        revision: commit, branch or tag of a Hub id.
        tokenizer: load the tokenizer too.
        progress: told of downloads and conversions.

    Returns:
        The model, the tokenizer (None if not asked for or not there), and the source.

    Raises:
        InputError: the model is damaged, not supported, or would have to be trusted.
        ResourceError: the network, the disk or the memory does not suffice.
    """
    text = str(spec)
    if revision is not None and (text.startswith("builtin:") or _exists(text)):
        raise RecipeError(f"`revision` is {revision!r}, but `{text}` is no Hub id", hint="leave `revision` out")
    options = _Options(dtype, allow_pickle, trust_remote_code, tokenizer)
    if text.startswith("builtin:"):
        name = text.removeprefix("builtin:")
        if name not in MODELS:
            raise InputError(
                f"there is no builtin model `{name}`{did_you_mean(name, MODELS)}", hint=f"known: {', '.join(MODELS)}"
            )
        return _load_folder(text, "builtin", builtin_model(name, progress=progress), None, options)
    if _exists(text):
        path = Path(text)
        if path.is_dir():
            return _load_folder(text, "folder", path, None, options)
        if path.suffix == ".gguf" and path.is_file():
            model, words = load_gguf(path, dtype, tokenizer=tokenizer)
            return Loaded(model, words, Source(text, "gguf", path, None, fingerprint(path)))
        raise InputError(f"`{text}` is neither a model folder nor a `.gguf` file")
    if not is_hub_id(text) or text.endswith(".gguf"):
        raise InputError(f"there is no model folder or file `{text[:200]}`")
    folder = snapshot(text, revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    return _load_folder(text, "hub", folder, folder.name, options)


def refuse_nonfinite(model: nn.Module) -> None:
    """Raise if any weight is NaN or infinite. Reads every weight, so a mapped model is read from disk once.

    Raises:
        NumericError: naming the first such tensor and how many of its values are affected.
    """
    for name, parameter in model.named_parameters():
        # the sum of finite values may overflow, so only a suspicious one is looked at value by value
        if not bool(torch.isfinite(parameter.detach().sum())):
            bad = parameter.numel() - int(torch.isfinite(parameter).sum())
            if bad:
                raise NumericError(
                    f"tensor `{name}` has {bad:,} values that are NaN or infinite (of {parameter.numel():,})",
                    hint="the file is damaged, or the training diverged",
                )


class _Options(NamedTuple):
    dtype: torch.dtype | None
    allow_pickle: bool
    trust_remote_code: bool
    tokenizer: bool


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long a name, or a NUL in it
        return False


def _load_folder(spec: str, kind: str, folder: Path, revision: str | None, options: _Options) -> Loaded:
    found = survey(folder, allow_pickle=options.allow_pickle, trust_remote_code=options.trust_remote_code)
    notes: list[str] = []
    if found.pickled:
        notes.append(f"the weights were read from the pickle `{found.weights[0].name}`, with tensors only allowed")
    stored = found.stored_dtype()
    dtype = options.dtype or (TORCH_DTYPES[stored] if stored else None)
    others = sorted({item.dtype for item in found.tensors.values() if item.dtype in TORCH_DTYPES} - {stored})
    floats = [name for name in others if TORCH_DTYPES[name].is_floating_point]
    if floats and options.dtype is None:
        notes.append(f"tensors stored as {', '.join(floats)} were converted to {stored}, the dtype of the others")
    with quiet(), opening(f"the model `{spec}`"):
        config = _config(folder, found)
        refuse_noncausal(config, found.config.get("architectures"), spec)
        if not found.runs_code:
            notes += _rehearse(folder, found, config, dtype)
        model, info = _pretrained(folder, found, config, dtype)
    refuse_misfit(info, spec)
    refuse_unready(model, spec)
    if belies_tie(model):
        notes.append("the configuration ties the head to the embedding, but the stored head differs and was kept")
    words = _tokenizer(spec, folder, found, config) if options.tokenizer and found.has_tokenizer else None
    if options.tokenizer and words is None:
        notes.append("the model has no tokenizer files")
    return Loaded(model.eval(), words, Source(spec, kind, folder, revision, fingerprint(folder), tuple(notes)))


def _config(folder: Path, found: Survey) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=found.runs_code)
    # a stored choice of kernels is one for another machine; None lets the library choose for this one
    config._attn_implementation = None
    return config


def _pretrained(
    folder: Path, found: Survey, config: Any, dtype: torch.dtype | None, **more: Any
) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype if dtype is not None else "auto",
        local_files_only=True,
        trust_remote_code=found.runs_code,
        use_safetensors=not found.pickled,
        output_loading_info=True,
        **more,
    )
    return model, info


def _rehearse(folder: Path, found: Survey, config: Any, dtype: torch.dtype | None) -> list[str]:
    """Build the model on the meta device, where nothing is allocated, and refuse it if it does not fit the weights."""
    _refuse_tables(config, found)
    # sizes may differ here, and are then reported with their names; the real load never lets them
    _, info = _pretrained(folder, found, config, dtype, device_map="meta", ignore_mismatched_sizes=True)
    refuse_misfit(info, str(folder))
    unused = sorted(info["unexpected_keys"])
    return [f"{len(unused)} stored tensors are not used, such as `{unused[0]}`"] if unused else []


def _refuse_tables(config: Any, found: Survey) -> None:
    """Refuse a model that computes huge tables, such as one of positions; loading would, even on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    tables = {name: table.nbytes for name, table in empty.named_buffers()}
    if sum(tables.values()) > max(_MAX_TABLES, 4 * sum(item.end - item.begin for item in found.tensors.values())):
        largest = max(tables, key=lambda name: tables[name])
        raise InputError(f"the configuration asks for {tables[largest]:,} bytes for the table `{largest}`")


def _tokenizer(spec: str, folder: Path, found: Survey, config: Any) -> Any:
    from transformers import AutoTokenizer

    refuse_other_tokenizer(folder)
    with quiet(), opening(f"the tokenizer of `{spec}`"):
        words = AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=found.runs_code
        )
    refuse_empty_tokenizer(words, spec)
    return words
