"""SCOPE: exchange a kept weight for a pruned one wherever that lowers a row's error, among the weights that matter.

Zhu et al., "Sparsity-Constraint Optimization via Splicing Iteration", arXiv 2406.12017; the idea is that of Zhu et al.,
"A polynomial algorithm for best-subset selection problem", PNAS 2020. The least useful kept variables are spliced out,
the most promising dropped ones in, and the exchange stays if the refitted loss falls.

The published solver takes any convex loss, ranks by approximate scores and refits by a general optimiser to see whether
an exchange pays. The error of a row is a quadratic form, so here the loss *after* refitting is known for every pair
beforehand. With H the damped correlations of the inputs, S the kept columns, `A = (H_SS)^-1`, `T = A H_SN`,
`s_k = H_kk - H_kS T_k` and the residual `R = (w_target - w) H`:

    adding k       lowers the loss by R_k^2 / s_k           and moves w_S by -T_k R_k / s_k
    then losing j  raises it by (w_j - T_jk R_k / s_k)^2 / (A_jj + T_jk^2 / s_k)

As in the published "important search", a round looks at a few columns of each row: the kept ones that are cheapest to
lose and the dropped ones that promise most. All others stay as they are and are eliminated by one Cholesky factor,
which leaves a small table per row of A, T, s, R and w, still exact. The best exchange is carried out in the table, two
sweeps, until none lowers the error by more than the tolerance; rows that moved much get another round. All rows of a
batch move together. In an N:M pattern both partners are of one group. Rows keep the counts that the base pruner gave.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.contracts import Pruner, Scoring
from secateur.core.errors import PatternError, RecipeError
from secateur.core.linalg import BATCH_BYTES, refit_iterative
from secateur.core.method import method
from secateur.core.pattern import NM
from secateur.core.problem import LayerProblem, Pruned
from secateur.methods.pruners.alps import ALPS, penalised_inverse, standardised, unscaled
from secateur.methods.pruners.dsnot import row_losses

CPU_BYTES = 32 << 20  # of a batch of rows; fewer bytes stay in the cache, more rows share a call
RIDGE = 0.1  # what the part of an input that is its own is measured with; between a share of all others and of none
SKETCH = (30, 1e-3)  # conjugate gradients, and their last gain, that are enough to see which columns are important
AGAIN = 1 / 16  # of the important columns: a row that exchanged more of them gets another round
SHRINK = 0.75  # a batch is packed anew when less of it is still moving


@method
class SCOPE:
    """Exact exchanges on top of any pruner, and the exact weights of the mask they end at.

    Attributes:
        base: gives the mask to start from; not run where `problem.start` is a point of the pattern, whose zeros are
            the mask then.
        swaps: exchanges per row at most.
        important: columns of a row that a round looks at, half of them kept and half dropped; with an N:M pattern
            those of the most promising groups. In the end no exchange among the last ones looked at helps; none at
            all if the row has no others.
        tolerance: an exchange must lower the error of its row by more than this fraction.
        damping: added to the mean square of each input, as a fraction of it; at least 0.001, so that inverses in
            float32 can be trusted.
    """

    base: Pruner = ALPS()
    swaps: Annotated[int, Field(ge=0)] = 200
    important: Annotated[int, Field(ge=2)] = 128
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    damping: Annotated[float, Field(ge=1e-3, allow_inf_nan=False)] = 0.01

    gram_copies: ClassVar[int] = 9  # tests/engine/test_memory.py measures it

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
            weight=first.weight * scale,
            barred=barred,
            group=pattern.m if isinstance(pattern, NM) else None,
            swaps=self.swaps,
            tolerance=self.tolerance,
            important=self.important,
        )
        found = unscaled(problem, scale, found)
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
    weight: Tensor | None = None,
    barred: Tensor | None = None,
    group: int | None = None,
    swaps: int = 200,
    tolerance: float = 1e-4,
    important: int = 128,
) -> Pruned:
    """Return the mask after exchanges of two weights in every row, and the exact weights on it.

    Rows in which a round exchanged anything take part in the next. Cost of a round per row, with s kept of n columns
    and p important ones: `s^3 / 3 + s^2 p + 2 s p^2` flops, then a few passes over `p^2` numbers for each exchange.

    Args:
        target: `(rows, columns)`.
        gram: `(columns, columns)`, positive definite; in the scale of the target.
        mask: bool `(rows, columns)`, True = kept.
        weight: `(rows, columns)`, weights on the mask from which the search for the exact ones starts; None takes the
            target's.
        barred: bool `(rows, columns)`, entries that must not come in.
        group: width of the groups of an N:M mask, inside which exchanges stay; every group keeps equally many then.
        swaps: per row at most.
        tolerance: an exchange must lower its row's error by more than this fraction.
        important: columns of a row that are looked at in a round, see `SCOPE`.

    Returns:
        A mask with as many kept entries in each row (and group), in which no exchange among the columns last looked
        at helps, unless `swaps` ended the search; `argmin (v - target) gram (v - target)^T` on it, up to rounding. A
        row whose part of `gram` has no factor keeps its mask.
    """
    columns = target.shape[1]
    if not bool(mask.any()) or bool(mask.all()):
        return Pruned.keep(target, mask)
    value = refit_iterative(target, gram, mask, target if weight is None else weight, 0.0, *SKETCH)
    chosen, counts = mask.clone(), mask.sum(1)
    bordered = torch.zeros(columns + 1, columns + 1, dtype=gram.dtype, device=gram.device)
    bordered[:columns, :columns] = gram  # the last column stands for no column at all
    own = 1.0 / penalised_inverse(gram, RIDGE).diagonal() - RIDGE
    left = torch.full((len(target),), swaps, device=target.device)
    room = CPU_BYTES if target.device.type == "cpu" else BATCH_BYTES
    at_once = max(1, room // (target.element_size() * columns * max(int(counts.max()), 1)))
    rows = counts.argsort(stable=True)  # rows of like count share a batch, so that padding stays small
    while len(rows):
        moved = []
        for start in range(0, len(rows), at_once):
            batch = rows[start : start + at_once]
            around = _Round(target[batch], bordered, value[batch], chosen[batch], left[batch])
            around.choose_(own, important, group, None if barred is None else barred[batch])
            around.reduce_()
            around.search_(tolerance)
            value[batch], chosen[batch], left[batch] = around.value, around.mask, around.left
            moved.append((around.moved > important * AGAIN) & (around.left > 0))
        rows = rows[torch.cat(moved)]
    return Pruned.keep(value, chosen)


class _Round:
    """Exchanges of some rows among a few columns; the others stay kept or dropped, and the kept ones are refitted.

    Attributes:
        target, value: `(b, columns)`.
        mask: bool `(b, columns)`.
        gram: `(columns + 1, columns + 1)`; the last column stands for none, where a row has fewer than others.
        left: `(b,)`, exchanges that may still be made.
        moved: bool `(b,)`, rows that exchanged anything.
        chosen: `(b, p)`, columns that may be exchanged, those kept at first before the others.
        kept: how many of them are kept.
        shut: bool `(b, p)`, slots of `chosen` that nothing leaves, or from which nothing comes in.
        groups: of `chosen`, inside which exchanges stay; 1 where they need not.
        rest: `(b, s)`, kept columns that stay.
        factor: `(b, s, s)`, of their part of the Gram.
        cross: `(b, s, p + 1)`, factor^-1 times their products with `chosen`, and with the error.
        table: `(b, p, p + 1)`, [[-A, T], [T', B]] and in the last column [w; R], in the slots of `chosen`.
        place: `(b, p)`, which of `chosen` is in each slot of the table.
        loss: `(b,)`, errors of the rows.
    """

    def __init__(self, target: Tensor, gram: Tensor, value: Tensor, mask: Tensor, left: Tensor) -> None:
        self.target, self.gram, self.value, self.mask, self.left = target, gram, value, mask, left

    def choose_(self, own: Tensor, count: int, width: int | None, barred: Tensor | None) -> None:
        """Choose the columns that may be exchanged: half of them kept, half dropped.

        Args:
            own: `(columns,)`, the part of each input that the others do not express.
            count: how many columns.
            width: of the groups of the pattern.
            barred: bool `(b, columns)`.
        """
        columns = self.mask.shape[1]
        costs = (self.value.square() * own).masked_fill_(~self.mask, torch.inf)  # of losing one
        gains = ((self.target - self.value) @ self.gram[:-1, :-1]).square_().div_(own)  # of adding one
        closed = self.mask if barred is None else self.mask | barred
        gains.masked_fill_(closed, -torch.inf)
        if width is None:
            self.groups = 1
            most, more = (max(int(each.sum(1).max()), 1) for each in (self.mask, ~closed))
            cost, leaving = costs.topk(min(count // 2, most), dim=1, largest=False)
            gain, entering = gains.topk(min(count // 2, more), dim=1)
            self.kept = leaving.shape[1]
            self.chosen = torch.cat([leaving, entering], 1)
            self.shut = torch.cat([cost == torch.inf, gain == -torch.inf], 1)
        else:
            shape = (len(costs), -1, width)
            best = gains.reshape(shape).amax(2) - costs.reshape(shape).amin(2)
            self.groups = min(max(count // width, 1), best.shape[1])
            group = best.topk(self.groups, dim=1).indices
            inside = group[:, :, None] * width + torch.arange(width, device=group.device)  # (b, groups, width)
            kept = self.mask.gather(1, inside.flatten(1)).reshape(shape)
            inside = inside.gather(2, kept.to(torch.uint8).argsort(dim=2, descending=True, stable=True))
            per_group = int(kept[0, 0].sum())
            self.kept = per_group * self.groups
            self.chosen = torch.cat([inside[:, :, :per_group].flatten(1), inside[:, :, per_group:].flatten(1)], 1)
            self.shut = closed.gather(1, self.chosen)
            self.shut[:, : self.kept] = False
        self.chosen = self.chosen.masked_fill(self.shut & (self.groups == 1), columns)

    def reduce_(self) -> None:
        """Refit the kept columns that stay, as a function of the chosen ones: factor, table and loss."""
        columns, kept = self.mask.shape[1], self.kept
        wide = torch.nn.functional.pad(self.mask, (0, 1)).scatter(1, self.chosen[:, :kept], False)
        self.rest = _slots(wide[:, :columns])
        fixed = torch.nn.functional.pad(self.value, (0, 1)).scatter(1, self.chosen[:, :kept], 0.0)
        error = torch.nn.functional.pad(self.target, (0, 1)) - fixed
        product = error @ self.gram
        near = _rows(self.gram, self.rest)  # (b, s, columns + 1)
        system = _columns(near, self.rest)
        system.diagonal(dim1=1, dim2=2).masked_fill_(self.rest == columns, 1.0)
        self.factor, info = torch.linalg.cholesky_ex(system)
        right = torch.cat([_columns(near, self.chosen), product.gather(1, self.rest)[:, :, None]], 2)
        self.cross = torch.linalg.solve_triangular(self.factor, right, upper=False)
        among = _columns(_rows(self.gram, self.chosen), self.chosen)
        table = torch.cat([among, product.gather(1, self.chosen)[:, :, None]], 2)
        table.baddbmm_(self.cross[:, :, :-1].transpose(1, 2), self.cross, alpha=-1)  # (b, p, p + 1): [B, R]
        table[:, :, :-1].diagonal(dim1=1, dim2=2).masked_fill_(self.chosen == columns, 1.0)
        # now bring those in that are kept
        factor, more = torch.linalg.cholesky_ex(table[:, :kept, :kept])
        inverse = torch.cholesky_inverse(factor)
        answer = inverse @ table[:, :kept, kept:]  # (b, kept, p - kept + 1): [T, w]
        self.loss = (error * product).sum(1) - self.cross[:, :, -1].square().sum(1)
        self.loss = self.loss - (table[:, :kept, -1] * answer[:, :, -1]).sum(1)
        table[:, kept:, kept:].baddbmm_(table[:, kept:, :kept], answer, alpha=-1)
        table[:, :kept, :kept] = -inverse
        table[:, :kept, kept:] = answer
        table[:, kept:, :kept] = answer[:, :, :-1].transpose(1, 2)
        self.table = table
        self.sound = (info == 0) & (more == 0)

    def search_(self, tolerance: float) -> None:
        """Make the best exchange of each row until none is better than the tolerance, then write the exact weights."""
        kept, size = self.kept, self.chosen.shape[1]
        total = self.target * (self.target @ self.gram[:-1, :-1])
        noise = total.sum(1) * torch.finfo(self.target.dtype).eps  # gains that may be rounding
        place = torch.arange(size, device=self.chosen.device).expand(len(self.chosen), -1).clone()
        weight = torch.zeros_like(self.cross[:, 0, :kept])
        rows = self.sound.nonzero().squeeze(1)
        table, places, loss, left, shut = (each[rows] for each in (self.table, place, self.loss, self.left, self.shut))
        noise = noise[rows]
        while len(rows):
            gain, out, into = _best(table, kept, shut, self.groups)
            going = (gain > tolerance * loss + noise) & (left > 0)
            if int(going.sum()) < max(SHRINK * len(rows), 1):
                done = rows[~going]
                place[done], weight[done], self.left[done] = places[~going], table[~going, :kept, -1], left[~going]
                rows, table, places, loss, left, shut, noise, gain, out, into = (
                    each[going] for each in (rows, table, places, loss, left, shut, noise, gain, out, into)
                )
                going = going[going]
            _exchange_(table, places, out, into, going)
            loss, left = torch.where(going, loss - gain, loss), left - going.long()
        self.moved = (place[:, :kept] >= kept).sum(1)
        # back to all columns
        within = weight.new_zeros(place.shape).scatter(1, place[:, :kept], weight)
        right = self.cross[:, :, -1:] - self.cross[:, :, :-1] @ within[:, :, None]
        change = torch.linalg.solve_triangular(self.factor.transpose(1, 2), right, upper=True).squeeze(2)
        held = self.chosen.gather(1, place[:, :kept])
        old = torch.nn.functional.pad(self.value, (0, 1))
        wide = torch.zeros_like(old).scatter(1, self.rest, old.gather(1, self.rest) + change).scatter(1, held, weight)
        mask = torch.zeros_like(old, dtype=torch.bool).scatter(1, self.rest, True).scatter(1, held, True)
        self.value = torch.where(self.sound[:, None], wide[:, :-1], self.value)
        self.mask = torch.where(self.sound[:, None], mask[:, :-1], self.mask)


def _best(table: Tensor, kept: int, shut: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the best exchange of each row gains, and the slots that leave and enter, `(b,)` each.

    Args:
        table: `(b, p, p + 1)`, see `_Round`.
        kept: slots that are kept.
        shut: bool `(b, p)`, slots that take no part.
        groups: that the kept and the dropped slots fall into.
    """
    own, value = table.diagonal(dim1=1, dim2=2), table[:, :, -1]
    weight = value[:, :kept].masked_fill(shut[:, :kept], torch.inf)
    fresh = own[:, kept:].rsqrt()
    residual = value[:, kept:] * fresh
    gains = residual.square().masked_fill_(shut[:, kept:], -torch.inf)
    answer, own = table[:, :kept, kept:-1], -own[:, :kept]
    # (b, kept of a group, dropped of a group, groups)
    answer = answer.reshape(len(table), groups, kept // groups, groups, -1).diagonal(dim1=1, dim2=3)
    weight, own = (each.reshape(len(table), groups, -1).transpose(1, 2)[:, :, None] for each in (weight, own))
    fresh, residual, gains = (
        each.reshape(len(table), groups, -1).transpose(1, 2)[:, None] for each in (fresh, residual, gains)
    )
    answer = answer * fresh
    cost = torch.addcmul(weight, answer, residual, value=-1).square_()
    cost /= torch.addcmul(own, answer, answer)
    least, index = torch.sub(cost, gains, out=cost).flatten(1).min(1)
    group, place, wide = index % groups, index // groups, cost.shape[2]
    leaving = group * (kept // groups) + place // wide
    return -least, leaving, kept + group * wide + place % wide


def _exchange_(table: Tensor, place: Tensor, out: Tensor, into: Tensor, going: Tensor) -> None:
    """Exchange two slots of each row: sweep one variable in and the other out, and let them change places.

    Args:
        table: `(b, p, p + 1)`, see `_Round`; changed in place, as is `place`.
        place: `(b, p)`.
        out: `(b,)`, the slot that leaves.
        into: `(b,)`, the slot that enters.
        going: bool `(b,)`, rows in which anything happens.
    """
    each = torch.arange(len(table), device=table.device)
    size = table.shape[1]
    entering, leaving = table[each, into], table[each, out]  # (b, p + 1)
    pivot = torch.where(going, entering[each, into], 1.0)
    scaled = entering / pivot[:, None]
    share = scaled[each, out]
    swept = torch.addcmul(leaving, entering, share[:, None], value=-1)  # once the other is in
    swept[each, into] = share
    second = torch.where(going, swept[each, out], 1.0)
    down = swept / second[:, None]
    left, right = torch.stack([entering, swept], 2)[:, :size], torch.stack([scaled, down], 1)
    table.baddbmm_(left, right * going[:, None, None], alpha=-1)
    scaled = torch.addcmul(scaled, down, share[:, None], value=-1)
    scaled[each, out] = -1.0 / pivot - share.square() / second
    scaled[each, into] = -share / second
    down = -down
    down[each, into], down[each, out] = -1.0 / second, -share / second
    for slot, new, old in ((out, scaled, leaving), (into, down, entering)):
        row = torch.where(going[:, None], new, old)
        table[each, slot] = row
        table[each, :, slot] = row[:, :size]
    first, last = place[each, out], place[each, into]
    place[each, out], place[each, into] = torch.where(going, last, first), torch.where(going, first, last)


def _columns(values: Tensor, slots: Tensor) -> Tensor:
    """Return `(b, n, q)`: the columns `slots`, `(b, q)`, of `values`, `(b, n, m)`."""
    return values.gather(2, slots[:, None, :].expand(-1, values.shape[1], -1))


def _rows(values: Tensor, slots: Tensor) -> Tensor:
    """Return `(b, q, m)`: the rows `slots`, `(b, q)`, of `values`, `(n, m)`."""
    return values.index_select(0, slots.flatten()).reshape(*slots.shape, -1)  # a third of the time of indexing


def _slots(mask: Tensor) -> Tensor:
    """Return the columns where `mask` is True, in order, `(rows, most of a row)`; the number of columns as padding."""
    counts = mask.sum(1, keepdim=True)
    width = max(int(counts.max()), 1)
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return order.masked_fill(torch.arange(width, device=mask.device) >= counts, mask.shape[1])
