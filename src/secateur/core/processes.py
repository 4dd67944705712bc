"""The processes of one run, as `torchrun` and `accelerate launch` number them in the environment."""

from __future__ import annotations

import os


def is_first() -> bool:
    """Return whether this process is alone, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    """Return how many processes a launcher started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))
