"""Grams of a block: four shared lower triangles against seven full ones with a running mean.

The published program adds one sequence at a time to the Gram of each linear. `equal batches` gives ours the same single
sequences; `large batches` gives it eight at once, which it is free to choose.

    OMP_NUM_THREADS=1 python benchmarks/bench_gram.py [--quick]
"""

from __future__ import annotations

import argparse

import realistic
import torch
from measure import compare, product_rate, report, sets_of
from reference import sparsegpt as published
from torch import Tensor

from secateur.engine.statistics import LayerStats

SHARED = {576: 3, 1536: 1}  # inputs of each width in a block: attention, o, mlp; down
LINEARS = {576: 6, 1536: 1}
LENGTH = 512


def ours(inputs: dict[int, Tensor], sequences: int) -> dict[int, LayerStats]:
    """Return the statistics of one input of each width, after collecting those of all."""
    found = {}
    for width, count in SHARED.items():
        for _ in range(count):
            found[width] = LayerStats(width, {"gram"})
            for batch in inputs[width].split(sequences * LENGTH):
                found[width].update(batch)
    return found


def theirs(inputs: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return the published Gram of one linear of each width, after collecting those of all."""
    found = {}
    for width, count in LINEARS.items():
        for _ in range(count):
            found[width], samples = torch.zeros(width, width), 0
            for sequence in inputs[width].split(LENGTH):
                found[width], samples = published.add_batch(found[width], samples, sequence)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repeats")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    tokens = 4096 if quick else 16384
    rate = product_rate()
    sets = sets_of(lambda seed: {width: realistic.inputs(tokens, width, seed) for width in SHARED})
    floor = tokens * sum(count * width**2 for width, count in SHARED.items()) / rate
    for name, sequences in (("equal batches", 1), ("large batches", 8)):
        times = compare(
            lambda i: theirs(sets[i]),
            lambda i: ours(sets[i], sequences),  # noqa: B023
            repeats=3 if quick else 7,
            warmups=1,
        )
        x = sets[0][576].double()
        exact = x.T @ x / tokens
        mine, other = ours(sets[0], sequences)[576].gram, theirs(sets[0])[576] / (2 * LENGTH)
        quality = {
            "relative_error": float((mine.double() - exact).norm() / exact.norm()),
            "reference_error": float((other.double() - exact).norm() / exact.norm()),
            "symmetric": bool(torch.equal(mine, mine.T)),
        }
        report("gram", f"block, {tokens} tokens, {name}", times, quality=quality, floor_ms=floor, gate=1.8)


if __name__ == "__main__":
    main()
