"""Checkpoints of a training that count only once they are whole, and a disk that is too full for them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from secateur.core import faults
from secateur.core.errors import ResourceError
from secateur.core.fetch import unwritable
from secateur.models.publish import FULL, as_os_error

WHOLE = "whole.json"  # in a checkpoint folder, once everything else is
NEARLY_FULL = 2**24  # bytes that may be free although a larger write has failed
TORCH_WRITES = ("inline_container", "iostream error", "PytorchStreamWriter")


class Sealed(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint as whole once all processes have written their part of it."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal the checkpoint of this step."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        faults.hit("train.seal")
        temporary = folder / f"{WHOLE}.tmp"
        temporary.write_text(json.dumps({"step": state.global_step}), encoding="utf-8")
        temporary.rename(folder / WHOLE)


def last_whole(folder: Path) -> Path | None:
    """Return the checkpoint in `folder` with the most steps that was written to its end, or None."""
    found = [
        (int(step), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (step := path.name.removeprefix("checkpoint-")).isdecimal() and (path / WHOLE).is_file()
    ]
    return max(found)[1] if found else None


@contextmanager
def refusing_full_disk(folder: Path) -> Iterator[None]:
    """Tell a failed write into the folder of the checkpoints as what it is.

    Raises:
        ResourceError: there was no space for a checkpoint.
    """
    try:
        yield
    except Exception as error:
        if (full := full_disk(error, folder)) is None:
            raise
        refused = unwritable(folder, full)
        raise ResourceError(
            f"no checkpoint can be kept: {refused}",
            hint=f"{refused.hint}; --resume goes on from the last whole checkpoint, if there is one",
        ) from error


def full_disk(error: BaseException, folder: Path) -> OSError | None:
    """Return the system's error if `error` comes of a write into `folder` for which there was no space, else None.

    Safetensors only says it in words. Torch says that a write failed and not why, so there the disk is asked.
    """
    for one in _chain(error):
        found = as_os_error(one)
        if found is not None and found.errno in FULL:
            return found
        said = isinstance(one, SafetensorError | RuntimeError) and os.strerror(errno.ENOSPC) in str(one)
        torch_failed = isinstance(one, RuntimeError) and any(word in str(one) for word in TORCH_WRITES)
        if said or (torch_failed and _is_nearly_full(folder)):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and all that led to it."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [former for former in (one.__context__, one.__cause__) if former is not None]


def _is_nearly_full(folder: Path) -> bool:
    found = next((place for place in (folder, *folder.parents) if place.exists()), None)
    return found is not None and shutil.disk_usage(found).free < NEARLY_FULL
