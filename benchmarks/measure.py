"""Interleaved timing of a reference and of ours, and the JSON line that every benchmark prints.

Times are CPU times of the calling thread: on a shared machine they repeat to about 10 %, wall times do not. Start with
`OMP_NUM_THREADS=1`, so that the calling thread does all the work.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Job = Callable[[int], object]  # called with the number of the input set


@dataclass(frozen=True)
class Times:
    """Milliseconds of CPU time per call, medians; the spread is the largest half-range of a ratio, as a fraction."""

    reference: float
    ours: float
    repeats: int
    spread: float


def compare(reference: Job, ours: Job, *, sets: int = 2, warmups: int = 3, repeats: int = 7) -> Times:
    """Return the times of both jobs, measured A B A B in one process over changing input sets.

    Args:
        reference: the published way.
        ours: the same work.
        sets: input sets that both jobs know; taken in turn, so that nothing stays in the cache by accident.
        warmups: untimed calls of each.
        repeats: timed calls of each.
    """
    for number in range(warmups):
        reference(number % sets)
        ours(number % sets)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats):
        for job, found in zip((reference, ours), times, strict=True):
            started = time.thread_time()
            job(number % sets)
            found.append(1e3 * (time.thread_time() - started))
    ratios = sorted(slow / fast for slow, fast in zip(*times, strict=True))
    middle = ratios[len(ratios) // 4 : -(len(ratios) // 4) or None]  # without the outer quarters
    spread = (middle[-1] - middle[0]) / 2 / statistics.median(ratios)
    return Times(statistics.median(times[0]), statistics.median(times[1]), repeats, spread)


def product_rate(size: int = 1024, repeats: int = 5) -> float:
    """Return the flops per millisecond of CPU time of a large float32 product on this machine."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / _best(lambda: left @ right, repeats)


def copy_rate(size: int = 1 << 25, repeats: int = 5) -> float:
    """Return the bytes read and written per millisecond of CPU time by a large copy on this machine."""
    source, target = torch.ones(size // 4), torch.empty(size // 4)
    return 2 * size / _best(lambda: target.copy_(source), repeats)


def report(
    job: str,
    case: str,
    times: Times,
    *,
    quality: dict[str, float | int | bool],
    floor_ms: float | None = None,
    seed: int = 0,
    gate: float | None = None,
    **more: Any,
) -> None:
    """Print one JSON line.

    Args:
        job: name of the benchmark.
        case: what was measured.
        times: of `compare`.
        quality: what shows that both sides did the same work.
        floor_ms: what the hardware allows, from the rates measured in this run.
        seed: of the inputs.
        gate: the ratio that is asked for.
        more: further fields.
    """
    line = {
        "job": job,
        "case": case,
        "device": "cpu",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "ref_ms": round(times.reference, 3),
        "ours_ms": round(times.ours, 3),
        "ratio": round(times.reference / times.ours, 2),
        "quality": quality,
        "floor_ms": None if floor_ms is None else round(floor_ms, 3),
        "fraction_of_floor": None if floor_ms is None else round(floor_ms / times.ours, 3),
        "n": times.repeats,
        "spread": round(times.spread, 3),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "seed": seed,
        "gate": gate,
        **more,
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def sets_of(make: Callable[[int], Any], count: int = 2) -> Sequence[Any]:
    """Return `count` input sets, made from the seeds 0, 1, ..."""
    return [make(seed) for seed in range(count)]


def _best(job: Callable[[], object], repeats: int) -> float:
    """Return the shortest of several CPU times, milliseconds."""
    found = []
    for _ in range(repeats):
        started = time.thread_time()
        job()
        found.append(1e3 * (time.thread_time() - started))
    return min(found[1:] or found)
