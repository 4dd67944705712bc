"""The processes of one run, as `torchrun` and `accelerate launch` number them in the environment."""

from __future__ import annotations

import os
import sys


def is_first() -> bool:
    """Return whether this process is alone, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    """Return how many processes a launcher started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave() -> None:
    """End the process group that training has opened, if any, before the interpreter ends.

    Left open, a thread of the group may still let go of a tensor while the interpreter shuts down, and then takes the
    whole process with it (SIGABRT after the work is done).
    """
    distributed = sys.modules.get("torch.distributed")  # whoever opened a group has imported it
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
