"""MRP: all weights that a row loses are removed together, with one exact compensation for all of them.

Zhao et al., "Pruning Foundation Models for High Accuracy without Retraining", Findings of EMNLP 2024, arXiv 2410.15567.
With Q the inverse of the damped Gram, removing the set P from a row w costs `w_P (Q_PP)^-1 w_P^T` once the rest of the row
moves by `-w_P (Q_PP)^-1 Q_P,:`. Solution M is this formula; solution S treats each weight of P as if it were removed alone.

How it is computed here:

- The moved row is the least squares solution on what is kept (Schur complement), so solution M is the masked refit of all
  rows at once: no inverse of `(Q_PP)` for each row, no loop over rows.
- Weights are removed in `rounds`, with all rows compensated in between from their original weights, so that a weight whose
  substitute is gone is no longer cheap. Solution S of the weights that just went is the first guess of each solution M,
  and a few steps of conjugate gradients make up for its missing cross terms.
- Q knows the substitutes that a weight has in the whole row, so both of two equal inputs look free although only one is.
  The Q of what each row has left would know better and costs an inverse per row. Foresight gives nearly the same for all
  rows at once: a random part of a row stands in for the rest of it as a ridge does, with as many degrees of freedom as
  weights will be left. Where a quarter of the inputs comes twice, 50 to 70 % zeros lose less than half of what they lose
  without; spectra of k^-1.5 and k^-2 lose 3 to 17 % less, k^-1 no more; with fewer tokens than inputs the loss on other
  tokens is 10 to 27 % lower (`benchmarks/bench_mrp.py`). SmolLM2 gains nothing by it: its perplexity hardly moves, and
  is higher at 70 % on shared statistics (docs/results.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, combinations_with_replacement
from math import comb
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.errors import PatternError
from secateur.core.linalg import damped, inverse_factor, refit, refit_iterative
from secateur.core.method import method
from secateur.core.pattern import NM, pruned_count
from secateur.core.problem import LayerProblem, Pruned
from secateur.core.select import top_of_groups, top_of_matrix, top_of_rows
from secateur.methods.pruners.alps import penalised_inverse
from secateur.methods.pruners.sparsegpt import slab_keeps

CANDIDATES = 1000  # sets that a group may lose, at most, for the joint score; 12 inputs have 924
RIDGES = (1e-4, 0.3, 1e3)  # least, first tried and largest ridge
TRIES = 10  # inverses at most to find it
NEAR = 0.02  # of the share of the degrees of freedom, within which it is found
CORRECTIONS = 4  # conjugate gradient steps between two rounds; the last compensation goes on until it settles


@method
class MRP:
    """One-shot pruner: scores, removal in rounds, joint compensation.

    Attributes:
        variant: the mask's solution, then the compensation's. Mask S ranks single weights by `w^2 / Q_jj`; mask M, for
            N:M patterns alone, takes the set with the least joint loss in each group. Compensation S adds up the moves of
            single removals, without their cross terms; compensation M is exact for its mask.
        damping: what is added to the diagonal of the Gram, as a fraction of its mean.
        rounds: portions that the weights are removed in, each smaller than the one before; 1 chooses the whole mask from
            the dense row. For an N:M pattern a portion is every `rounds`-th group.
        block_size: None, or columns of a block: blocks are then decided one after the other from the left, as many as
            there are, instead of `rounds`; the budget is spread over them as in SparseGPT.
        foresight: rank single weights by what losing them costs once as many others are gone as the pattern removes,
            instead of while all are there as published. Sets of mask M are always compared as published.
    """

    variant: Literal["SS", "SM", "MS", "MM"] = "SM"
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    rounds: Annotated[int, Field(ge=1)] = 16
    block_size: Annotated[int, Field(ge=1)] | None = None
    foresight: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    scope: ClassVar[Literal["row", "layer"]] = "layer"
    gram_copies: ClassVar[int] = 4  # tests/engine/test_memory.py measures it

    def prune(self, problem: LayerProblem) -> Pruned:
        """Return `problem` solved by rounds of removal and compensation.

        Inputs that are never active are pruned first, and so are the zeros of `problem.start`, whose values are not used.

        Raises:
            PatternError: if the mask's solution is M and the pattern is unstructured, or its groups have too many sets.
        """
        joint, exact = self.variant[0] == "M", self.variant[1] == "M"
        if joint:
            _refuse_unless_joint(problem, self.variant)
        inverse, damping = self._inverse(problem)
        gram, costs = problem.need("gram"), self._costs(problem)
        settled = self._settled(problem)
        mask, value = torch.ones_like(settled), problem.weight
        if problem.frozen is not None:
            mask = ~problem.frozen
            value = single_compensation(value, mask, inverse)
        portions = list(self._portions(problem))
        for number, (columns, keep) in enumerate(portions):
            if joint:
                chosen = self._joint_mask(problem, value, mask, settled, columns)
            else:
                score = value[:, columns].square() * costs[columns]
                score.masked_fill_(settled[:, columns], -1.0).masked_fill_(~mask[:, columns], -torch.inf)
                chosen = self._single_mask(problem, score, keep)
            before, mask = mask, mask.clone()
            mask[:, columns] &= chosen
            value = single_compensation(value, ~before | mask, inverse) * mask
            if exact and number + 1 < len(portions):
                value = refit_iterative(problem.weight, gram, mask, value, damping, CORRECTIONS, tolerance=0.0)
        if bool(mask.all()):
            return Pruned(problem.weight.clone(), mask)
        if exact:
            value = refit(problem.weight, gram, mask, damping, start=value)
        return Pruned.keep(value, mask)

    def compensate(self, problem: LayerProblem, mask: Tensor) -> Pruned:
        """Return the weights that the variant's compensation gives to a mask chosen elsewhere, in one removal.

        Args:
            problem: its pattern is not looked at.
            mask: bool `(out_features, in_features)`, True = kept.
        """
        inverse, damping = self._inverse(problem)
        value = single_compensation(problem.weight, mask, inverse)
        if self.variant[1] == "M":
            value = refit(problem.weight, problem.need("gram"), mask, damping, start=value)
        return Pruned.keep(value, mask.clone())

    def score(self, problem: LayerProblem) -> Tensor:
        """Return `w^2 / Q_jj`: the loss of removing each weight alone and re-solving for the others of its row.

        Returns:
            `(out_features, in_features)`, in units of `problem.loss`; 0 for inputs that are never active.
        """
        inverse, _ = self._inverse(problem)
        dead = problem.need("gram").diagonal() <= 0
        return (problem.weight.square() / inverse.diagonal()).masked_fill_(dead, 0.0)

    def _inverse(self, problem: LayerProblem) -> tuple[Tensor, float]:
        """Return Q `(in_features, in_features)` and the damping that it needed."""

        def compute() -> tuple[Tensor, float]:
            upper, used = inverse_factor(problem.need("gram"), self.damping)
            return upper.T @ upper, used

        return problem.once(("mrp", self.damping), compute)

    def _costs(self, problem: LayerProblem) -> Tensor:
        """Return what losing a weight of 1 costs, `(in_features,)`: `1 / Q_jj`, or what foresight makes of it."""
        if not self.foresight:
            return 1.0 / self._inverse(problem)[0].diagonal()
        share = 1.0 - problem.pattern.sparsity

        def compute() -> Tensor:
            regular = damped(problem.need("gram"), self._inverse(problem)[1])
            scale = regular.diagonal().sqrt()
            unit = regular.div_(scale).div_(scale[:, None])
            return own_parts(unit, share) * scale.square()

        return problem.once(("mrp", self.damping, share), compute)

    def _settled(self, problem: LayerProblem) -> Tensor:
        """Return what is pruned before anything else, bool `(out_features, in_features)`."""
        settled = (problem.need("gram").diagonal() <= 0).expand_as(problem.weight)
        return settled.clone() if problem.start is None else settled | (problem.start == 0)

    def _portions(self, problem: LayerProblem) -> Iterator[tuple[Tensor, int | Tensor]]:
        """Yield the columns that each portion is chosen from, and how many entries they keep after it.

        The count holds for the layer, or for each row; that of an N:M pattern is the pattern's own.
        """
        pattern, (rows, columns) = problem.pattern, problem.weight.shape
        everything = torch.arange(columns, device=problem.weight.device)
        if isinstance(pattern, NM):
            groups = everything.reshape(-1, pattern.m)
            if self.block_size is None:
                parts = [groups[first :: self.rounds] for first in range(min(self.rounds, len(groups)))]
            else:
                parts = list(torch.split(groups, -(-self.block_size // pattern.m)))
            yield from ((part.reshape(-1), pattern.n) for part in parts)
            return
        scope = pattern.counted_over(self.scope)
        if self.block_size is not None:
            blocks = torch.split(everything, self.block_size)
            yield from zip(blocks, slab_keeps(problem, scope, self.block_size), strict=True)
            return
        size = columns if scope == "row" else rows * columns
        total = pruned_count(pattern.sparsity, size)
        for left in reversed(range(self.rounds)):
            # the later a portion, the more each of its removals costs, hence the smaller it is: (1 - t)^2 remain to go
            yield everything, size - total + total * left**2 // self.rounds**2

    def _single_mask(self, problem: LayerProblem, score: Tensor, keep: int | Tensor) -> Tensor:
        """Return the largest scores of a portion, bool, same shape."""
        pattern = problem.pattern
        if isinstance(pattern, NM):
            return top_of_groups(score, pattern.n, pattern.m)
        if pattern.counted_over(self.scope) == "row":
            return top_of_rows(score, keep)
        return top_of_matrix(score, int(keep))

    def _joint_mask(
        self, problem: LayerProblem, value: Tensor, mask: Tensor, settled: Tensor, columns: Tensor
    ) -> Tensor:
        """Return the mask of some whole groups whose removal costs least, bool `(out_features, len(columns))`."""
        pattern = problem.pattern
        assert isinstance(pattern, NM)
        n, m = pattern.n, pattern.m
        inverse, _ = self._inverse(problem)
        table = problem.once(("mrp", self.damping, n, m), lambda: joint_losses(inverse, n, m))
        losses = group_losses(value[:, columns], table[columns[::m] // m], m)
        # frozen entries go first, then those that are zero anyway: only sets that hold most of them are compared
        urgency = (~mask[:, columns]) * (m + 1.0) + settled[:, columns]
        removed = removed_sets(n, m, value.device)
        held = urgency.reshape(len(value), -1, m) @ removed.T.to(urgency.dtype)  # (out, groups, sets)
        losses.masked_fill_(held < held.amax(2, keepdim=True), torch.inf)
        return ~removed[losses.argmin(2)].reshape(len(value), -1)


def own_parts(unit: Tensor, share: float) -> Tensor:
    """Return the part of each input that a random `share` of the inputs cannot be expected to express.

    The inputs of a random part of a row explain another input about as well as all of them do under the ridge t that
    leaves `tr(A (A + t)^-1)` degrees of freedom, their number; what is left over is `1 / [(A + t)^-1]_jj - t`. Newton's
    steps on the logarithm of t find it.

    Args:
        unit: A, `(in_features, in_features)`, positive semi-definite with unit diagonal.
        share: between 0 and 1.

    Returns:
        `(in_features,)`, between 0 and 1.
    """
    least, ridge, most = RIDGES
    inverse = penalised_inverse(unit, ridge)
    for _ in range(TRIES - 1):
        apart = float(inverse.diagonal().mean()) * ridge
        miss = apart - (1.0 - share)
        if abs(miss) < NEAR or (miss < 0 and ridge >= most) or (miss > 0 and ridge <= least):
            break
        slope = apart - float(torch.linalg.vector_norm(inverse)) ** 2 / len(unit) * ridge**2  # of `apart` in log ridge
        ridge = min(max(ridge * math.exp(min(max(-miss / max(slope, 0.02), -3.0), 3.0)), least), most)
        inverse = penalised_inverse(unit, ridge, inverse)
    return (1.0 / inverse.diagonal() - ridge).clamp_(0.0, 1.0)


def single_compensation(weight: Tensor, mask: Tensor, inverse: Tensor) -> Tensor:
    """Return solution S: every removed weight is compensated as if it went alone, and the moves are added up.

    Args:
        weight: `(out_features, in_features)`.
        mask: bool `(out_features, in_features)`, True = kept.
        inverse: Q, `(in_features, in_features)`.

    Returns:
        `(out_features, in_features)`, zero where `mask` is False.
    """
    removed = weight * ~mask
    return weight.addmm(removed / inverse.diagonal(), inverse, alpha=-1).mul_(mask)


def removed_sets(n: int, m: int, device: torch.device | None = None) -> Tensor:
    """Return the sets of `m - n` entries that a group may lose, bool `(sets, m)`, in lexicographic order."""
    sets = torch.zeros(comb(m, n), m, dtype=torch.bool)
    for row, members in enumerate(combinations(range(m), m - n)):
        sets[row, list(members)] = True
    return sets.to(device)


def joint_losses(inverse: Tensor, n: int, m: int) -> Tensor:
    """Return what turns products of two weights of a group into the losses of the sets that it may lose.

    The loss `w_P (Q_PP)^-1 w_P^T` is linear in the products `w_i w_j`, `i <= j`, so one table serves all rows.

    Args:
        inverse: Q, `(in_features, in_features)`.
        n: entries that a group keeps.
        m: width of a group.

    Returns:
        `(groups, m (m + 1) / 2, sets)`, pairs and sets in lexicographic order; in the dtype of `inverse`.
    """
    groups = len(inverse) // m
    blocks = inverse.reshape(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
    lost = removed_sets(n, m, inverse.device)
    members = lost.nonzero()[:, 1].reshape(len(lost), m - n)
    part = blocks[:, members[:, :, None], members[:, None, :]]  # (groups, sets, m - n, m - n)
    solved = torch.cholesky_inverse(torch.linalg.cholesky(part))
    full = blocks.new_zeros(groups, len(lost), m, m)
    full[:, torch.arange(len(lost), device=lost.device)[:, None, None], members[:, :, None], members[:, None, :]] = (
        solved
    )
    first, second = _pairs(m, inverse.device)
    table = full[:, :, first, second] * torch.where(first == second, 1.0, 2.0)
    return table.transpose(1, 2).contiguous().to(inverse.dtype)


def group_losses(value: Tensor, table: Tensor, m: int) -> Tensor:
    """Return the loss of every set that every group may lose (section "multiple removal problem"), for all rows at once.

    Args:
        value: `(rows, groups * m)`.
        table: of `joint_losses`, `(groups, pairs, sets)`.
        m: width of a group.

    Returns:
        `(rows, groups, sets)`.
    """
    first, second = _pairs(m, value.device)
    grouped = value.reshape(len(value), -1, m).transpose(0, 1)  # (groups, rows, m)
    return ((grouped[:, :, first] * grouped[:, :, second]) @ table).transpose(0, 1)


def _pairs(m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first and the second index of all pairs `i <= j` of a group."""
    pairs = torch.tensor(list(combinations_with_replacement(range(m), 2)), device=device)
    return pairs[:, 0], pairs[:, 1]


def _refuse_unless_joint(problem: LayerProblem, variant: str) -> None:
    """Raise unless the groups of the pattern have few enough sets to compare them all."""
    pattern = problem.pattern
    if not isinstance(pattern, NM):
        raise PatternError(
            f"variant `{variant}` of MRP compares whole sets, which pattern `{pattern}` has too many of",
            hint=f"use variant `S{variant[1]}`, or an N:M pattern",
        )
    if comb(pattern.m, pattern.n) > CANDIDATES:
        raise PatternError(
            f"variant `{variant}` of MRP compares at most {CANDIDATES} sets in a group, "
            f"`{pattern}` has {comb(pattern.m, pattern.n)}",
            hint=f"use variant `S{variant[1]}`, or narrower groups",
        )
