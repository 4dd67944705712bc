"""SparseGPT: one sweep over the columns, in which later columns make up for what earlier ones lost.

Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
arXiv 2301.00774. With U the upper factor of the inverse Gram, `(damped Gram)^-1 = U^T U`, losing the weight `w_j` of a
row costs `(w_j / U_jj)^2` once the weights right of it have moved by `-(w_j / U_jj) U_j,:`. One U serves all rows and
all masks, because columns are only ever eliminated from the left.

The sweep is the published one re-derived for speed, with the same masks:

- U comes from one factorisation and one triangular inverse, shared by all linears with the same inputs;
- its rows are divided by their pivots once, so that what a column loses is simply its removed weights;
- weights are transposed, so that a column is contiguous memory;
- a column is brought up to date when it is reached (one product with what the few columns before it lost), instead of
  updating all later columns each time; what reaches further goes through two levels of matrix products;
- budgets are exact integers: the slabs share the layer's budget by differences of a running total.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.linalg import inverse_factor
from secateur.core.method import method
from secateur.core.pattern import NM, pruned_count
from secateur.core.problem import LayerProblem, Pruned
from secateur.core.select import top_of_lanes, top_of_matrix, top_of_rows

INNER = 16  # columns between two matrix products inside a slab; a group of an N:M pattern is never split

# `choose(values, start, stop)`: the mask of the columns [start, stop), from their present values `(stop - start, out)`
Choose = Callable[[Tensor, int, int], Tensor]


@method
class SparseGPT:
    """One-shot pruner with weight compensation.

    Attributes:
        damping: what is added to the diagonal of the Gram, as a fraction of its mean.
        block_size: columns whose mask is chosen together and whose effect on the rest is one matrix product; widened to
            a multiple of M for an N:M pattern.
    """

    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    block_size: Annotated[int, Field(ge=1)] = 128

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    scope: ClassVar[Literal["row", "layer"]] = "layer"

    def prune(self, problem: LayerProblem) -> Pruned:
        """Return `problem` solved by one sweep, with masks chosen on the way.

        A `layer` budget is spread evenly over the slabs, and inside a slab all rows compete; a `row` budget is spread
        over the slabs of each row. Weights of inputs that are never active become zero and are pruned first, then the
        zeros of `problem.start`; the values of `start` are not used, as the sweep finds better ones from the target.
        """
        columns, pivot, factor = self._prepare(problem)
        pattern, width = problem.pattern, self.block_size
        zeros = None if problem.start is None else (problem.start == 0).T
        frozen = None if problem.frozen is None else problem.frozen.T

        def saliency(values: Tensor, start: int, stop: int) -> Tensor:
            score = values.abs().div_(pivot[start:stop, None])
            if zeros is not None:
                score.masked_fill_(zeros[start:stop], 0.0)
            return score if frozen is None else score.masked_fill_(frozen[start:stop], -torch.inf)

        if isinstance(pattern, NM):
            group, kept = pattern.m, pattern.n

            def choose(values: Tensor, start: int, stop: int) -> Tensor:
                lanes = saliency(values, start, stop).reshape(group, -1)  # a whole slab of groups of one, or one group
                return top_of_lanes(lanes, kept).reshape(values.shape)

        elif pattern.counted_over(self.scope) == "row":
            group, keeps = 1, slab_keeps(problem, "row", width)

            def choose(values: Tensor, start: int, stop: int) -> Tensor:
                return top_of_rows(saliency(values, start, stop).T.contiguous(), keeps[start // width]).T

        else:
            group, keeps = 1, slab_keeps(problem, "layer", width)

            def choose(values: Tensor, start: int, stop: int) -> Tensor:
                return top_of_matrix(saliency(values, start, stop), int(keeps[start // width]))

        mask = sweep_(columns, factor, choose, width, group)
        return Pruned(columns.T.contiguous(), mask.T.contiguous())

    def compensate(self, problem: LayerProblem, mask: Tensor) -> Pruned:
        """Return the weights that the sweep gives to a mask chosen elsewhere.

        Args:
            problem: its pattern is not looked at.
            mask: bool `(out_features, in_features)`, True = kept.
        """
        columns, _, factor = self._prepare(problem)
        kept = mask.T
        sweep_(columns, factor, lambda values, start, stop: kept[start:stop], self.block_size)
        return Pruned(columns.T.contiguous(), mask.clone())

    def score(self, problem: LayerProblem) -> Tensor:
        """Return `w^2 / [H^-1]_jj`: the loss of removing each weight alone and re-solving for the others of its row.

        Returns:
            `(out_features, in_features)`, in units of `problem.loss`; 0 for inputs that are never active.
        """
        pivot, factor = self._factor(problem)
        inverse_diagonal = (factor * pivot[:, None]).square().sum(0)  # of U^T U
        dead = problem.need("gram").diagonal() <= 0
        return (problem.weight.square() / inverse_diagonal).masked_fill_(dead, 0.0)

    def _factor(self, problem: LayerProblem) -> tuple[Tensor, Tensor]:
        """Return the pivots `(in_features,)` and U with its rows divided by them, `(in_features, in_features)`."""

        def compute() -> tuple[Tensor, Tensor]:
            upper, _ = inverse_factor(problem.need("gram"), self.damping)
            pivot = upper.diagonal().clone()
            return pivot, upper.div_(pivot[:, None])

        return problem.once(("sparsegpt", self.damping), compute)

    def _prepare(self, problem: LayerProblem) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weight as columns `(in_features, out_features)`, dead inputs zeroed; pivots and factor."""
        pivot, factor = self._factor(problem)
        columns = problem.weight.T.clone(memory_format=torch.contiguous_format)
        columns[problem.need("gram").diagonal() <= 0] = 0.0
        return columns, pivot, factor


def sweep_(columns: Tensor, factor: Tensor, choose: Choose, block_size: int = 128, group: int = 1) -> Tensor:
    """Prune the columns of a weight from left to right, in place, and return the mask.

    With `e` the row of everything that a row lost, `w - w_pruned = e F`, whatever the mask. Cost: `out * in^2` for the
    products, and two small calls per column.

    Args:
        columns: `(in_features, out_features)`, a weight transposed; ends as the pruned weight, zero where pruned.
        factor: `(in_features, in_features)`, upper triangular with unit diagonal: U, its rows divided by its pivots.
        choose: called once for every slab, or once for every group if `group > 1`, with up-to-date values.
        block_size: columns of a slab.
        group: columns that are decided together inside a slab, from values that earlier groups have already moved.

    Returns:
        bool `(in_features, out_features)`, True = kept.
    """
    size = columns.shape[0]
    width, inner = -(-block_size // group) * group, max(INNER // group, 1) * group
    mask = torch.empty_like(columns, dtype=torch.bool)
    for start in range(0, size, width):
        stop = min(start + width, size)
        slab, lost = columns[start:stop], torch.empty_like(columns[start:stop])
        local = factor[start:stop, start:stop].T.contiguous()  # row j: what column j owes to those before it
        plain = _plain(slab), _plain(lost), _plain(local)
        if group == 1:
            mask[start:stop] = choose(slab, start, stop)
            _mark_removed_(plain[1], _plain(mask[start:stop]))
        for first in range(0, stop - start, inner):
            last = min(first + inner, stop - start)
            if group == 1:
                _eliminate_(*plain, first, last)
            else:
                for low in range(first, last, group):
                    high = low + group
                    plain[0][low:high] -= plain[2][low:high, first:low] @ plain[1][first:low]
                    chosen = choose(slab[low:high], start + low, start + high)
                    mask[start + low : start + high] = chosen
                    _mark_removed_(plain[1][low:high], _plain(chosen))
                    _eliminate_(*plain, low, high)
            slab[last:].addmm_(local[last:, first:last], lost[first:last], alpha=-1)
        slab -= lost  # what was kept stays, what was pruned is exactly zero
        columns[stop:].addmm_(factor[start:stop, stop:].T, lost, alpha=-1)
    return mask


def slab_keeps(problem: LayerProblem, scope: Literal["row", "layer"], width: int) -> Sequence[int | Tensor]:
    """Return how many entries each slab of `width` columns keeps, so that the whole budget is met exactly.

    Entries that are zero anyway (frozen, never active, zero in `start`) count as pruned where they are; what remains of
    the budget is spread over all others evenly, as differences of a running total in integers. If all zeros together
    exceed the budget only the frozen ones are counted; if these do too, which `solve` refuses, none are.

    Args:
        problem: its pattern is unstructured.
        scope: `layer`: one number per slab; `row`: one for all rows, or an integer `(out_features,)` if they differ.
        width: columns of a slab.
    """
    rows, columns = problem.weight.shape
    unit = 1 if scope == "row" else rows
    total = pruned_count(problem.pattern.sparsity, unit * columns)
    edges = [*range(0, columns, width), columns]
    device = problem.weight.device
    sizes = torch.tensor([unit * (stop - start) for start, stop in pairwise(edges)], device=device)
    settled = torch.zeros_like(sizes)  # (slabs,) or (slabs, rows)
    for zeros in _settled(problem):
        counts = torch.stack([zeros[:, start:stop].sum(1) for start, stop in pairwise(edges)])  # (slabs, rows)
        settled = counts if scope == "row" else counts.sum(1)
        if bool((settled.sum(0) <= total).all()):
            break
        settled = torch.zeros_like(sizes)
    if settled.dim() == 2:
        sizes = sizes[:, None]
    running = (sizes - settled).cumsum(0)
    extra = (total - settled.sum(0)) * running // running[-1].clamp_min(1)  # removed up to and including each slab
    keeps = sizes - settled - extra.diff(dim=0, prepend=torch.zeros_like(extra[:1]))
    return keeps.tolist() if keeps.dim() == 1 else list(keeps)


def _settled(problem: LayerProblem) -> Iterator[Tensor]:
    """Yield what may count as pruned beforehand, bool `(out_features, in_features)`: all zeros, then the frozen."""
    found = [] if problem.frozen is None else [problem.frozen]
    if problem.start is not None:
        found.append(problem.start == 0)
    dead = problem.need("gram").diagonal() <= 0
    if bool(dead.any()):
        found.append(dead.expand_as(problem.weight))
    if len(found) > 1 or (found and problem.frozen is None):
        yield torch.stack(found).any(0)
    if problem.frozen is not None:
        yield problem.frozen


def _plain(tensor: Tensor) -> Any:
    """Return the memory of a CPU tensor as a numpy array, whose small operations cost a fifth of torch's."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _mark_removed_(lost: Any, kept: Any) -> None:
    """Write 1 where `kept` is False and 0 where it is True."""
    lost[:] = kept
    lost -= 1
    lost *= -1


def _eliminate_(slab: Any, lost: Any, local: Any, low: int, high: int) -> None:
    """Bring the columns [low, high) of a slab up to date one by one, and write to `lost` what each loses.

    A Python loop of three small calls per column: each column needs what those before it lost.

    Args:
        slab: `(width, out_features)`, tensor or array, changed in place; up to date with everything left of `low`.
        lost: `(width, out_features)`; on entry its rows [low, high) are 1 where a weight is removed, else 0.
        local: `(width, width)`, lower triangular: the slab's part of the factor, transposed.
        low: first column.
        high: one past the last column.
    """
    for j in range(low, high):
        values, gone = slab[j], lost[j]
        if j > low:
            values -= local[j, low:j] @ lost[low:j]
        gone *= values
