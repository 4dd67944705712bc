"""SCOPE: exact exchanges of all rows at once against the published splicing row by row, from the same first mask.

The reference ranks by its approximate scores and refits to see whether an exchange pays; it stops where these scores
find nothing more. Ours knows the refitted loss of every exchange among the important columns and stops where none of
them is left. An objective ratio below 1 means that ours loses less; `base` is the loss of the first mask with exact
weights, for comparison.

    OMP_NUM_THREADS=1 python benchmarks/bench_scope.py [--quick]
"""

from __future__ import annotations

import argparse

import realistic
import torch
from measure import compare, report, sets_of
from reference import scope as published
from torch import Tensor

from secateur.core.linalg import refit_exact
from secateur.core.pattern import Unstructured
from secateur.core.problem import LayerProblem
from secateur.methods.pruners.alps import standardised
from secateur.methods.pruners.scope import splice

COLUMNS = 576
Case = tuple[Tensor, Tensor, Tensor]


def bench(rows: int, sparsity: float, repeats: int) -> None:
    """Some rows of one layer, from the mask that Wanda chooses."""

    def make(seed: int) -> Case:
        problem = LayerProblem(
            realistic.weight(rows, COLUMNS, seed), Unstructured(sparsity, "row"), gram=realistic.gram(COLUMNS, seed)
        )
        scale, unit = standardised(problem, 0.02)
        target = problem.weight * scale
        return target, unit, problem.select(target.abs(), "row")

    sets = sets_of(make)
    times = compare(lambda i: published.prune(*sets[i]), lambda i: splice(*sets[i]).weight, repeats=repeats, warmups=1)
    target, unit, mask = sets[0]

    def loss(weight: Tensor) -> float:
        error = weight - target
        return float(((error @ unit) * error).sum() / ((target @ unit) * target).sum())

    ours, theirs = splice(target, unit, mask), published.prune(target, unit, mask)
    report(
        "scope",
        f"{rows}x{COLUMNS} {sparsity:.0%} row",
        times,
        quality={
            "objective_ratio": round(loss(ours.weight) / loss(theirs), 4),
            "loss": round(loss(ours.weight), 6),
            "base": round(loss(refit_exact(target, unit, mask, 0.0)), 6),
            "budget_exact": bool(torch.equal(ours.mask.sum(1), mask.sum(1))),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats and cases")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    for sparsity in (0.7,) if quick else (0.5, 0.7):
        bench(64, sparsity, 3)


if __name__ == "__main__":
    main()
