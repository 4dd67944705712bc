"""MRP as described: row by row, block of columns by block of columns, an explicit inverse for what each row has lost.

Zhao et al., arXiv 2410.15567. The authors published no program, so this is a plain reading of the formulas: with Q the
inverse of the damped Gram, w a row and P everything it has lost so far, removing P costs `w_P (Q_PP)^-1 w_P^T` and moves the
row by `-w_P (Q_PP)^-1 Q_P,:`, always from the original row. Each block of columns is scored with the moved row and with the
inverse for what the row has left, `Q - Q_:,P (Q_PP)^-1 Q_P,:`; the rows of a block compete for its share of the budget.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor


def inverse(gram: Tensor, damping: float = 0.01) -> Tensor:
    """Return the inverse of the damped Gram."""
    gram = gram.clone()
    dead = gram.diagonal() == 0
    gram[dead, dead] = 1
    gram.diagonal().add_(damping * gram.diagonal().mean())
    return torch.cholesky_inverse(torch.linalg.cholesky(gram))


def compensate(row: Tensor, lost: Tensor, inverse: Tensor, joint: bool = True) -> Tensor:
    """Return a row `(in,)` after losing the indices `lost`, all together, or each as if alone."""
    if not len(lost):
        return row.clone()
    part = inverse[lost]
    if joint:
        moved = row - torch.linalg.solve(part[:, lost], row[lost]) @ part
    else:
        moved = row - (row[lost] / inverse.diagonal()[lost]) @ part
    moved[lost] = 0
    return moved


def set_loss(row: Tensor, lost: Tensor, inverse: Tensor) -> Tensor:
    """Return the loss of removing the indices `lost` from a row together."""
    return row[lost] @ torch.linalg.solve(inverse[lost][:, lost], row[lost])


def best_set(row: Tensor, inverse: Tensor, size: int) -> tuple[int, ...]:
    """Return the set of `size` indices of a short row whose joint removal costs least; the first of equals."""
    sets = list(combinations(range(len(row)), size))
    losses = torch.stack([set_loss(row, torch.tensor(each, dtype=torch.long), inverse) for each in sets])
    return sets[int(losses.argmin())]


def prune(
    weight: Tensor,
    gram: Tensor,
    sparsity: float = 0.5,
    n: int = 0,
    m: int = 0,
    variant: str = "SM",
    damping: float = 0.01,
    block_size: int = 128,
) -> Tensor:
    """Return the pruned weight `(out, in)`; its zeros are the mask.

    Args:
        weight: `(out, in)`.
        gram: `(in, in)`.
        sparsity: fraction of zeros, where `m` is 0.
        n: entries kept of every `m`.
        m: width of a group, 0 for unstructured.
        variant: how the mask is chosen, then how it is compensated: S, single, or M, multiple.
        damping: fraction of the mean diagonal.
        block_size: columns that are chosen together.
    """
    rows, columns = weight.shape
    full = inverse(gram, damping)
    mask = torch.ones_like(weight, dtype=torch.bool)
    current = weight.clone()
    removed = 0
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        local = [_left(full, (~mask[row]).nonzero()[:, 0], start, stop) for row in range(rows)]
        if m == 0:
            wanted = int(sparsity * rows * stop + 1e-6) - removed
            removed += wanted
            scores = torch.stack([current[row, start:stop] ** 2 / local[row].diagonal() for row in range(rows)])
            cheapest = scores.flatten().argsort(stable=True)[:wanted]
            mask[cheapest // (stop - start), start + cheapest % (stop - start)] = False
        else:
            for row in range(rows):
                for first in range(start, stop, m):
                    group = slice(first - start, first - start + m)
                    part = local[row][group, group]
                    values = current[row, first : first + m]
                    if variant[0] == "M":
                        lost = torch.tensor(best_set(values, part, m - n), dtype=torch.long)
                    else:
                        lost = (values**2 / part.diagonal()).argsort(stable=True)[: m - n]
                    mask[row, first + lost] = False
        for row in range(rows):
            current[row] = compensate(weight[row], (~mask[row]).nonzero()[:, 0], full, joint=variant[1] == "M")
    return current


def _left(full: Tensor, lost: Tensor, start: int, stop: int) -> Tensor:
    """Return the block `[start, stop)` of the inverse for a row that has lost the indices `lost`."""
    block = full[start:stop, start:stop]
    if not len(lost):
        return block
    across = full[lost, start:stop]
    return block - across.T @ torch.linalg.solve(full[lost][:, lost], across)
