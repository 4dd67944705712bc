"""Wanda as published: running squared norms per sequence, a stable sort of every row.

Sun et al., arXiv 2306.11695. The published count `int(columns * sparsity)` is exact; among equal scores its stable
ascending sort prunes the lower column first, where this project keeps it: masks differ on exact ties only.
"""

from __future__ import annotations

import torch
from reference.magnitude import groups
from torch import Tensor


def add_batch(squares: Tensor, samples: int, inputs: Tensor) -> tuple[Tensor, int]:
    """Return the running mean over sequences of the squared norm of each input, and their number.

    Args:
        squares: `(in,)`.
        samples: sequences so far.
        inputs: `(tokens, in)`, one more sequence.
    """
    squares = squares * (samples / (samples + 1))
    return squares + inputs.float().T.norm(p=2, dim=1) ** 2 / (samples + 1), samples + 1


def mask(weight: Tensor, squares: Tensor, sparsity: float = 0.5, n: int = 0, m: int = 0) -> Tensor:
    """Return bool `(out, in)`, True = kept; `n` of every `m` columns if `m` is given."""
    score = weight.abs() * squares.reshape(1, -1).sqrt()
    if m:
        return groups(score, n, m)
    order = score.sort(dim=-1, stable=True).indices
    kept = torch.ones_like(score, dtype=torch.bool)
    kept.scatter_(1, order[:, : int(score.shape[1] * sparsity)], False)
    return kept
