"""Whatever names a model, a dtype or a device, turned into the thing itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from secateur.core.errors import InputError, RecipeError
from secateur.core.progress import Progress
from secateur.export import bitmask
from secateur.methods.registry import register_adapters
from secateur.models.files import Loaded, Source, fingerprint
from secateur.models.files import load as load_checkpoint

ADAPTER = "adapter_config.json"


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
    try:
        config = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"`{folder / ADAPTER}` cannot be read: {error}") from error
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise InputError(
            f"`{folder / ADAPTER}` does not name the model that the adapter is for",
            hint="set `base_model_name_or_path` in it",
        )
    revision = config.get("revision")
    loaded = load(base, revision=revision if isinstance(revision, str) else None, tokenizer=tokenizer, **loading)
    register_adapters()
    from peft import PeftModel

    model = PeftModel.from_pretrained(loaded.model, str(folder)).eval()
    digest = hashlib.sha256(f"{loaded.source.fingerprint} {fingerprint(folder)}".encode()).hexdigest()
    return Loaded(model, loaded.tokenizer, Source(str(folder), "adapter", folder, None, digest))


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
