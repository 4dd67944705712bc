"""Magnitude pruning as the published programs do it: one sort of the whole matrix, or a loop over groups of columns.

`exact=False` keeps the original comparison: every entry not above the one at position `floor(size * sparsity)` of the
ascending sort goes, which is one more than asked for, and all ties; `exact=True` prunes those strictly below it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mask(weight: Tensor, sparsity: float = 0.5, n: int = 0, m: int = 0, exact: bool = True) -> Tensor:
    """Return bool `(out, in)`, True = kept; `n` of every `m` columns if `m` is given."""
    score = weight.abs()
    if m:
        return groups(score, n, m)
    ranked = score.flatten().sort().values
    threshold = ranked[min(int(score.numel() * sparsity), score.numel() - 1)]
    return score >= threshold if exact else score > threshold


def groups(score: Tensor, n: int, m: int) -> Tensor:
    """Return the mask that keeps `n` of every `m` columns, by one top-k per group of columns."""
    kept = torch.ones_like(score, dtype=torch.bool)
    for start in range(0, score.shape[1], m):
        lowest = score[:, start : start + m].topk(m - n, dim=1, largest=False).indices
        kept.scatter_(1, start + lowest, False)
    return kept
