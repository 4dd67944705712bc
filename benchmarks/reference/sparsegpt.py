"""SparseGPT as published: factor, inverse, factor; one column at a time; one threshold per slab of 128 columns.

Frantar & Alistarh, arXiv 2301.00774. A plain reading of the algorithm for comparison, slow where the original is slow.
Two habits of the original are behind a switch each, so that masks can be compared at the same budget:

- `exact=False` removes every entry not above the k-th smallest saliency (0-based), which is k + 1 entries per slab and
  all ties; `exact=True` removes those strictly below it, which is k.
- the original counts the *pruned* entries of a group of M; here `n` is the number kept, as everywhere in this project.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_batch(gram: Tensor, samples: int, inputs: Tensor) -> tuple[Tensor, int]:
    """Return the running mean over sequences of `2 x x^T` after one more sequence `(tokens, in)`, and their number."""
    gram = gram * (samples / (samples + 1))
    scaled = inputs.float().T * (2 / (samples + 1)) ** 0.5  # (in, tokens)
    return gram + scaled.matmul(scaled.T), samples + 1


def factor(gram: Tensor, damping: float = 0.01) -> Tensor:
    """Return the upper factor of the inverse of the damped Gram: factor, inverse, factor again."""
    gram = gram.clone()
    dead = gram.diagonal() == 0
    gram[dead, dead] = 1
    everything = torch.arange(gram.shape[0])
    gram[everything, everything] += damping * gram.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True)


def prune(
    weight: Tensor,
    gram: Tensor,
    sparsity: float = 0.5,
    n: int = 0,
    m: int = 0,
    damping: float = 0.01,
    block_size: int = 128,
    exact: bool = True,
    mask: Tensor | None = None,
    upper: Tensor | None = None,
) -> Tensor:
    """Return the pruned weight `(out, in)`; its zeros are the mask.

    Args:
        weight: `(out, in)`, float32.
        gram: `(in, in)`, any multiple of the mean of x x^T.
        sparsity: fraction of zeros, where `m` is 0.
        n: entries kept of every `m`.
        m: width of a group, 0 for unstructured.
        damping: fraction of the mean diagonal.
        block_size: columns that are selected and propagated together.
        exact: see above.
        mask: an external mask, True = kept, instead of a selection.
        upper: `factor(gram, damping)`, if it is at hand.
    """
    weight = weight.clone()
    weight[:, gram.diagonal() == 0] = 0
    columns = weight.shape[1]
    upper = factor(gram, damping) if upper is None else upper

    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        slab = weight[:, start:stop].clone()
        result, errors = torch.zeros_like(slab), torch.zeros_like(slab)
        inner = upper[start:stop, start:stop]
        if mask is not None:
            removed = ~mask[:, start:stop]
        elif m == 0:
            saliency = slab**2 / inner.diagonal().reshape(1, -1) ** 2
            ranked = saliency.flatten().sort().values
            index = int(saliency.numel() * sparsity)
            threshold = ranked[min(index, ranked.numel() - 1)]
            removed = saliency < threshold if exact else saliency <= threshold
        else:
            removed = torch.zeros_like(slab, dtype=torch.bool)
        for j in range(stop - start):
            column, pivot = slab[:, j], inner[j, j]
            if mask is None and m != 0 and j % m == 0:
                saliency = slab[:, j : j + m] ** 2 / inner.diagonal()[j : j + m].reshape(1, -1) ** 2
                removed.scatter_(1, j + saliency.topk(m - n, dim=1, largest=False).indices, True)
            kept = column.clone()
            kept[removed[:, j]] = 0
            result[:, j] = kept
            error = (column - kept) / pivot
            slab[:, j:] -= error.unsqueeze(1).matmul(inner[j, j:].unsqueeze(0))
            errors[:, j] = error
        weight[:, start:stop] = result
        weight[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    return weight
