"""Numbers as people read them, each with its unit; the command line and the reports write them alike."""

from __future__ import annotations

from typing import Any


def duration(seconds: float) -> str:
    """Return `1.4 s`, `2 min 05 s` or `3 h 12 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Return bytes as `12 kB` or `1.5 GB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def number(value: Any, digits: int = 4) -> str:
    """Return a number with `digits` significant digits (none of a whole part are dropped), or a dash for None."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    if abs(value) < 1:
        return f"{value:.{digits}g}"
    return f"{value:,.{max(digits - len(str(int(abs(value)))), 0)}f}"


def percent(value: float | None) -> str:
    """Return a fraction as `70.0 %`, or a dash for None."""
    return "-" if value is None else f"{100 * value:.1f} %"
