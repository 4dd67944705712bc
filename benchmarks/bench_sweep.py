"""SparseGPT: our sweep against the published one, at the shapes of a SmolLM2-135M block.

`gate+up` times the sweep alone, with the factor at hand on both sides; `block` is all seven linears with their factors,
which the published program computes for each linear and ours once per distinct input. Budgets are equal and exact.

    OMP_NUM_THREADS=1 python benchmarks/bench_sweep.py [--quick]
"""

from __future__ import annotations

import argparse

import realistic
import torch
from measure import compare, product_rate, report, sets_of
from reference import sparsegpt as published
from torch import Tensor

from secateur.core.pattern import NM, Pattern, Unstructured, parse_pattern
from secateur.core.problem import LayerProblem
from secateur.methods.pruners.sparsegpt import SparseGPT

# name: (rows, columns, input it shares)
BLOCK = {
    "q": (576, 576, "attention"),
    "k": (192, 576, "attention"),
    "v": (192, 576, "attention"),
    "o": (576, 576, "o"),
    "gate": (1536, 576, "mlp"),
    "up": (1536, 576, "mlp"),
    "down": (576, 1536, "down"),
}
WIDTHS = {"attention": 576, "o": 576, "mlp": 576, "down": 1536}
GATES = {"50%": 3.5, "2:4": 2.5}


def theirs(weight: Tensor, gram: Tensor, pattern: Pattern, upper: Tensor | None = None) -> Tensor:
    """Return the weight that the published program gives."""
    if isinstance(pattern, NM):
        return published.prune(weight, gram, n=pattern.n, m=pattern.m, upper=upper)
    return published.prune(weight, gram, sparsity=pattern.sparsity, upper=upper)


def quality(problem: LayerProblem, ours: Tensor, mask: Tensor, reference: Tensor) -> dict[str, float | int | bool]:
    """Return how well both results agree."""
    pattern = problem.pattern
    wanted = mask.numel() - int(mask.numel() * pattern.sparsity + 1e-6) if isinstance(pattern, Unstructured) else None
    return {
        "mask_agreement": round(float(((reference != 0) == mask).float().mean()), 6),
        "objective_ratio": round(problem.loss(ours) / problem.loss(reference), 6),
        "sparsity": round(1 - float(mask.float().mean()), 6),
        "budget_exact": wanted is None or int(mask.sum()) == wanted,
    }


def bench_linear(rows: int, columns: int, pattern: Pattern, repeats: int, rate: float) -> None:
    """One sweep without factors."""
    solver = SparseGPT()

    def make(seed: int) -> tuple[LayerProblem, Tensor]:
        problem = LayerProblem(realistic.weight(rows, columns, seed), pattern, gram=realistic.gram(columns, seed))
        solver.prune(problem)  # leaves the factor in the problem
        return problem, published.factor(problem.need("gram"))

    sets = sets_of(make)
    times = compare(
        lambda i: theirs(sets[i][0].weight, sets[i][0].need("gram"), pattern, sets[i][1]),
        lambda i: solver.prune(sets[i][0]),
        repeats=repeats,
        warmups=1,
    )
    problem, upper = sets[0]
    result = solver.prune(problem)
    found = quality(problem, result.weight, result.mask, theirs(problem.weight, problem.need("gram"), pattern, upper))
    floor = rows * columns**2 / rate
    report(
        "sweep",
        f"gate+up {rows}x{columns} {pattern}",
        times,
        quality=found,
        floor_ms=floor,
        gate=GATES.get(str(pattern)),
    )


def bench_block(pattern: Pattern, repeats: int, rate: float) -> None:
    """All linears of a block, factors included."""
    solver = SparseGPT()

    def make(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        weights = {name: realistic.weight(rows, columns, seed) for name, (rows, columns, _) in BLOCK.items()}
        return weights, {name: realistic.gram(columns, seed) for name, columns in WIDTHS.items()}

    sets = sets_of(make)

    def ours(i: int) -> dict[str, tuple[LayerProblem, Tensor, Tensor]]:
        weights, grams = sets[i]
        shared: dict[str, dict] = {name: {} for name in WIDTHS}
        results = {}
        for name, (_, _, source) in BLOCK.items():
            problem = LayerProblem(weights[name], pattern, gram=grams[source], shared=shared[source])
            pruned = solver.prune(problem)
            results[name] = (problem, pruned.weight, pruned.mask)
        return results

    def reference(i: int) -> dict[str, Tensor]:
        weights, grams = sets[i]
        return {name: theirs(weights[name], grams[source], pattern) for name, (_, _, source) in BLOCK.items()}

    times = compare(reference, ours, repeats=repeats, warmups=1)
    results, expected = ours(0), reference(0)
    each = [quality(*results[name], expected[name]) for name in BLOCK]
    found = {
        "mask_agreement": min(q["mask_agreement"] for q in each),
        "objective_ratio": max(q["objective_ratio"] for q in each),
        "budget_exact": all(q["budget_exact"] for q in each),
    }
    work = sum(rows * columns**2 for rows, columns, _ in BLOCK.values())
    work += sum(2 * columns**3 / 3 for columns in WIDTHS.values())
    report("sweep", f"block {pattern}", times, quality=found, floor_ms=work / rate, gate=2.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats and cases")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rate = product_rate()
    for text in ("50%", "2:4") if quick else ("50%", "70%", "2:4", "4:8"):
        bench_linear(3072, 576, parse_pattern(text), 3 if quick else 7, rate)
    for text in ("50%",) if quick else ("50%", "70%", "2:4"):
        bench_block(parse_pattern(text), 3 if quick else 5, rate)


if __name__ == "__main__":
    main()
