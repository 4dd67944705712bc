"""DSnoT: swap pruned and kept weights of a given mask until each row's expected output error is gone.

Zhang et al., "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", ICLR 2024, arXiv 2310.08915.
A row's expected error is the sum of weight times mean input over what it lost; each cycle grows the pruned entry that
reduces it most (for its input variance) and prunes the least important kept entry that reduces it too.

Three things differ from the published program, each for safety: a row that stopped is never written to again, an entry
of the wrong sign is never taken where the right ones are used up, and (`guard`) a row keeps its new mask only if its
squared error on the calibration inputs fell, for driving the mean error to zero may raise it. The guard makes it safe
to refine every linear; the published default leaves those of the MLP alone, which here is a matter of which linears
get this pruner.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.contracts import Pruner, Scoring
from secateur.core.errors import InputError, PatternError, RecipeError
from secateur.core.method import method
from secateur.core.pattern import NM
from secateur.core.problem import LayerProblem, Pruned
from secateur.core.select import top_of_rows
from secateur.methods.pruners.wanda import Wanda, wanda_score


@method
class DSnoT:
    """Mask refinement on top of any pruner, without training and without changing kept weights.

    Attributes:
        base: gives the mask to start from; not run where `problem.start` is given, whose zeros are the mask then.
        cycles: swaps per row at most.
        threshold: a row stops when its absolute expected error is at most this; the published number is meant for sums
            over the tokens of a sequence of `length`, with `relative` it is a fraction of the row's first error.
        relative: see `threshold`; makes the result independent of the sequence length and of the scale of activations.
        length: tokens of a sequence, used by an absolute threshold alone.
        variance_power: how strongly a high variance of its input holds an entry back from growing.
        without_same_sign: accept swaps after which the row's error has the other sign; N:M masks never do.
        guard: keep a row's new mask only where it lowers the row's squared error.
    """

    base: Pruner = Wanda()
    cycles: Annotated[int, Field(ge=0)] = 50
    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    relative: bool = False
    length: Annotated[int, Field(ge=1)] = 2048
    variance_power: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    without_same_sign: bool = True
    guard: bool = True

    @property
    def needs(self) -> frozenset[str]:
        """What the swaps read, the Gram for the guard, and what the base pruner reads."""
        return self.base.needs | {"diag", "mean"} | ({"gram"} if self.guard else frozenset())

    @property
    def scope(self) -> Literal["row", "layer"]:
        """The base pruner's scope; swaps keep the count of every row, hence of the layer."""
        return self.base.scope

    def prune(self, problem: LayerProblem) -> Pruned:
        """Return the base pruner's solution with the masks of its rows refined.

        Entries that stay keep the base pruner's weight, grown ones get the target's weight back.

        Raises:
            InputError: if a statistic is missing, or the zeros of `problem.start` do not fit the pattern.
        """
        first = self._first(problem)
        mean, diag = problem.need("mean"), problem.need("diag")
        # a constant input keeps a trace of variance: the difference of two float32 numbers says no more
        variance = torch.maximum(diag - mean.square(), torch.finfo(diag.dtype).eps * diag)
        mask = refine(
            problem.weight,
            first.weight,
            first.mask,
            mean,
            variance,
            wanda_score(first.weight, diag.sqrt()),
            cycles=self.cycles,
            threshold=self.threshold if self.relative else self.threshold / self.length,
            relative=self.relative,
            variance_power=self.variance_power,
            same_sign=not self.without_same_sign,
            group=problem.pattern.m if isinstance(problem.pattern, NM) else None,
            frozen=problem.frozen,
        )
        weight = torch.where(first.mask, first.weight, problem.weight).masked_fill_(~mask, 0.0)
        if not self.guard:
            return Pruned(weight, mask)
        gram = problem.need("gram")
        changed = (mask != first.mask).any(1)
        better = torch.zeros_like(changed)
        old, new, target = first.weight[changed], weight[changed], problem.weight[changed]
        better[changed] = row_losses(new - target, gram) < row_losses(old - target, gram)
        return Pruned(
            torch.where(better[:, None], weight, first.weight), torch.where(better[:, None], mask, first.mask)
        )

    def score(self, problem: LayerProblem) -> Tensor:
        """Return the base pruner's score, `(out_features, in_features)`.

        Raises:
            RecipeError: if the base pruner has none.
        """
        if not isinstance(self.base, Scoring):
            raise RecipeError(f"the base pruner `{type(self.base).__name__}` of DSnoT has no score of single weights")
        return self.base.score(problem)

    def _first(self, problem: LayerProblem) -> Pruned:
        """Return the point that the swaps start from."""
        if problem.start is None:
            return self.base.prune(problem)
        mask = problem.start != 0
        try:
            problem.pattern.check(mask, self.scope)
        except PatternError as error:
            raise InputError(f"the zeros of `start` are no mask of the pattern: {error}") from error
        return Pruned(problem.start, mask)


def row_losses(error: Tensor, gram: Tensor) -> Tensor:
    """Return `e G e^T` of every row e, `(rows,)`.

    Args:
        error: `(rows, in_features)`.
        gram: `(in_features, in_features)`.
    """
    return ((error @ gram) * error).sum(1)


def refine(
    dense: Tensor,
    sparse: Tensor,
    mask: Tensor,
    mean: Tensor,
    variance: Tensor,
    score: Tensor,
    *,
    cycles: int = 50,
    threshold: float = 0.1,
    relative: bool = False,
    variance_power: float = 1.0,
    same_sign: bool = False,
    group: int | None = None,
    frozen: Tensor | None = None,
) -> Tensor:
    """Return `mask` after up to `cycles` swaps in every row, each of which should bring its expected error towards 0.

    The expected error of a row is `sum_j (dense - sparse)_j mean_j`. While it is positive, the pruned entry with the
    largest positive `dense_j mean_j / variance_j^power` grows and the kept entry with the lowest score among those with
    negative `sparse_j mean_j` is pruned; while it is negative, the signs are the other way round. An entry moves once
    at most. A row stops for good when its error is small enough, its candidates are used up, or a swap is refused.

    Args:
        dense: `(out_features, in_features)`, the weights that grown entries get.
        sparse: `(out_features, in_features)`, the weights kept so far, zero outside `mask`.
        mask: bool `(out_features, in_features)`.
        mean: `(in_features,)`, mean of each input.
        variance: `(in_features,)`, not negative.
        score: `(out_features, in_features)`, importance of kept entries.
        cycles: swaps per row at most.
        threshold: stop when the absolute error is at most this, or this fraction of the first error.
        relative: see `threshold`.
        variance_power: exponent of the variance.
        same_sign: refuse a swap after which the error has another sign than at first; always on with `group`.
        group: width of the groups of an N:M pattern: the entry to prune is the lowest score in the grown entry's group.
        frozen: bool `(out_features, in_features)`, entries that must not grow.

    Returns:
        bool `(out_features, in_features)` with as many kept entries in each row (and group) as `mask`.
    """
    growth, loss = dense * mean, sparse * mean  # what growing takes from the error, what pruning adds to it
    error = (dense - sparse).double() @ mean.double()  # (rows,)
    stop_at = threshold * error.abs() if relative else torch.full_like(error, threshold)
    sign = error.sign()
    # an input without any variance comes first in the order, but stays finite
    urgency = growth / variance.clamp_min(torch.finfo(variance.dtype).tiny ** 0.5).pow(variance_power)
    pruned = ~mask if frozen is None else ~mask & ~frozen
    count, ends = min(cycles, mask.shape[1]), (1, -1)  # the two ends: an error above zero, an error below
    growing = _Queue([first_of_rows(urgency * end, pruned & (growth * end > 0), count) for end in ends])
    if group is None:
        pruning = _Queue([first_of_rows(-score, mask & (loss * end < 0), count) for end in ends])
    else:
        waiting, lanes = score.masked_fill(~mask, torch.inf), torch.arange(group, device=mask.device)
    result = mask.clone()
    rows = torch.arange(mask.shape[0], device=mask.device)  # rows that have not stopped; no other row is looked at
    for _ in range(count):
        rows = rows[error[rows].abs() > stop_at[rows]]
        if not rows.numel():
            break
        end = (error[rows] < 0).long()
        grown, possible = growing.next(end, rows)
        if group is None:
            dropped, more = pruning.next(end, rows)
        else:
            start = grown - grown % group
            rivals = waiting[rows[:, None], start[:, None] + lanes]  # (rows, group)
            dropped, more = start + rivals.argmin(1), rivals.min(1).values < torch.inf
        after = error[rows] + loss[rows, dropped] - growth[rows, grown]
        accepted = possible & more
        if same_sign or group is not None:
            accepted &= after.sign() == sign[rows]
        rows, grown, dropped = rows[accepted], grown[accepted], dropped[accepted]
        error[rows] = after[accepted]
        result[rows, grown] = True
        result[rows, dropped] = False
        if group is not None:
            waiting[rows, dropped] = torch.inf
    return result


def first_of_rows(key: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the columns of the `count` largest valid keys of each row in order, and how many there are.

    Args:
        key: `(rows, columns)`, finite where `valid`.
        valid: bool `(rows, columns)`.
        count: columns to return per row, at most `columns`.

    Returns:
        int64 `(rows, count)`, meaningless behind the valid ones, the lower column first among equals; int64 `(rows,)`.
    """
    hidden = key.masked_fill(~valid, -torch.inf)
    found = top_of_rows(hidden, count).nonzero()[:, 1].reshape(key.shape[0], count)
    order = hidden.gather(1, found).sort(dim=1, descending=True, stable=True).indices
    return found.gather(1, order), valid.sum(1).clamp_max(count)


class _Queue:
    """Columns of each row in the order they are to be used, one list for each sign of the error."""

    def __init__(self, ends: list[tuple[Tensor, Tensor]]) -> None:
        self.columns = torch.stack([columns for columns, _ in ends])  # (2, rows, count)
        self.available = torch.stack([available for _, available in ends])  # (2, rows)
        self.taken = torch.zeros_like(self.available)

    def next(self, end: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next column of the list `end[i]` of each `rows[i]`, and whether there was one left."""
        position = self.taken[end, rows]
        self.taken[end, rows] += 1
        return self.columns[end, rows, position], position < self.available[end, rows]
