"""DSnoT read row by row, one index at a time: slow, and plain enough to check by hand.

Zhang et al., arXiv 2310.08915. The published program works on all rows at once with sorted index matrices, and goes on
writing into rows that have stopped and past the end of their candidates; this reading stops a row where the method says
so. Sums are per token here: the published error is `length` times this one, and so is its threshold.
"""

from __future__ import annotations

from torch import Tensor


def refine(
    weight: Tensor,
    mask: Tensor,
    mean: Tensor,
    variance: Tensor,
    score: Tensor,
    cycles: int = 50,
    threshold: float = 0.1 / 2048,
    power: float = 1.0,
    same_sign: bool = False,
    m: int = 0,
) -> Tensor:
    """Return the refined mask, bool `(out, in)`.

    Args:
        weight: `(out, in)`, dense.
        mask: bool `(out, in)`, True = kept.
        mean: `(in,)`, mean of each input.
        variance: `(in,)`.
        score: `(out, in)`, importance of kept entries.
        cycles: swaps per row at most.
        threshold: stop when the absolute error is at most this.
        power: exponent of the variance.
        same_sign: refuse swaps that turn the sign of the error; always on with `m`.
        m: width of a group of an N:M mask, 0 for unstructured.
    """
    result = mask.clone()
    for row in range(weight.shape[0]):
        shift = (weight[row] * mean).double()
        kept, pruned = mask[row].nonzero().squeeze(1).tolist(), (~mask[row]).nonzero().squeeze(1).tolist()
        error = float(shift[pruned].sum())
        first_sign = (error > 0) - (error < 0)
        urgency = (weight[row] * mean / variance**power).tolist()
        importance = score[row].tolist()
        used: set[int] = set()
        for _ in range(min(cycles, weight.shape[1])):
            if abs(error) <= threshold:
                break
            sign = 1 if error >= 0 else -1
            growable = [j for j in pruned if j not in used and float(shift[j]) * sign > 0]
            if not growable:
                break
            grown = max(growable, key=lambda j: (urgency[j] * sign, -j))
            if m:
                droppable = [j for j in kept if j not in used and j // m == grown // m]
            else:
                droppable = [j for j in kept if j not in used and float(shift[j]) * sign < 0]
            if not droppable:
                break
            dropped = min(droppable, key=lambda j: (importance[j], j))
            after = error + float(shift[dropped]) - float(shift[grown])
            if (same_sign or m) and (after > 0) - (after < 0) != first_sign:
                break
            result[row, grown], result[row, dropped] = True, False
            used |= {grown, dropped}
            error = after
    return result
