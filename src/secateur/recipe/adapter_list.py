"""What adapters lie in a folder, and whether they fit a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secateur.core.errors import SecateurError
from secateur.recipe.adapter_folder import AdapterFolder, adapter_folders, read_adapter


def list_adapters(
    paths: str | Path | Sequence[str | Path],
    *,
    model: Any = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> dict[str, Any]:
    """List adapters: method, base model, size; and whether each fits a model.

    Args:
        paths: adapter folders, or folders that hold adapter folders.
        model: what `load` takes, or a live model: each adapter is checked against it, by its record of weights and zeros
            where it has one, by names and shapes otherwise.
        allow_pickle, trust_remote_code, revision: as in `load`; of the model.

    Returns:
        `{"stage", "model", "adapters": [...]}`; each line has `name`, `path`, `method`, `base`, `rank` (the largest),
        `lines` (S2FT's rows and columns), `linears`, `parameters`, `bytes`, `fits` (None where it was not asked) and `why`
        not. A folder that cannot be read has its `error` instead.

    Raises:
        InputError: a path holds no adapter, or the model cannot be opened.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    folders = adapter_folders(given)
    live: Any = None
    if model is not None:
        from secateur.recipe.adapter_loading import need_peft
        from secateur.recipe.opening import load

        need_peft()
        loading: dict[str, Any] = {
            "allow_pickle": allow_pickle,
            "trust_remote_code": trust_remote_code,
            "revision": revision,
        }
        named = isinstance(model, str | Path)
        live = load(model, tokenizer=False, **loading).model if named else model
    named_model = str(model) if isinstance(model, str | Path) else None if model is None else type(model).__name__
    return {"stage": "adapters", "model": named_model, "adapters": [_line(path, live) for path in folders]}


def _line(path: Path, live: Any) -> dict[str, Any]:
    try:
        folder = read_adapter(path)
    except SecateurError as error:
        return {"name": path.absolute().name, "path": str(path), "error": str(error)}
    fits, why = (None, None) if live is None else _fit(folder, live)
    return {
        "name": folder.name,
        "path": str(path),
        "method": folder.method,
        "base": folder.base,
        "rank": max(folder.ranks, default=None),
        "lines": folder.lines,
        "linears": len(folder.modules),
        "parameters": folder.parameters,
        "bytes": folder.bytes,
        "fits": fits,
        "why": why,
    }


def _fit(folder: AdapterFolder, live: Any) -> tuple[bool, str | None]:
    """Return whether an adapter fits a model, and why not."""
    from secateur.recipe.adapter_loading import misfit

    why = misfit(folder, live)
    return why is None, why
