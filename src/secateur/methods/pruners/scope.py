"""SCOPE: exchange a kept weight for a pruned one wherever that lowers a row's error, until no exchange does.

Zhu et al., "Sparsity-Constraint Optimization via Splicing Iteration", arXiv 2406.12017; the idea is that of Zhu et al.,
"A polynomial algorithm for best-subset selection problem", PNAS 2020. The least useful kept variables are spliced out,
the most promising dropped ones in, and the exchange stays if the refitted loss falls.

The published solver takes any convex loss, ranks by approximate scores and refits by a general optimiser to see whether
an exchange pays. The error of a row is a quadratic form, so here the loss *after* refitting is known for every pair
beforehand. With H the damped correlations of the inputs, S the kept columns, `A = (H_SS)^-1`, `T = A H_SN`,
`s_k = H_kk - H_kS T_k` and the residual `R = (w_target - w) H`:

    adding k       lowers the loss by R_k^2 / s_k           and moves w_S by -T_k R_k / s_k
    then losing j  raises it by (w_j - T_jk R_k / s_k)^2 / (A_jj + T_jk^2 / s_k)

The best exchange of every row is carried out, and A and T follow by an update of rank two: nothing is refitted, every
step lowers the loss, and at the end no exchange of two weights does by more than the tolerance. All rows of a batch move
together. In an N:M pattern both partners are of one group. Rows keep the counts that the base pruner gave them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.contracts import Pruner, Scoring
from secateur.core.errors import PatternError, RecipeError
from secateur.core.linalg import BATCH_BYTES, refit_iterative
from secateur.core.method import method
from secateur.core.pattern import NM
from secateur.core.problem import LayerProblem, Pruned
from secateur.methods.pruners.alps import standardised, unscaled
from secateur.methods.pruners.dsnot import row_losses
from secateur.methods.pruners.sparsegpt import SparseGPT

PROMISING = 16  # columns with the largest gain that are looked at first; the others only where these give no exchange
CPU_BYTES = 32 << 20  # of the inverses of a batch of rows; fewer bytes stay in the cache, more rows share a call
SHRINK = 0.75  # a batch is packed anew when less of it is still moving
STEPS, TOLERANCE = 30, 1e-6  # conjugate gradients that take the rounding of many updates out of the weights


@method
class SCOPE:
    """Exact exchanges on top of any pruner, and the exact weights of the mask they end at.

    Attributes:
        base: gives the mask to start from; not run where `problem.start` is a point of the pattern, whose zeros are
            the mask then.
        swaps: exchanges per row at most.
        tolerance: an exchange must lower the error of its row by more than this fraction.
        damping: added to the mean square of each input, as a fraction of it; at least 0.001, so that inverses in
            float32 can be trusted.
    """

    base: Pruner = SparseGPT()
    swaps: Annotated[int, Field(ge=0)] = 200
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    damping: Annotated[float, Field(ge=1e-3, allow_inf_nan=False)] = 0.02

    @property
    def needs(self) -> frozenset[str]:
        """The Gram, and what the base pruner reads."""
        return self.base.needs | {"gram"}

    @property
    def scope(self) -> Literal["row", "layer"]:
        """The base pruner's scope; exchanges keep the count of every row, hence of the layer."""
        return self.base.scope

    def prune(self, problem: LayerProblem) -> Pruned:
        """Return the base pruner's solution, with every row that exchanges and exact weights make better replaced.

        A `problem.start` that has the pattern's zeros is polished itself; any other goes to the base pruner, and its
        zeros stay out of the exchange.

        Raises:
            InputError: if a statistic is missing.
        """
        gram = problem.need("gram")
        barred = problem.frozen
        first = self._given(problem)
        if first is None:
            first = self.base.prune(problem)
            if problem.start is not None:
                zeros = problem.start == 0
                barred = zeros if barred is None else barred | zeros
        if not bool(first.mask.any()) or bool(first.mask.all()):
            return first
        scale, unit = standardised(problem, self.damping)
        target = problem.weight * scale
        pattern = problem.pattern
        found = splice(
            target,
            unit,
            first.mask,
            barred=barred,
            group=pattern.m if isinstance(pattern, NM) else None,
            swaps=self.swaps,
            tolerance=self.tolerance,
        )
        weight = refit_iterative(target, unit, found.mask, found.weight, 0.0, STEPS, TOLERANCE)
        found = unscaled(problem, scale, Pruned(weight, found.mask))
        old, new = (row_losses(point.weight - problem.weight, gram) for point in (first, found))
        better = (new < old)[:, None]
        return Pruned.keep(torch.where(better, found.weight, first.weight), torch.where(better, found.mask, first.mask))

    def score(self, problem: LayerProblem) -> Tensor:
        """Return the base pruner's score, `(out_features, in_features)`.

        Raises:
            RecipeError: if the base pruner has none.
        """
        if not isinstance(self.base, Scoring):
            raise RecipeError(f"the base pruner `{type(self.base).__name__}` of SCOPE has no score of single weights")
        return self.base.score(problem)

    def _given(self, problem: LayerProblem) -> Pruned | None:
        """Return `problem.start` if its zeros are a mask of the pattern."""
        if problem.start is None:
            return None
        mask = problem.start != 0
        try:
            problem.pattern.check(mask, self.scope)
        except PatternError:
            return None
        return Pruned(problem.start, mask)


def splice(
    target: Tensor,
    gram: Tensor,
    mask: Tensor,
    *,
    barred: Tensor | None = None,
    group: int | None = None,
    swaps: int = 200,
    tolerance: float = 1e-4,
) -> Pruned:
    """Return the mask after the best exchange of two weights in every row, again and again, and the exact weights on it.

    Cost per row with s kept of n columns: `s^3 + s^2 (n - s)` flops once, and a few passes over `s n` numbers in each
    round; memory `4 s n` bytes for each row of a batch.

    Args:
        target: `(rows, columns)`.
        gram: `(columns, columns)`, positive definite; in the scale of the target.
        mask: bool `(rows, columns)`, True = kept.
        barred: bool `(rows, columns)`, entries that must not come in.
        group: width of the groups of an N:M mask, inside which exchanges stay; every group keeps equally many then.
        swaps: per row at most.
        tolerance: an exchange must lower its row's error by more than this fraction.

    Returns:
        A mask with as many kept entries in each row (and group); `argmin (v - target) gram (v - target)^T` on it, up
        to the rounding of the updates. A row whose part of `gram` has no factor is returned as it came.
    """
    columns = target.shape[1]
    counts = mask.sum(1)
    result, chosen = target * mask, mask.clone()
    order = counts.argsort(stable=True)  # rows of like count share a batch, so that padding stays small
    room = CPU_BYTES if target.device.type == "cpu" else BATCH_BYTES
    at_once = max(1, room // (target.element_size() * columns * max(int(counts.max()), 1)))
    bordered = torch.zeros(columns + 1, columns + 1, dtype=gram.dtype, device=gram.device)
    bordered[:columns, :columns] = gram  # the last column stands for no column at all
    for start in range(0, len(order), at_once):
        batch = _Batch(order[start : start + at_once], target, bordered, mask, barred, group)
        left = int(batch.moving.sum())
        for _ in range(swaps):
            if not left:
                break
            gain, leaving, entering = batch.best_swaps()
            going = batch.moving & (gain > tolerance * batch.loss + batch.noise)
            before, left = left, int(going.sum())
            if left < before:
                batch.write_(result, chosen, batch.moving & ~going)
                batch.moving = going
                if left < SHRINK * len(going):
                    gain, leaving, entering = (each[going] for each in (gain, leaving, entering))
                    batch.pack_()
            batch.swap_(gain, leaving, entering)
        batch.write_(result, chosen, batch.moving)
    return Pruned.keep(result, chosen)


class _Batch:
    """Rows with all that is known of their exchanges. Slots hold columns; an exchange swaps the contents of two slots.

    Attributes:
        rows: `(b,)`, which rows of the problem these are.
        kept, dropped: `(b, s)` and `(b, d)`, the columns in each slot; `columns` (one past the last) where a row has
            fewer. With groups, slots are in the order of the groups, whatever is exchanged.
        weight: `(b, s)`, the kept weights.
        inverse: `(b, s, s)`, A.
        answer: `(b, s, d)`, T: minus what the kept weights do when a dropped one comes in with 1.
        fresh: `(b, d)`, s_k: the part of a dropped input that the kept ones do not express.
        residual: `(b, d)`, R.
        loss: `(b,)`, errors of the rows.
        noise: `(b,)`, gains that may be rounding.
        empty, closed: bool `(b, s)` and `(b, d)`, slots that nothing leaves, and from which nothing comes in.
        moving: bool `(b,)`, rows that have not stopped; the others go on in vain until the batch is packed.
    """

    def __init__(
        self, rows: Tensor, target: Tensor, gram: Tensor, mask: Tensor, barred: Tensor | None, group: int | None
    ) -> None:
        self.rows, self.gram, self.group = rows, gram, group
        columns = target.shape[1]
        self.kept, self.dropped = _slots(mask[rows]), _slots(~mask[rows])
        self.empty, self.closed = self.kept == columns, self.dropped == columns
        if barred is not None:
            blocked = torch.nn.functional.pad(barred[rows], (0, 1), value=True)
            self.closed = blocked.gather(1, self.dropped)
        wanted = torch.nn.functional.pad(target[rows], (0, 1))
        own = gram.diagonal().clone()
        own[columns] = 1.0
        system = gram[self.kept[:, :, None], self.kept[:, None, :]]
        system.diagonal(dim1=1, dim2=2).copy_(own[self.kept])
        factor, info = torch.linalg.cholesky_ex(system)
        self.moving = info == 0
        self.inverse = torch.cholesky_inverse(factor)
        cross = gram[self.kept[:, :, None], self.dropped[:, None, :]]
        self.answer = self.inverse @ cross
        self.fresh = own[self.dropped] - (cross * self.answer).sum(1)
        lost = wanted.gather(1, self.dropped)
        self.weight = wanted.gather(1, self.kept) + (self.answer @ lost[:, :, None]).squeeze(2)
        error = wanted.scatter(1, self.kept, wanted.gather(1, self.kept) - self.weight)
        product = error @ gram
        self.residual = product.gather(1, self.dropped)
        self.loss = (error * product).sum(1)
        self.noise = (wanted * (wanted @ gram)).sum(1) * torch.finfo(target.dtype).eps

    def best_swaps(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each row how much its best exchange lowers its loss, the slot that leaves and the one that enters."""
        enters = self.residual.square().div_(self.fresh).masked_fill_(self.closed, -torch.inf)  # what adding gains
        if self.group is not None:
            return self._best_of_groups(enters, self.group)
        width = self.dropped.shape[1]
        if width <= PROMISING:
            return self._best(slice(None), self.answer, enters, self.fresh, self.residual)
        top = enters.topk(PROMISING, dim=1).indices
        answer = self.answer.gather(2, top[:, None, :].expand(-1, self.answer.shape[1], -1))
        gain, leaving, place = self._best(
            slice(None), answer, enters.gather(1, top), self.fresh.gather(1, top), self.residual.gather(1, top)
        )
        entering = top.gather(1, place[:, None]).squeeze(1)
        rest = (self.moving & ~(gain > self.noise)).nonzero().squeeze(1)
        if len(rest):
            found = self._best(rest, self.answer[rest], enters[rest], self.fresh[rest], self.residual[rest])
            gain[rest], leaving[rest], entering[rest] = found
        return gain, leaving, entering

    def swap_(self, gain: Tensor, leaving: Tensor, entering: Tensor) -> None:
        """Carry out one exchange in every row.

        Args:
            gain: `(b,)`, what it lowers the loss by.
            leaving: `(b,)`, a slot of `kept`.
            entering: `(b,)`, a slot of `dropped`.
        """
        each = torch.arange(len(self.rows), device=self.rows.device)
        out, new = self.kept[each, leaving], self.dropped[each, entering]
        # the entering column: its answer, its products with the dropped columns less what the kept ones express
        answer, fresh = self.answer[each, :, entering], self.fresh[each, entering, None]
        among = self.gram[new[:, None], self.dropped]
        among -= (self.gram[new[:, None], self.kept][:, None, :] @ self.answer).squeeze(1)
        value = self.residual[each, entering, None] / fresh
        # the leaving column, once the other is in: its column of the inverse, its row of the answers
        share = answer[each, leaving, None] / fresh
        column = self.inverse[each, :, leaving] + answer * share
        pivot = column[each, leaving, None]
        row = self.answer[each, leaving] - among * share
        removed = (self.weight[each, leaving, None] - answer[each, leaving, None] * value) / pivot
        scaled, column_scaled = answer / fresh, column / pivot

        self.inverse.baddbmm_(torch.stack([scaled, -column_scaled], 2), torch.stack([answer, column], 1))
        self.answer.baddbmm_(torch.stack([-scaled, -column_scaled], 2), torch.stack([among, row], 1))
        self.weight = self.weight - answer * value - column * removed
        self.fresh = self.fresh - among.square() / fresh + row.square() / pivot
        self.residual = self.residual - among * value + row * removed
        self.loss = self.loss - gain

        # the slots change hands
        self.kept[each, leaving], self.dropped[each, entering] = new, out
        border = column_scaled * share - scaled
        border[each, leaving] = (1.0 / fresh - share.square() / pivot).squeeze(1)
        self.inverse[each, leaving] = border
        self.inverse[each, :, leaving] = border
        self.answer[each, leaving] = among / fresh + row * (share / pivot)
        border = -column_scaled
        border[each, leaving] = (share / pivot).squeeze(1)
        self.answer[each, :, entering] = border
        self.weight[each, leaving] = (value + share * removed).squeeze(1)
        self.fresh[each, entering] = (1.0 / pivot).squeeze(1)
        self.residual[each, entering] = removed.squeeze(1)

    def write_(self, weight: Tensor, mask: Tensor, which: Tensor) -> None:
        """Write the weights and masks of the rows in `which`, bool `(b,)`, into those of the whole problem."""
        rows, kept = self.rows[which], self.kept[which]
        wide = torch.zeros(len(rows), weight.shape[1] + 1, dtype=weight.dtype, device=weight.device)
        weight[rows] = wide.scatter(1, kept, self.weight[which])[:, :-1]
        mask[rows] = wide.scatter(1, kept, 1.0)[:, :-1] > 0

    def pack_(self) -> None:
        """Drop the rows that have stopped."""
        which = self.moving
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "gram":
                setattr(self, name, value[which])

    def _best(
        self, which: Tensor | slice, answer: Tensor, enters: Tensor, fresh: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return gain, kept slot and place among the given dropped ones, of the best exchange of the rows in `which`."""
        leaves = torch.addcmul(self.weight[which, :, None], answer, (residual / fresh)[:, None, :], value=-1).square_()
        own = self.inverse.diagonal(dim1=1, dim2=2)[which]
        leaves /= torch.addcmul(own[:, :, None], answer, answer / fresh[:, None, :])
        change = leaves.sub_(enters[:, None, :]).masked_fill_(self.empty[which, :, None], torch.inf)  # (b, s, places)
        least, index = change.flatten(1).min(1)
        return -least, index // change.shape[2], index % change.shape[2]

    def _best_of_groups(self, enters: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return gain, kept slot and dropped slot of the best exchange inside a group, for each row."""
        groups = (self.gram.shape[0] - 1) // width
        kept, dropped = self.kept.shape[1] // groups, self.dropped.shape[1] // groups
        answer = self.answer.reshape(-1, groups, kept, groups, dropped).diagonal(
            dim1=1, dim2=3
        )  # (b, kept, dropped, g)

        def of_kept(values: Tensor) -> Tensor:
            return values.reshape(-1, groups, kept).transpose(1, 2)[:, :, None, :]

        def of_dropped(values: Tensor) -> Tensor:
            return values.reshape(-1, groups, dropped).transpose(1, 2)[:, None, :, :]

        leaves = (of_kept(self.weight) - answer * of_dropped(self.residual / self.fresh)).square_()
        leaves /= of_kept(self.inverse.diagonal(dim1=1, dim2=2)) + answer.square() / of_dropped(self.fresh)
        least, index = leaves.sub_(of_dropped(enters)).flatten(1).min(1)
        group, place = index % groups, index // groups
        return -least, group * kept + place // dropped, group * dropped + place % dropped


def _slots(mask: Tensor) -> Tensor:
    """Return the columns where `mask` is True, in order, `(rows, most of a row)`; the number of columns as padding."""
    counts = mask.sum(1, keepdim=True)
    width = int(counts.max())
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return order.masked_fill(torch.arange(width, device=mask.device) >= counts, mask.shape[1])
