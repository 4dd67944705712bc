"""MRP: ours against the formulas taken row by row, at the shapes of SmolLM2-135M's attention and down projections.

The reference decides blocks of 128 columns with an explicit inverse for each row. `ours` removes weights in rounds over whole
rows and re-solves all rows together by conjugate gradients; `blocks` rows decide the same blocks of columns as the reference.
An objective ratio below 1 means that ours loses less. `foresight` rows have MRP without foresight on the other side, and say
what it is worth on other tokens too (`unseen`): a quarter of the inputs twice, steeper spectra, fewer tokens than inputs.

    OMP_NUM_THREADS=1 python benchmarks/bench_mrp.py [--quick]
"""

from __future__ import annotations

import argparse

import realistic
import torch
from measure import compare, product_rate, report, sets_of
from reference import mrp as published

from secateur.core.pattern import NM, Pattern, parse_pattern
from secateur.core.problem import LayerProblem
from secateur.methods.pruners.mrp import CORRECTIONS, MRP

SEED = 0


def bench(rows: int, columns: int, pattern: Pattern, variant: str, block_size: int | None, rate: float) -> None:
    """One layer, the inverse of the Gram included on both sides."""
    solver = MRP(variant=variant, block_size=block_size)  # type: ignore[arg-type]
    problems = sets_of(
        lambda seed: LayerProblem(realistic.weight(rows, columns, seed), pattern, gram=realistic.gram(columns, seed)), 1
    )

    def theirs(i: int) -> torch.Tensor:
        problem = problems[i]
        if isinstance(pattern, NM):
            return published.prune(problem.weight, problem.need("gram"), n=pattern.n, m=pattern.m, variant=variant)
        return published.prune(problem.weight, problem.need("gram"), sparsity=pattern.sparsity, variant=variant)

    def ours(i: int) -> torch.Tensor:
        problem = problems[i]
        problem.shared.clear()
        return solver.prune(problem).weight

    times = compare(theirs, ours, sets=1, warmups=0, repeats=3 if columns < 1000 else 1)
    problem = problems[0]
    pruned, reference = solver.prune(problem), theirs(0)
    pattern.check(pruned.mask, solver.scope)
    report(
        "mrp",
        f"{variant} {rows}x{columns} {pattern}" + (" blocks" if block_size else ""),
        times,
        quality={
            "objective_ratio": round(problem.loss(pruned.weight) / problem.loss(reference), 4),
            "loss": round(problem.loss(pruned.weight) / problem.size(), 6),
            "mask_agreement": round(float(((reference != 0) == pruned.mask).float().mean()), 4),
            "budget_exact": True,
        },
        floor_ms=2 * rows * columns**2 * solver.rounds * (CORRECTIONS + 2) / rate if block_size is None else None,
        seed=SEED,
    )


def bench_foresight(
    kind: str, pattern: Pattern, *, decay: float = 1.0, tokens: int = 0, repeated: bool = False
) -> None:
    """One layer with foresight and without."""
    rows, columns = 192, 384
    every = realistic.inputs(4 * columns + tokens, columns, SEED, decay)
    if repeated:
        every[:, : columns // 4] = every[:, columns // 4 : columns // 2]
    unseen, seen = every[: 4 * columns], every[-tokens:] if tokens else every
    weight = realistic.weight(rows, columns, SEED)
    problem, other = (LayerProblem(weight, pattern, gram=part.T @ part / len(part)) for part in (seen, unseen))

    def solve(foresight: bool) -> torch.Tensor:
        problem.shared.clear()
        return MRP(foresight=foresight).prune(problem).weight

    times = compare(lambda _: solve(False), lambda _: solve(True), sets=1, warmups=1, repeats=3)
    ours, plain = solve(True), solve(False)
    quality: dict[str, float | int | bool] = {"objective_ratio": round(problem.loss(ours) / problem.loss(plain), 4)}
    if tokens:
        quality["unseen"] = round(other.loss(ours) / other.loss(plain), 4)
    report("mrp foresight", f"SM {rows}x{columns} {pattern}, {kind}", times, quality=quality, seed=SEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one small case")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rate = product_rate()
    if quick:
        bench(64, 256, parse_pattern("50%"), "SM", None, rate)
        return
    for text in ("50%", "70%", "2:4"):
        bench(576, 576, parse_pattern(text), "SM", None, rate)
    bench(576, 576, parse_pattern("2:4"), "MM", None, rate)
    bench(576, 576, parse_pattern("50%"), "SM", 128, rate)
    bench(576, 576, parse_pattern("2:4"), "SM", 128, rate)
    bench(576, 1536, parse_pattern("50%"), "SM", None, rate)
    for text in ("50%", "70%", "2:4"):
        pattern = parse_pattern(text)
        bench_foresight("a quarter of the inputs twice", pattern, repeated=True)
        for decay in (1.0, 1.5, 2.0):
            bench_foresight(f"spectrum k^-{decay:g}", pattern, decay=decay)
        for tokens in (96, 192):
            bench_foresight(f"{tokens} tokens", pattern, tokens=tokens)


if __name__ == "__main__":
    main()
