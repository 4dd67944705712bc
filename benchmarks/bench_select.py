"""Masks from scores: our selection against a stable sort, a loop over groups, and one top-k of the whole matrix.

OMP_NUM_THREADS=1 python benchmarks/bench_select.py [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import realistic
import torch
from measure import compare, copy_rate, report, sets_of
from reference import magnitude, wanda
from torch import Tensor

from secateur.core.pattern import NM, Pattern, Unstructured

ROWS, COLUMNS = 1536, 576


def stable_sort(score: Tensor) -> Tensor:
    """The published selection of Wanda: half of every row, by a stable sort."""
    return wanda.mask(score, torch.ones(score.shape[1]), 0.5)


def whole_topk(score: Tensor) -> Tensor:
    """Half of the matrix by one top-k over all of it."""
    kept = torch.zeros(score.numel(), dtype=torch.bool)
    kept[score.reshape(-1).topk(score.numel() // 2).indices] = True
    return kept.reshape(score.shape)


CASES: list[tuple[str, Callable[[Tensor], Tensor], Pattern, float]] = [
    ("row 50% vs stable sort", stable_sort, Unstructured(0.5, "row"), 6),
    ("2:4 vs loop over groups", lambda score: magnitude.groups(score, 2, 4), NM(2, 4), 5),
    ("4:8 vs loop over groups", lambda score: magnitude.groups(score, 4, 8), NM(4, 8), 0),
    ("layer 50% vs top-k", whole_topk, Unstructured(0.5, "layer"), 15),
    ("layer 50% vs sort", lambda score: magnitude.mask(score, 0.5), Unstructured(0.5, "layer"), 15),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    repeats = 5 if parser.parse_args().quick else 15
    torch.set_num_threads(1)
    floor = ROWS * COLUMNS * 5 / copy_rate()  # read four bytes, write one
    sets = sets_of(
        lambda seed: realistic.weight(ROWS, COLUMNS, seed).abs() * realistic.gram(COLUMNS, seed).diagonal().sqrt(), 4
    )
    for case, reference, pattern, gate in CASES:
        times = compare(lambda i: reference(sets[i]), lambda i: pattern.mask(sets[i]), sets=4, repeats=repeats)  # noqa: B023
        mask = pattern.mask(sets[0])
        pattern.check(mask)
        quality = {"mask_agreement": float((mask == reference(sets[0])).float().mean()), "budget_exact": True}
        report("select", f"{case} {ROWS}x{COLUMNS}", times, quality=quality, floor_ms=floor, gate=gate or None)


if __name__ == "__main__":
    main()
