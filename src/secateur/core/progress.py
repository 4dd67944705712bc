"""How long work tells that it goes on. The command line draws bars; the API is silent unless it is given something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Something that shows steps; steps may be nested."""

    def start(self, what: str, total: float) -> int:
        """Begin a step of `total` units and return its number."""
        ...

    def advance(self, step: int, amount: float) -> None:
        """Count `amount` units of a step as done."""
        ...

    def finish(self, step: int) -> None:
        """End a step."""
        ...

    def note(self, message: str) -> None:
        """Show one line."""
        ...


class Silent:
    """Progress that shows nothing."""

    def start(self, what: str, total: float) -> int:
        return 0

    def advance(self, step: int, amount: float) -> None:
        pass

    def finish(self, step: int) -> None:
        pass

    def note(self, message: str) -> None:
        pass


@contextmanager
def step(progress: Progress, what: str, total: float) -> Iterator[int]:
    """Open a step for the length of a `with` block and yield its number."""
    number = progress.start(what, total)
    try:
        yield number
    finally:
        progress.finish(number)
