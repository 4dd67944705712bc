"""Stop when asked to: the first SIGINT or SIGTERM ends the work cleanly, the second one, or five seconds, at once.

Python runs its signal handlers between bytecodes, so one long matrix product would hold them up. A watcher thread reads
the signals from a pipe that the interpreter writes to immediately, and ends the process when time is over; whatever is
on disk stays whole then, since every output appears by one rename.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_SECONDS = 4.0  # for clean-up; a process asked to stop is gone within 5 seconds
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The process was asked to stop.

    Attributes:
        signal: number of the signal.
        exit_code: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number
        self.exit_code = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` in the `with` block when a signal asks for it; leave handlers as they were afterwards.

    Only the main thread can do that; elsewhere this does nothing. A signal that the parent process had ignored stays
    ignored (`nohup`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:  # a second one is the watcher's
            asked = True
            raise Stopped(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader,), name="secateur-stop", daemon=True)
    watcher.start()
    try:
        for number in SIGNALS:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.write(writer, b"\0")
        watcher.join()
        os.close(writer)
        os.close(reader)


def _watch(reader: int) -> None:
    """End the process at the second signal, or when the first one is too long ago; a zero byte ends the watch."""
    first = 0
    deadline = 0.0
    while True:
        ready, _, _ = select.select([reader], [], [], max(deadline - time.monotonic(), 0.0) if first else None)
        received = os.read(reader, 64) if ready else b""
        if 0 in received:
            return
        for number in received:
            if number not in SIGNALS:
                continue
            if first:
                _leave(number)
            first, deadline = number, time.monotonic() + GRACE_SECONDS
        if first and time.monotonic() >= deadline:
            _leave(first)


def _leave(number: int) -> None:
    """End the process at once, with the cursor that a progress bar may have hidden."""
    if sys.__stderr__ is not None and sys.__stderr__.isatty():
        os.write(2, b"\x1b[?25h\n")
    os._exit(128 + number)
