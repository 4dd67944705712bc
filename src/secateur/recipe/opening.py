"""Whatever names a model, a dtype or a device, turned into the thing itself."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from secateur.core.errors import InputError, RecipeError
from secateur.core.progress import Progress
from secateur.export import bitmask
from secateur.models.blocks import evaluating
from secateur.models.files import Loaded, Source, fingerprint
from secateur.models.files import load as load_checkpoint

ADAPTER = "adapter_config.json"
P = ParamSpec("P")
R = TypeVar("R")


def load(
    spec: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    tokenizer: bool = True,
    progress: Progress | None = None,
) -> Loaded:
    """Load a model and its tokenizer from whatever names one.

    Args:
        spec: a `save_pretrained` folder, a Hub id, a `.gguf` file, `builtin:smollm2-135m`, a folder in the bitmask
            format of `export`, or an adapter folder, whose base model is loaded and adapted.
        dtype: dtype of the weights, the stored one if None.
        allow_pickle: read `.bin` weights (with `weights_only`).
        trust_remote_code: run code that the model brings along; a Hub id then needs a `revision`.
        revision: commit, branch or tag of a Hub id.
        tokenizer: load the tokenizer as well.
        progress: shown downloads and conversions.

    Returns:
        `Loaded(model, tokenizer, source)`, the model in eval mode on CPU.

    Raises:
        InputError: if the model is damaged, unsupported, or would need code to be run.
    """
    folder = Path(spec)
    if (folder / ADAPTER).is_file() and not (folder / "config.json").exists():
        return _with_adapter(
            folder,
            dtype=dtype,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
            tokenizer=tokenizer,
            progress=progress,
        )
    if bitmask.is_packed(folder):
        model, words = bitmask.read(folder, dtype=dtype_of(dtype))
        return Loaded(model, words, Source(str(spec), "bitmask", folder, None, bitmask.fingerprint(folder)))
    return load_checkpoint(
        str(spec),
        dtype=dtype_of(dtype),
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        revision=revision,
        tokenizer=tokenizer,
        progress=progress,
    )


def _with_adapter(folder: Path, *, tokenizer: bool, **loading: Any) -> Loaded:
    """Return the base model that an adapter folder names, with the adapter active and not merged."""
    from secateur.recipe.adapter_folder import read_adapter
    from secateur.recipe.adapter_loading import adapted

    found = read_adapter(folder)
    if found.base is None:
        raise InputError(
            f"`{folder / ADAPTER}` does not name the model that the adapter is for",
            hint="set `base_model_name_or_path` in it, or merge it: secateur merge ADAPTER --model BASE",
        )
    revision = found.config.get("revision")
    loaded = load(found.base, revision=revision if isinstance(revision, str) else None, tokenizer=tokenizer, **loading)
    model, notes = adapted(loaded.model, found)
    digest = hashlib.sha256(f"{loaded.source.fingerprint} {fingerprint(folder)}".encode()).hexdigest()
    return Loaded(model, loaded.tokenizer, Source(str(folder), "adapter", folder, None, digest, tuple(notes)))


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype called `dtype`; None and `auto` stand for the stored one."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype == "auto":
        return None
    if dtype not in known:
        raise RecipeError(f"dtype `{dtype}` must be one of {', '.join(known)}")
    return known[dtype]


def device_of(device: str | torch.device | None) -> torch.device:
    """Return the device called `device`; None takes a CUDA device if there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise RecipeError(f"device `{device}` is not one that torch knows", hint="use `cpu` or `cuda`") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device `{device}` is not there: torch sees no CUDA device", hint="use --device cpu")
    return chosen


def modes_back(argument: str = "model") -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return what lets a stage give a live model its modes back, training or evaluating, submodule by submodule.

    Args:
        argument: what the model is called, `model` or a keyword of the stage.
    """

    def decorated(stage: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(stage)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = args[0] if args and argument == "model" else kwargs.get(argument)
            with evaluating(given) if isinstance(given, nn.Module) else nullcontext():
                return stage(*args, **kwargs)

        return call

    return decorated
