"""FISTAPruner as described: plain weights, one l1 penalty, lambda by the ratio of two errors, no re-solving.

Zhao et al., arXiv 2408.03728. The authors published no program, and not how lambda starts; here it starts at a thousandth
of the median of |W G| and doubles until the ratio falls below its limit for the first time, then the interval is halved.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fista(value: Tensor, gram: Tensor, linear: Tensor, penalty: float, lipschitz: float, steps: int) -> Tensor:
    """Return a lasso's iterate after `steps` accelerated proximal steps."""
    ahead, momentum = value, 1.0
    for _ in range(steps):
        stepped = ahead - (ahead @ gram - linear) / lipschitz
        following = stepped.sign() * (stepped.abs() - penalty / lipschitz).clamp_min(0)
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = following + (momentum - 1) / grown * (following - value)
        value, momentum = following, grown
    return value


def round_to(value: Tensor, sparsity: float, n: int, m: int) -> Tensor:
    """Return `value` with the smallest magnitudes of the layer, or of each group of `m`, set to zero."""
    if m:
        order = value.abs().reshape(-1, m).argsort(dim=1, stable=True)[:, : m - n]
        return value.reshape(-1, m).scatter(1, order, 0.0).reshape(value.shape)
    smallest = value.abs().flatten().argsort(stable=True)[: int(sparsity * value.numel() + 1e-6)]
    return value.flatten().index_fill(0, smallest, 0.0).reshape(value.shape)


def error(difference: Tensor, gram: Tensor) -> float:
    """Return the Frobenius norm of `difference X`."""
    return float(((difference @ gram) * difference).sum()) ** 0.5


def prune(
    weight: Tensor,
    gram: Tensor,
    start: Tensor,
    sparsity: float = 0.5,
    n: int = 0,
    m: int = 0,
    steps: int = 20,
    patience: int = 3,
    ratio: float = 0.3,
    rounds: int = 40,
) -> Tensor:
    """Return the pruned weight `(out, in)`; its zeros are the mask.

    Args:
        weight: `(out, in)`, the target.
        gram: `(in, in)`.
        start: `(out, in)`, the warm start, a solution of another method.
        sparsity: fraction of zeros, where `m` is 0.
        n: entries kept of every `m`.
        m: width of a group, 0 for unstructured.
        steps: proximal steps for each lambda.
        patience: trials without improvement that end the search.
        ratio: rounding error over total error above which lambda is too small.
        rounds: trials at most.
    """
    lipschitz = float(torch.linalg.eigvalsh(gram)[-1])
    linear = weight @ gram
    low, high = 0.0, float(linear.abs().max())
    penalty, bracketed, failures = 1e-3 * float(linear.abs().median()), False, 0
    best, best_error = start, error(start - weight, gram)
    for _ in range(rounds):
        solution = fista(best, gram, linear, penalty, lipschitz, steps)
        rounded = round_to(solution, sparsity, n, m)
        total, rounding = error(rounded - weight, gram), error(rounded - solution, gram)
        if total < best_error:
            best, best_error, failures = rounded, total, 0
        else:
            failures += 1
        if rounding > ratio * total:
            low = penalty
        else:
            high, bracketed = penalty, True
        penalty = (low + high) / 2 if bracketed else 2 * penalty
        if failures == patience or high - low < 1e-6 * high:
            break
    return best
