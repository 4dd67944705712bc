"""ALPS as published: one double precision eigendecomposition, then a dense inverse and a test error at every check.

Meng et al., arXiv 2406.07831. A plain reading of the published program for comparison, slow where the original is slow:
the inverse is rebuilt at every check even if the penalty stays, budgets are met by sorting all entries, a test error is
computed and thrown away, a conjugate gradient step takes three products and its stopping test never fires.
Like the original it works on transposed weights, `(in, out)`, whose groups of M run down the columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

Trace = list[tuple[int, float, float]]


def prune(
    weight: Tensor,
    gram: Tensor,
    sparsity: float = 0.5,
    n: int = 0,
    m: int = 0,
    *,
    rho: float = 0.1,
    iterations: int = 300,
    every: int = 3,
    settle: int = 30,
    damping: float = 0.01,
    steps: int = 10,
    trace: Trace | None = None,
) -> Tensor:
    """Return the pruned weight `(out, in)`; its zeros are the mask.

    Args:
        weight: `(out, in)`, float32.
        gram: `(in, in)`, any multiple of the mean of x x^T.
        sparsity: fraction of zeros of the whole matrix, where `m` is 0.
        n: entries kept of every `m`.
        m: width of a group, 0 for unstructured.
        rho: first penalty.
        iterations: at most.
        every: iterations between two checks of the support.
        settle: from here on a nearly constant support is the end.
        damping: fraction of the mean diagonal.
        steps: of the conjugate gradients at the end.
        trace: gets (iteration, penalty, changed entries as a fraction of the kept) at every check.
    """
    regular = gram.clone()
    regular.diagonal().add_(damping * gram.diagonal().mean())
    scale = regular.diagonal().sqrt() + 1e-8
    regular = regular / scale / scale[:, None]
    first = (weight * scale).T.clone()  # (in, out)
    target = ((weight * scale) @ regular).T  # (in, out)
    kept = round((1 - sparsity) * first.numel()) if m == 0 else first.numel() * n / m
    reference_size = (first * target).sum()

    def project(values: Tensor) -> Tensor:
        return project_all(values, int(kept)) if m == 0 else project_groups(values, n, m)

    values, basis = torch.linalg.eigh(regular.double())

    def inverse(penalty: float) -> Tensor:
        return (basis @ (basis / (values + penalty)).T).float()

    system = inverse(rho)
    sparse = project(first)
    beginning, zeros = sparse.clone(), sparse == 0
    multiplier = torch.zeros_like(first)
    started = False
    dense = first
    for iteration in range(1, iterations + 1):
        dense = system @ (target - multiplier + rho * sparse)
        sparse = project(dense + multiplier / rho)
        multiplier = multiplier + rho * (dense - sparse)
        if iteration % every:
            continue
        now = sparse == 0
        changed = float((now != zeros).sum()) / kept if kept else 0.0
        zeros = now
        if trace is not None:
            trace.append((iteration, rho, changed))
        if changed > 0.1:
            started, rho = True, rho * 1.3
        elif changed > 0.005:
            started, rho = True, rho * 1.2
        elif changed > 0 and started:
            rho *= 1.1
        elif changed > 0:
            rho /= 5
            sparse, multiplier = beginning.clone(), torch.zeros_like(first)
        elif started:
            break
        else:
            rho /= 5
        rho = min(rho, 1e6)
        system = inverse(rho)
        candidate = project(dense)
        error = regular @ candidate - target
        _ = float(((candidate - first).T @ error).diagonal().sum() / reference_size)  # looked at by nobody
        if iteration >= settle and changed < 0.0003:
            break
    final = project(dense)
    return (finish(regular, target, final, steps).T / scale).contiguous()


def project_all(values: Tensor, kept: int) -> Tensor:
    """Return `values` with all but the `kept` largest squares set to zero."""
    flat = values.reshape(-1).clone()
    removed = torch.topk(-(flat**2), flat.numel() - kept).indices
    flat[removed] = 0
    return flat.reshape(values.shape)


def project_groups(values: Tensor, n: int, m: int) -> Tensor:
    """Return `values` `(in, out)` with all but the `n` largest squares of every `m` inputs set to zero."""
    groups = values.T.reshape(-1, m)
    removed = torch.topk(-(groups**2), m - n, dim=1).indices
    return groups.scatter(1, removed, 0.0).reshape(values.shape[1], values.shape[0]).T


def finish(regular: Tensor, target: Tensor, first: Tensor, steps: int) -> Tensor:
    """Return `first` after conjugate gradients on its support, all columns at once."""
    support = (first != 0).float()
    value = first
    residual = (target - regular @ value) * support
    direction = torch.zeros_like(first)
    energy = torch.ones(first.shape[1])
    size = torch.norm(target, dim=1)
    for step in range(steps):
        following = (residual * residual).sum(0)
        factor = following / energy.where(energy != 0, 1e-8) if step else torch.zeros_like(following)
        direction = residual + factor * direction
        energy = following
        curvature = (direction * (regular @ direction)).sum(0)
        length = following / curvature.where(curvature != 0, 1e-8)
        value = value + length * direction
        residual = (residual - length * (regular @ direction)) * support
        if bool((torch.norm(regular @ value - target, dim=1) <= 1e-4 * size).all()):
            break
    return value
