"""Named places where a test may make the program fail: every write, rename and solve passes through one.

`hit("publish.rename")` does nothing unless the environment says `SECATEUR_FAULT=publish.rename:2:kill`; then the second
time this process comes by it acts. Actions: `raise` (an exception nobody expects), `kill` (SIGKILL, as by the
out-of-memory killer), `enospc` (disk full) and `sleep` or `sleep=SECONDS`. The name `*` counts the hits of every place.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter

from secateur.core.errors import RecipeError

VARIABLE = "SECATEUR_FAULT"

_hits: Counter[str] = Counter()


class InjectedError(RuntimeError):
    """What the action `raise` raises; it stands for any bug, so no code may catch it by name."""


def hit(name: str) -> None:
    """Pass the place `name`, acting if the environment asks for a fault here.

    Raises:
        InjectedError: for the action `raise`.
        OSError: with `errno.ENOSPC`, for the action `enospc`.
        RecipeError: if the variable cannot be read.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    target, count, action, seconds = _parse(wanted)
    if target not in (name, "*"):
        return
    _hits[wanted] += 1
    if _hits[wanted] != count:
        return
    match action:
        case "raise":
            raise InjectedError(f"fault injected at `{name}`")
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case _:
            time.sleep(seconds)


def forget() -> None:
    """Set the counters of this process back to zero, so that a test starts afresh."""
    _hits.clear()


def _parse(wanted: str) -> tuple[str, int, str, float]:
    """Return name, count, action and seconds of `name:k:action`."""
    parts = wanted.split(":")
    if len(parts) == 3 and parts[1].isdigit() and int(parts[1]) >= 1:
        action, _, seconds = parts[2].partition("=")
        if action == "sleep" and (not seconds or seconds.replace(".", "", 1).isdigit()):
            return parts[0], int(parts[1]), action, float(seconds or 5)
        if action in ("raise", "kill", "enospc") and not seconds:
            return parts[0], int(parts[1]), action, 0.0
    raise RecipeError(
        f"{VARIABLE} is `{wanted}`, but must be `name:k:action` with k from 1 and action raise, kill, enospc or "
        "sleep[=SECONDS]",
        hint=f"unset {VARIABLE}",
    )
