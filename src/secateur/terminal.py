"""What the command line shows while it works: bars with the time left on a terminal, plain lines elsewhere.

Everything here goes to stderr; stdout is for results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO, cast

from secateur.core.progress import Progress
from secateur.core.quantities import duration

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 15.0
REMEMBERED_SECONDS = 900.0  # of work, to tell the time left from: a block of a large model takes minutes


class Bars:
    """Progress as bars on a terminal; a step inside another one stands below it and leaves when it is done."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._open: list[int] = []

    def start(self, what: str, total: float) -> int:
        """Begin a bar."""
        number = int(self._bars.add_task("  " * len(self._open) + what, total=total or 1))
        self._open.append(number)
        return number

    def advance(self, step: int, amount: float) -> None:
        """Lengthen a bar."""
        self._bars.advance(_task(step), amount)

    def finish(self, step: int) -> None:
        """Remove an inner bar; leave an outermost one standing as the record of what was done."""
        inner = step in self._open and self._open.index(step) > 0
        self._open = [number for number in self._open if number != step]
        task = self._bars.tasks[self._bars.task_ids.index(_task(step))]
        if task.total is not None and task.completed > 0.99 * task.total:  # a sum of fractions ends just short of one
            self._bars.update(_task(step), completed=task.total)
        self._bars.stop_task(_task(step))
        if inner:
            self._bars.remove_task(_task(step))

    def note(self, message: str) -> None:
        """Show one line above the bars."""
        self._bars.console.print(message, markup=False, highlight=False)


@dataclass
class _Line:
    what: str
    total: float
    depth: int
    started: float
    shown: float
    done: float = 0.0


class Lines:
    """Progress as plain lines, for logs: one when a step begins, one every 15 seconds, one when it ends.

    Args:
        stream: where they go.
        clock: returns seconds.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._steps: dict[int, _Line] = {}
        self._next = 0

    def start(self, what: str, total: float) -> int:
        """Begin a step; inner steps are shown only if they last."""
        now = self._clock()
        line = _Line(what, total or 1, len(self._steps), now, now)
        self._next += 1
        self._steps[self._next] = line
        if line.depth == 0:
            self.note(what)
        return self._next

    def advance(self, step: int, amount: float) -> None:
        """Count, and show a line if the last one of this step is old."""
        line = self._steps.get(step)
        if line is None:
            return
        line.done += amount
        now = self._clock()
        if now - line.shown >= SECONDS_BETWEEN_LINES and line.done > 0:
            line.shown = now
            elapsed = now - line.started
            left = elapsed * max(line.total - line.done, 0.0) / line.done
            share = min(line.done / line.total, 1.0)
            self.note(f"{line.what}: {share:.0%}, {duration(elapsed)} elapsed, {duration(left)} left")

    def finish(self, step: int) -> None:
        """End a step."""
        line = self._steps.pop(step, None)
        if line is not None and line.depth == 0:
            self.note(f"{line.what}: done in {duration(self._clock() - line.started)}")

    def note(self, message: str) -> None:
        """Write one line."""
        self._stream.write(message + "\n")
        self._stream.flush()


@contextmanager
def progress(stream: TextIO) -> Iterator[Progress]:
    """Yield bars if `stream` is a terminal, plain lines otherwise."""
    from rich.console import Console

    console = Console(file=stream)
    if not console.is_terminal or console.is_dumb_terminal:
        yield Lines(stream)
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left", style="dim"),
        TimeRemainingColumn(),
    )
    with RichProgress(
        *columns, console=console, speed_estimate_period=REMEMBERED_SECONDS, redirect_stdout=False, redirect_stderr=True
    ) as bars:
        yield Bars(bars)


def _task(step: int) -> TaskID:
    """Return a step's number as rich's type of the same thing."""
    return cast("TaskID", step)
