"""DRIVE: masks by magnitude, sensitivity and gradient together, in many small rounds.

After Saikumar & Varghese, "DRIVE: Dual Gradient-Based Rapid Iterative Pruning", 2024, arXiv 2404.03687. A weight theta
with gradient g matters for what it is (`|theta|`), for what its removal does to the loss (`|theta g|`, the gradient with
respect to a gate on it) and for how much it still moves (`|g|`). Each round prunes the lowest sums of the three and takes
new gradients under the new mask; kept shares fall geometrically, and what is pruned stays pruned.

How the paper joins the three could not be checked against its text or a program of its authors; here each is divided by
its mean over the weights that are left, and `magnitude`, `sensitivity` and `gradient` weigh them. The paper prunes
networks on their way to being trained; here the model is trained already, the loss is that of the calibration text, and
no weight is changed: the pruner that follows may still adapt those that the masks keep. Without such an update, masks from
gradients alone are weaker than those of methods that look at the inputs of each layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.allocation import Budget, level, settle
from secateur.core.contracts import Plan, PlanTask
from secateur.core.errors import NumericError
from secateur.core.mask import Masks
from secateur.core.method import method
from secateur.core.pattern import Pattern, Unstructured
from secateur.core.progress import step
from secateur.engine.backward import forget_gradients, gradient, gradients_of, next_token_loss
from secateur.engine.budget import divide
from secateur.engine.planning import frozen_zeros
from secateur.models.linears import LinearView, find_all_linears

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@method
class DRIVE:
    """Masks for the whole model under one budget, by gradients of its own loss.

    Attributes:
        magnitude: weight of `|theta|`.
        sensitivity: weight of `|theta g|`.
        gradient: weight of `|g|`.
        rounds: steps from the dense model to the last mask; 1 prunes at once.
        batches: calibration batches whose gradients are summed in each round, taken in turn.
        floor: share of the average density that every linear keeps at least, so that none is cut off.
    """

    magnitude: Weight = 1.0
    sensitivity: Weight = 1.0
    gradient: Weight = 1.0
    rounds: Annotated[int, Field(ge=1)] = 20
    batches: Annotated[int, Field(ge=1)] = 4
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1

    copies: ClassVar[int] = 3
    backward: ClassVar[bool] = True

    def plan(self, task: PlanTask) -> Plan:
        """Return patterns and the masks that fit them; the model is copied, and the copy is pruned on the way.

        Raises:
            PatternError: if zeros that stay leave no room for the budget.
            NumericError: if a gradient is NaN or infinite.
        """
        budget = task.budget
        budget.refuse_frozen()
        model = copy.deepcopy(task.model).float()
        known = {view.name: view for view in find_all_linears(model)}
        views = {linear.name: known[linear.name] for linear in budget.linears}
        masks = {
            name: view.read() != 0 if task.freeze_zeros else torch.ones_like(view.read(), dtype=torch.bool)
            for name, view in views.items()
        }
        patterns: dict[str, Pattern] = {}
        notes: tuple[str, ...] = ()
        with step(task.progress, "pruning in rounds", self.rounds) as number, gradients_of(model, list(views.values())):
            for done in range(self.rounds):
                first = done * self.batches
                for index in range(first, first + min(self.batches, len(task.batches))):
                    ids, keep = task.batches[index % len(task.batches)]
                    next_token_loss(model, ids, keep).backward()  # type: ignore[no-untyped-call]
                terms = self._terms(views, masks)
                if terms.silent:
                    notes = ("no gradient reached the planned linears, so their weights were ranked by magnitude",)
                total = zeros_after(done + 1, self.rounds, budget.total, budget.size)
                counts = share(budget, total, self.floor, masks, partial(terms.all_scores, views, masks))
                for linear in budget.linears:
                    name = linear.name
                    patterns[name] = budget.pattern_of(linear, counts[name])
                    score = terms.score(views[name]).masked_fill(~masks[name], -torch.inf)
                    masks[name] = patterns[name].mask(score, budget.scope)
                    views[name].write(views[name].read().masked_fill(~masks[name], 0.0))
                forget_gradients(views.values())
                task.progress.advance(number, 1)
        sparsity = {name: 1 - float(mask.float().mean()) for name, mask in masks.items()}
        return Plan(patterns, Masks(masks), scores=sparsity, notes=notes)

    def _terms(self, views: Mapping[str, LinearView], masks: Mapping[str, Tensor]) -> Terms:
        """Return what a score is made of, from the gradients as they are now."""
        sums = torch.zeros(3, dtype=torch.float64)
        for name, view in views.items():
            weight, slope = view.read()[masks[name]].double(), gradient(view)[masks[name]].double()
            if not bool(torch.isfinite(slope).all()):
                raise NumericError(
                    f"the gradient of `{name}` holds NaN or infinity", hint="look for NaN in the weights"
                )
            if not bool(torch.isfinite(weight).all()):
                raise NumericError(f"the weight of `{name}` holds NaN or infinity")
            sums += torch.stack([weight.abs().sum(), (weight * slope).abs().sum(), slope.abs().sum()]).cpu()
        left = sum(int(mask.sum()) for mask in masks.values())
        wanted = (self.magnitude, self.sensitivity, self.gradient)
        scale = [part * left / float(total) if float(total) else 0.0 for part, total in zip(wanted, sums, strict=True)]
        if float(sums[2]) == 0:
            return Terms(1.0, 0.0, 0.0, silent=True)
        return Terms(scale[0], scale[1], scale[2])


@dataclass(frozen=True)
class Terms:
    """Factors of the three terms of a score, each a weight divided by the term's mean."""

    magnitude: float
    sensitivity: float
    gradient: float
    silent: bool = False

    def score(self, view: LinearView) -> Tensor:
        """Return the score of every weight of a linear, `(out_features, in_features)`, from its present gradient."""
        weight, slope = view.read().abs(), gradient(view).abs()
        return self.magnitude * weight + self.sensitivity * weight * slope + self.gradient * slope

    def all_scores(self, views: Mapping[str, LinearView], masks: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the scores of all linears, zero where a weight is pruned already."""
        for name, view in views.items():
            yield name, self.score(view).masked_fill(~masks[name], 0.0)


def zeros_after(done: int, rounds: int, total: int, size: int) -> int:
    """Return the weights pruned after `done` of `rounds` rounds: kept shares fall geometrically to the last.

    Args:
        done: rounds that are over, from 1.
        rounds: all of them.
        total: weights to prune in the end.
        size: weights in all.
    """
    return total if done == rounds else size - round((1 - total / size) ** (done / rounds) * size)


def share(
    budget: Budget,
    total: int,
    floor: float,
    masks: Mapping[str, Tensor],
    scores: Callable[[], Iterator[tuple[str, Tensor]]],
) -> dict[str, int]:
    """Return how many weights of each linear are pruned when `total` lowest scores of the model are.

    One threshold for all; a linear keeps at least `floor` times the average share, and what it keeps beyond the threshold
    the others lose. Counts never fall below what is pruned already, and are multiples of the budget's steps.

    Args:
        budget: the linears.
        total: weights that are pruned in all.
        floor: fraction of the average density.
        masks: bool of each linear, False where pruned already.
        scores: the scores of all linears, not negative.
    """
    linears = budget.linears
    steps = [budget.step(linear) for linear in linears]
    pruned = [frozen_zeros(~masks[linear.name], budget.pattern, budget.scope) for linear in linears]
    low = [max(zeros, budget.bounds(linear)[0]) for zeros, linear in zip(pruned, linears, strict=True)]
    density = floor * (1 - total / budget.size)
    high = [
        max(bottom, math.floor((1 - density) * linear.size / step) * step)
        for bottom, linear, step in zip(low, linears, steps, strict=True)
    ]
    total = min(max(total, sum(low)), sum(high))
    whole = Unstructured(total / budget.size, "model")
    ideal = divide(dict.fromkeys((linear.name for linear in linears), whole), scores)
    wanted = [budget.zeros_of(linear, ideal[linear.name]) / linear.size for linear in linears]
    real = level(wanted, [linear.size for linear in linears], total, low, high)
    counts = settle(real, steps, low, high, total)
    return {linear.name: count for linear, count in zip(linears, counts, strict=True)}
