"""FISTAPruner: ours against the published search, at the shapes of SmolLM2-135M's attention and down projections.

Both start from the same SparseGPT solution, whose time both include. The reference works on plain weights, searches lambda by
the ratio of errors, ends after a few failures and does not re-solve; a path of 3 lambdas, the default, already loses less.
`objective_ratio_refit` compares with it after the exact refit that ours ends with. An objective ratio below 1 means that ours
loses less.

    OMP_NUM_THREADS=1 python benchmarks/bench_fistapruner.py [--quick]
"""

from __future__ import annotations

import argparse

import realistic
import torch
from measure import compare, product_rate, report, sets_of
from reference import fistapruner as published

from secateur.core.linalg import refit
from secateur.core.pattern import NM, Pattern, parse_pattern
from secateur.core.problem import LayerProblem
from secateur.methods.pruners.fistapruner import FISTAPruner
from secateur.methods.pruners.sparsegpt import SparseGPT

SEED = 0


def bench(rows: int, columns: int, pattern: Pattern, lambdas: int, rate: float) -> None:
    """One layer, with everything that depends on its inputs."""
    solver, base = FISTAPruner(lambdas=lambdas), SparseGPT()
    problems = sets_of(
        lambda seed: LayerProblem(realistic.weight(rows, columns, seed), pattern, gram=realistic.gram(columns, seed)), 1
    )

    def theirs(i: int) -> torch.Tensor:
        problem = problems[i]
        problem.shared.clear()
        start = base.prune(problem).weight
        if isinstance(pattern, NM):
            return published.prune(problem.weight, problem.need("gram"), start, n=pattern.n, m=pattern.m)
        return published.prune(problem.weight, problem.need("gram"), start, sparsity=pattern.sparsity)

    def ours(i: int) -> torch.Tensor:
        problems[i].shared.clear()
        return solver.prune(problems[i]).weight

    times = compare(theirs, ours, sets=1, warmups=0, repeats=3 if columns < 1000 else 1)
    problem = problems[0]
    pruned, reference = solver.prune(problem), theirs(0)
    pattern.check(pruned.mask, solver.scope)
    loss, gram = problem.loss(pruned.weight), problem.need("gram")
    report(
        "fistapruner",
        f"{rows}x{columns} {pattern}, {lambdas} lambdas",
        times,
        quality={
            "objective_ratio": round(loss / problem.loss(reference), 4),
            "objective_ratio_refit": round(
                loss / problem.loss(refit(problem.weight, gram, reference != 0, start=reference)), 4
            ),
            "objective_ratio_base": round(loss / problem.loss(base.prune(problem).weight), 4),
            "loss": round(loss / problem.size(), 6),
            "budget_exact": True,
        },
        floor_ms=2 * rows * columns**2 * solver.steps * solver.lambdas / rate,
        seed=SEED,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one small case")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rate = product_rate()
    if quick:
        bench(64, 256, parse_pattern("50%"), 2, rate)
        return
    default = FISTAPruner().lambdas
    for lambdas in (default, 16):
        for text in ("50%", "70%", "2:4"):
            bench(576, 576, parse_pattern(text), lambdas, rate)
    bench(576, 1536, parse_pattern("50%"), default, rate)


if __name__ == "__main__":
    main()
