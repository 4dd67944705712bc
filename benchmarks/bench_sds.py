"""SDS: our steps on the Gram against two times 200 epochs over the tokens, as published; one JSON line each.

Both sides start from the tokens (ours accumulates the Gram in its time) and use the same base pruner. `epochs` readings
of the published steps differ in whether the second mask moves; each is timed once, ours several times. The quality says
which relative layer loss both reach, and what each of our parts adds: the base pruner, its exact refit, the re-dense step
with the second pruning (refitted), the soft mask without a re-dense step, everything, and everything without exact
solves before and after a refit.

    OMP_NUM_THREADS=1 python benchmarks/bench_sds.py [--quick] [--pattern 70%] [--base wanda]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import realistic
import torch
from measure import Times, product_rate, report
from reference.sds import sds as published
from torch import Tensor

from secateur.core.contracts import Pruner
from secateur.core.linalg import refit
from secateur.core.pattern import parse_pattern
from secateur.core.problem import LayerProblem
from secateur.methods.pruners.sds import SDS
from secateur.methods.pruners.sparsegpt import SparseGPT
from secateur.methods.pruners.wanda import Wanda

GATE = 50.0
# reading of the published step 3: does the mask move, and the rate of Adam that served it best
READINGS = {"soft mask": (True, 1e-3), "fixed mask": (False, 3e-3)}

BASES: dict[str, Pruner] = {"sparsegpt": SparseGPT(), "wanda": Wanda()}


def problem_of(weight: Tensor, inputs: Tensor, pattern: str) -> LayerProblem:
    """Return the layer problem, its Gram accumulated from the tokens."""
    gram = inputs.T @ inputs / len(inputs)
    return LayerProblem(weight, parse_pattern(pattern), gram=gram, diag=gram.diagonal().clone(), mean=inputs.mean(0))


def timed(job: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return what `job` returns and its milliseconds of CPU time."""
    started = time.thread_time()
    result = job()
    return result, 1e3 * (time.thread_time() - started)


def parts(problem: LayerProblem, base: Pruner) -> dict[str, float]:
    """Return the relative layer loss of the base pruner, of its refit and of each part of ours."""
    first = base.prune(problem)
    plain = SDS(base=base, exact=False).prune(problem)
    found = {
        "base": first.weight,
        "base_refit": refit(problem.weight, problem.need("gram"), first.mask, start=first.weight),
        "redense_only": SDS(base=base, steps=0).prune(problem).weight,
        "soft_mask_only": SDS(base=base, times=()).prune(problem).weight,
        "sds_inexact": plain.weight,
        "sds_inexact_refit": refit(problem.weight, problem.need("gram"), plain.mask, start=plain.weight),
        "sds_two_rounds": SDS(base=base, rounds=2).prune(problem).weight,
    }
    size = problem.size()
    return {name: round(problem.loss(weight) / size, 6) for name, weight in found.items()}


def bench(rows: int, columns: int, tokens: int, pattern: str, base: Pruner, epochs: int, repeats: int) -> None:
    """Print one line for each reading of the published steps."""
    weight, inputs = realistic.weight(rows, columns, 0), realistic.inputs(tokens, columns, 0)
    problem = problem_of(weight, inputs, pattern)
    size = problem.size()

    def prune(dense: Tensor) -> Tensor:
        return base.prune(replace(problem, weight=dense)).weight

    def select(score: Tensor) -> Tensor:
        return problem.pattern.mask(score, base.scope)

    def ours() -> Tensor:
        return SDS(base=base).prune(problem_of(weight, inputs, pattern)).weight

    ours()
    runs = [timed(ours) for _ in range(repeats)]
    mine = statistics.median(milliseconds for _, milliseconds in runs)
    spread = (max(taken for _, taken in runs) - min(taken for _, taken in runs)) / 2 / mine
    loss = problem.loss(runs[0][0]) / size
    added = parts(problem, base)
    floor = (2 * tokens * columns**2 + (SDS().steps + 40) * 2 * rows * columns**2) / product_rate()
    for reading, (soft, rate) in READINGS.items():
        (_, theirs), taken = _reference(weight, inputs, prune, select, epochs, soft, rate)
        reached = problem.loss(theirs) / size
        quality = {
            "loss": round(loss, 6),
            "reference_loss": round(reached, 6),
            "objective_ratio": round(loss / reached, 6),
            "budget_exact": int((runs[0][0] != 0).sum()) == int((theirs != 0).sum()),
            **added,
        }
        report(
            "sds",
            f"{type(base).__name__} {rows}x{columns} {pattern}, {tokens} tokens, 2 x {epochs} epochs, {reading}",
            Times(taken, mine, repeats, spread),
            quality=quality,
            floor_ms=floor,
            gate=GATE,
        )


def _reference(
    weight: Tensor,
    inputs: Tensor,
    prune: Callable[[Tensor], Tensor],
    select: Callable[[Tensor], Tensor],
    epochs: int,
    soft: bool,
    rate: float,
) -> tuple[tuple[Tensor, Tensor], float]:
    started = time.thread_time()
    found = published(weight, inputs, prune, select, epochs=epochs, soft=soft, learning_rate=rate)
    return found, 1e3 * (time.thread_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a small layer and few epochs, to see that it runs")
    parser.add_argument("--pattern", choices=("70%", "2:4"), help="one pattern alone")
    parser.add_argument("--base", choices=tuple(BASES), help="one base pruner alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.quick:
        bench(96, 96, 2048, "2:4", SparseGPT(), 20, 2)
        return
    for pattern in (given.pattern,) if given.pattern else ("70%", "2:4"):
        for base in (given.base,) if given.base else BASES:
            bench(576, 576, 32 * 512, pattern, BASES[base], 200, 5)


if __name__ == "__main__":
    main()
