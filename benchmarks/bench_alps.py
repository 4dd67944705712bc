"""ALPS: ours against the published steps, at the shapes of SmolLM2-135M's attention and down projections.

Both sides start from the Gram. `steep` rows have inputs with eigenvalues k^-1.5 instead of k^-1, where the published first
penalty freezes the support too early: ours takes more iterations there, and the objective says what for. `equal` rows give
ours the published first penalty. An objective ratio below 1 means that ours loses less; `refit` is the same after an exact
refit of both masks.

    OMP_NUM_THREADS=1 python benchmarks/bench_alps.py [--quick]
"""

from __future__ import annotations

import argparse

import realistic
import torch
from measure import compare, product_rate, report, sets_of
from reference import alps as published
from torch import Tensor

from secateur.core.linalg import refit
from secateur.core.pattern import NM, Pattern, parse_pattern
from secateur.core.problem import LayerProblem
from secateur.core.solve import solve
from secateur.methods.pruners.alps import ALPS

ROWS = 576
GATES = {576: 3.5, 1536: 8.0}


def theirs(problem: LayerProblem) -> Tensor:
    """Return the weight that the published program gives."""
    pattern, gram = problem.pattern, problem.need("gram")
    if isinstance(pattern, NM):
        return published.prune(problem.weight, gram, n=pattern.n, m=pattern.m)
    return published.prune(problem.weight, gram, sparsity=pattern.sparsity)


def bench(columns: int, pattern: Pattern, kind: str, repeats: int, rate: float) -> None:
    """One layer."""
    decay = 1.5 if kind == "steep" else 1.0
    solver = ALPS(rho=0.1) if kind == "equal" else ALPS()
    problems = sets_of(
        lambda seed: LayerProblem(
            realistic.weight(ROWS, columns, seed), pattern, gram=realistic.gram(columns, seed, decay)
        )
    )

    def ours(i: int) -> Tensor:
        problems[i].shared.clear()  # factors included
        return solver.prune(problems[i]).weight

    times = compare(lambda i: theirs(problems[i]), ours, repeats=repeats, warmups=1)
    problem = problems[0]
    pruned, reference = solver.prune(problem), theirs(problem)
    pattern.check(pruned.mask, solver.scope)
    refitted = refit(problem.weight, problem.need("gram"), reference != 0, start=reference)
    after = solve(solver, problem, refit=True).pruned.weight
    report(
        "alps",
        f"{ROWS}x{columns} {pattern}" + (f" {kind}" if kind else ""),
        times,
        quality={
            "objective_ratio": round(problem.loss(pruned.weight) / problem.loss(reference), 4),
            "refit_objective_ratio": round(problem.loss(after) / problem.loss(refitted), 4),
            "loss": round(problem.loss(pruned.weight) / problem.size(), 6),
            "mask_agreement": round(float(((reference != 0) == pruned.mask).float().mean()), 4),
            "budget_exact": True,
        },
        floor_ms=20 * 2 * ROWS * columns**2 / rate,
        gate=GATES[columns] if pattern == parse_pattern("70%") and not kind else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats and cases")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rate = product_rate()
    cases = [(576, "70%", ""), (576, "2:4", "")]
    if not quick:
        cases += [(576, "50%", ""), (576, "90%", ""), (576, "70%", "equal"), (576, "70%", "steep")]
        cases += [(1536, "70%", ""), (1536, "2:4", ""), (1536, "70%", "equal"), (1536, "70%", "steep")]
    for columns, text, kind in cases:
        bench(columns, parse_pattern(text), kind, 3 if quick or columns > 1000 else 5, rate)


if __name__ == "__main__":
    main()
