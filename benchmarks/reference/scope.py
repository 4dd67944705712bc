"""Splicing as published, for the error of one row: approximate scores, exchanges of several at once, a refit for each try.

Zhu et al., arXiv 2406.12017, and the program of Wang et al., arXiv 2403.18540, whose convex solver is replaced by the
exact least squares, and whose scores leave the curvature out, as its default does: how much a kept entry matters is its
square, how much a dropped one promises is the square of its slope. One row at a time, slow where the original is slow.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prune(weight: Tensor, gram: Tensor, mask: Tensor, most: int = 5, rounds: int = 100) -> Tensor:
    """Return the pruned weight `(out, in)`; its zeros are the mask.

    Args:
        weight: `(out, in)`.
        gram: `(in, in)`, positive definite; columns are best scaled to a unit diagonal, which the scores take for granted.
        mask: bool `(out, in)`, where each row starts.
        most: entries exchanged at once at most; halved until the loss falls, and the number that did is the next limit.
        rounds: accepted exchanges per row at most.
    """
    return torch.stack([splice(row, gram, kept, most, rounds) for row, kept in zip(weight, mask, strict=True)])


def splice(target: Tensor, gram: Tensor, mask: Tensor, most: int, rounds: int) -> Tensor:
    """Return one row's weights `(in,)` after splicing."""
    mask = mask.clone()
    value, loss = fit(target, gram, mask)
    limit = min(most, int(mask.sum()), int((~mask).sum()))
    for _ in range(rounds):
        slope = (target - value) @ gram
        leaving = torch.where(mask, value.square(), torch.inf).argsort(stable=True)
        entering = torch.where(mask, -torch.inf, slope.square()).argsort(descending=True, stable=True)
        count, accepted = limit, False
        while count >= 1 and not accepted:
            tried = mask.clone()
            tried[leaving[:count]] = False
            tried[entering[:count]] = True
            candidate, reached = fit(target, gram, tried)
            accepted = reached < loss * (1 - 1e-6)
            if accepted:
                mask, value, loss, limit = tried, candidate, reached, count
            count //= 2
        if not accepted:
            break
    return value


def fit(target: Tensor, gram: Tensor, mask: Tensor) -> tuple[Tensor, float]:
    """Return the weights of least error on a mask, and that error."""
    kept = mask.nonzero().squeeze(1)
    value = torch.zeros_like(target)
    if len(kept):
        value[kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ target)
    error = target - value
    return value, float(error @ gram @ error)
