"""A model on disk: an ordinary checkpoint that every library loads, and `secateur.json`, which says how it was made."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from secateur.core import faults
from secateur.core.errors import InputError
from secateur.models.quiet import quiet
from secateur.models.weights import belies_tie, write_weights

SIDE_FILE = "secateur.json"
SIDE_VERSION = 1
MAX_SHARD = 5_000_000_000  # bytes


def save_model(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    side: Mapping[str, Any] | None,
    *,
    max_shard: int = MAX_SHARD,
) -> list[str]:
    """Write a `save_pretrained` folder with weights, configuration, generation configuration and tokenizer.

    Ties between parameters are kept, experts are named as on the Hub, weights are streamed (see `weights.py`). The
    configuration gets no field of ours: programs refuse models whose configuration they do not know.

    Args:
        model: a `transformers` model on any device; it is not changed.
        tokenizer: saved beside it, unless None.
        folder: made if missing; files of an earlier model in it must be gone, which `publish` sees to.
        side: what `secateur.json` says: base model with fingerprint, recipe, patterns and zeros per weight, calibration
            digest, metrics. `format_version` and library versions are added where missing; values that JSON has no word
            for (NaN, infinity) become null.
        max_shard: bytes of a weights file at most.

    Returns:
        Notes for the report, one for each thing that could not be saved as it was.

    Raises:
        InputError: the model is quantised, or has no values.
        OSError: the disk is full or read-only; `publish` says so in words.
    """
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise InputError("the model is quantised, which is not saved", hint="decompress first")
    notes: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        if _brings_code(model):
            # only the library knows which files of code belong to the model
            model.save_pretrained(folder, max_shard_size=max_shard)  # type: ignore[operator]
        else:
            notes += save_settings(model, folder)
            write_weights(model, folder, max_shard)
        save_tokenizer(tokenizer, folder)
    save_side(side, folder)
    return notes


def save_settings(model: nn.Module, folder: Path) -> list[str]:
    """Write configuration and generation configuration, and return a note for what could not be saved as it was.

    Raises:
        InputError: the configuration is not valid.
    """
    return [*_save_config(model, folder), *_save_generation_config(model, folder)]


def save_side(side: Mapping[str, Any] | None, folder: Path) -> None:
    """Write `secateur.json` as `save_model` does; nothing for None."""
    if side is not None:
        faults.hit("save.side")
        content = {"format_version": SIDE_VERSION, "versions": _versions(), **side}
        text = json.dumps(_plain(content), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / SIDE_FILE).write_text(text + "\n", encoding="utf-8")


def _brings_code(model: nn.Module) -> bool:
    asks = getattr(model, "is_remote_code", None)
    return bool(asks()) if callable(asks) else False


def _save_config(model: nn.Module, folder: Path) -> list[str]:
    """Save the configuration; return a note if it had to be set right."""
    faults.hit("save.config")
    config: Any = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    for field in ("quantization_config", "compression_config", "sparsity_config"):
        if hasattr(config, field):
            delattr(config, field)
    notes = []
    if belies_tie(model):
        config.tie_word_embeddings = False
        notes.append("`tie_word_embeddings` was set to false, since the head has values of its own")
    try:
        config.save_pretrained(folder)
    except ValueError as error:
        raise InputError(f"the model's configuration is not valid, so it cannot be saved: {error}") from error
    return notes


def _save_generation_config(model: nn.Module, folder: Path) -> list[str]:
    """Save the generation configuration, without what `transformers` refuses to save; return a note if so."""
    original = getattr(model, "generation_config", None)
    if original is None:
        return []
    faults.hit("save.generation")
    try:
        copy.deepcopy(original).save_pretrained(folder)
    except ValueError as first:
        (folder / "generation_config.json").unlink(missing_ok=True)
        kept = _without_sampling(original)
        try:
            kept.save_pretrained(folder)
        except ValueError:
            (folder / "generation_config.json").unlink(missing_ok=True)
            return [f"the generation configuration is not valid and was not saved: {_first_line(first)}"]
        return ["sampling settings without `do_sample` were left out of the generation configuration"]
    return []


def _without_sampling(original: Any) -> Any:
    """Return a copy with the settings that only sampling or beam search read set back to their defaults."""
    kept = copy.deepcopy(original)
    fresh = type(original)()
    sampling = ("temperature", "top_p", "min_p", "top_h", "top_k", "typical_p", "epsilon_cutoff", "eta_cutoff")
    for name in (*sampling, "early_stopping", "length_penalty"):
        if hasattr(kept, name):
            setattr(kept, name, getattr(fresh, name, None))
    return kept


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files of a tokenizer; nothing for None.

    Raises:
        InputError: the tokenizer cannot be saved.
        OSError: the disk is full or read-only.
    """
    if tokenizer is None:
        return
    faults.hit("save.tokenizer")
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        # the tokenizers library reports a failed write as a bare Exception with the number in its text
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise InputError(f"the tokenizer cannot be saved: {_first_line(error)}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("secateur", "torch", "transformers", "safetensors")}


def _plain(value: Any) -> Any:
    """Return the value as JSON has it: text keys, no NaN or infinity, paths and other objects as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
