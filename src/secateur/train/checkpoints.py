"""Checkpoints of a training that count only once they are whole, and a disk that is too full for them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from secateur.core import faults

WHOLE = "whole.json"  # in a checkpoint folder, once everything else is
FULL = "No space left on device"
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


def is_full_disk(error: BaseException, folder: Path) -> bool:
    """Return whether `error` comes of a write for which the disk of `folder` had no space.

    An OSError says so by its number. Safetensors has a class of its own, which only says it in words. Torch says that a
    write failed and not why, so there the disk is asked.
    """
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(one, SafetensorError) and FULL in str(one):
            return True
        if isinstance(one, RuntimeError) and (
            FULL in str(one) or (any(word in str(one) for word in TORCH_WRITES) and _is_nearly_full(folder))
        ):
            return True
    return False


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
