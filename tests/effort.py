"""How much work something is, counted and not timed, so that a slow or busy machine changes nothing."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Effort:
    """What one call of a function took: calls of functions and peak bytes of Python objects."""

    calls: int = 0
    peak_bytes: int = 0


def effort(function: Callable[[], object]) -> Effort:
    """Run `function` and count the Python and C functions that it calls and the memory that they take."""
    found = Effort()

    def count(frame: object, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            found.calls += 1

    tracemalloc.start()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
        found.peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return found
