"""Mixed sparsity: what the loss is sensitive to stays denser, by the ranks of Hessian traces.

Shao et al., "One-Shot Sensitivity-Aware Mixed Sparsity Pruning for Large Language Models", ICASSP 2024,
arXiv 2310.09499. The sensitivity of a unit is the mean diagonal entry of the Hessian of the model's loss; units are
ranked by it and get densities at equal distances between `1 - p - alpha` and `1 - p + alpha` (Algorithm 1, whose
"sparsity" is the kept density by construction).

By default the trace is that of the generalised Gauss-Newton matrix: it is never negative, needs one ordinary backward
pass per batch and no memory beyond a gradient. `estimate: hessian` is the published form, Hutchinson's estimator with
two backward passes and the graph of the first, several times slower and larger. The published program averages over
units whatever their size, so that the model's sparsity is not the one asked for; here it is, to the last weight. Units
of equal sensitivity share their ranks.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.contracts import Plan, PlanTask
from secateur.core.errors import NumericError
from secateur.core.method import method
from secateur.core.pattern import NM
from secateur.core.progress import step
from secateur.engine.backward import forget_gradients, gradient, gradients_of, next_token_loss, sampled_loss
from secateur.models.linears import LinearView, find_all_linears

SPREAD = 0.1  # the paper's alpha
SPREAD_NM = 0.25  # one step of a 2:4 pattern


@method
class MixedSparsity:
    """One sparsity per block or per linear, by the rank of its sensitivity.

    Attributes:
        estimate: `fisher` (one backward pass per batch) or `hessian` (Hutchinson, double backward, as published).
        unit: what is ranked and shares a sparsity: `linear` or `block`.
        spread: how far a sparsity lies from the average at most, as far as the budget allows (the paper's alpha); None
            takes 0.1, and 0.25 for an N:M pattern, whose steps are coarse.
        probes: random vectors per batch of the `hessian` estimate, draws of labels per batch of the `fisher` one.
        least: lower bound of every sparsity.
        most: upper bound of every sparsity.
    """

    estimate: Literal["fisher", "hessian"] = "fisher"
    unit: Literal["linear", "block"] = "linear"
    spread: Annotated[float, Field(ge=0, le=1)] | None = None
    probes: Annotated[int, Field(ge=1)] = 1
    least: Annotated[float, Field(ge=0, le=1)] = 0.0
    most: Annotated[float, Field(ge=0, le=1)] = 1.0

    backward: ClassVar[bool] = True

    @property
    def copies(self) -> int:
        """The gradients; with `hessian` the probe, its product and the graph beside them."""
        return 1 if self.estimate == "fisher" else 4

    def plan(self, task: PlanTask) -> Plan:
        """Return the plan.

        Raises:
            PatternError: if the bounds leave no room for the budget.
            NumericError: if a sensitivity is NaN or infinite.
        """
        linears = task.budget.linears
        estimate = fisher_traces if self.estimate == "fisher" else hessian_traces
        traces = estimate(task, self.probes)
        units: dict[str, Hashable] = {
            linear.name: linear.block if self.unit == "block" else linear.name for linear in linears
        }
        sensitivity: dict[Hashable, float] = {}
        for linear in linears:  # of a block: the sum over its linears, as published
            unit = units[linear.name]
            sensitivity[unit] = sensitivity.get(unit, 0.0) + traces[linear.name] / linear.size
        spread = self.spread
        if spread is None:
            spread = SPREAD_NM if isinstance(task.budget.pattern, NM) else SPREAD
        kept = densities(sensitivity, spread)
        patterns = task.budget.near(
            {linear.name: -kept[units[linear.name]] for linear in linears}, self.least, self.most, units=units
        )
        notes: tuple[str, ...] = ()
        if len(set(sensitivity.values())) == 1 and len(sensitivity) > 1:
            notes = ("all sensitivities are equal, so the plan is uniform",)
        names = {unit: f"block {unit}" if self.unit == "block" else str(unit) for unit in sensitivity}
        return Plan(patterns, scores={names[unit]: value for unit, value in sensitivity.items()}, notes=notes)


def densities(sensitivity: Mapping[Hashable, float], spread: float) -> dict[Hashable, float]:
    """Return each unit's kept density relative to the average: `-spread .. spread` by rank (Algorithm 1).

    Equal sensitivities share the mean of their ranks; a single unit gets 0.

    Args:
        sensitivity: of each unit.
        spread: the paper's alpha.
    """
    if len(sensitivity) < 2:
        return dict.fromkeys(sensitivity, 0.0)
    ordered = sorted(sensitivity.values())
    places: dict[float, list[int]] = {}
    for rank, value in enumerate(ordered):
        places.setdefault(value, []).append(rank)
    ranks = {value: sum(found) / len(found) for value, found in places.items()}
    return {unit: spread * (2 * ranks[value] / (len(sensitivity) - 1) - 1) for unit, value in sensitivity.items()}


def fisher_traces(task: PlanTask, probes: int = 1) -> dict[str, float]:
    """Return the trace of the Gauss-Newton matrix of the loss per token with respect to each linear's weight.

    The squared norm of the gradient for labels drawn from the model's own predictions has that trace as its mean, so
    one backward pass per batch and draw suffices; nothing but sums of squares is kept.

    Args:
        task: the model and its batches.
        probes: draws of labels per batch.

    Raises:
        NumericError: if a gradient is NaN or infinite.
    """
    views = planned_views(task)
    totals = dict.fromkeys((view.name for view in views), 0.0)
    tokens = 0
    with step(task.progress, "sensitivity", len(task.batches) * probes) as number, gradients_of(task.model, views):
        for ids, keep in task.batches:
            for _ in range(probes):
                sampled_loss(task.model, ids, keep, task.generator).backward()  # type: ignore[no-untyped-call]
                for view in views:
                    totals[view.name] += float(gradient(view).double().square().sum())
                forget_gradients(views)
                task.progress.advance(number, 1)
            tokens += ids.numel() if keep is None else int(keep.sum())
    return _finite({name: total / (tokens * probes) for name, total in totals.items()})


def hessian_traces(task: PlanTask, probes: int = 1) -> dict[str, float]:
    """Return the trace of the Hessian of the loss per token with respect to each linear's weight, by Hutchinson.

    `E[z^T H z]` over Rademacher vectors z; one z spans all weights, so what linears share averages out. May come out
    negative where the loss is not convex, or by chance.

    Args:
        task: the model and its batches.
        probes: vectors z per batch.

    Raises:
        NumericError: if a product is NaN or infinite.
    """
    views = planned_views(task)
    parameters = list({id(view.parameter): view.parameter for view in views}.values())
    totals = dict.fromkeys((view.name for view in views), 0.0)
    tokens = 0
    plain = torch.nn.attention.sdpa_kernel(
        torch.nn.attention.SDPBackend.MATH
    )  # the fused kernels have no second derivative
    with step(task.progress, "sensitivity", len(task.batches)) as number, gradients_of(task.model, views), plain:
        for ids, keep in task.batches:
            loss = next_token_loss(task.model, ids, keep)
            first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            reached = [(p, g) for p, g in zip(parameters, first, strict=True) if g is not None and g.requires_grad]
            for probe in range(probes):
                signs = {id(p): _signs(p, task.generator) for p, _ in reached}
                inner = sum(((g * signs[id(p)]).sum() for p, g in reached), start=loss.new_zeros(()))
                second = (
                    torch.autograd.grad(
                        inner, [p for p, _ in reached], retain_graph=probe < probes - 1, allow_unused=True
                    )
                    if reached
                    else ()
                )
                for (parameter, _), product in zip(reached, second, strict=True):
                    if product is None:
                        continue
                    for view in views:
                        if view.parameter is parameter:
                            sign, found = signs[id(parameter)], product
                            if view.index:
                                sign, found = sign[view.index], found[view.index]
                            totals[view.name] += float((sign.double() * found.double()).sum())
            tokens += ids.numel() if keep is None else int(keep.sum())
            task.progress.advance(number, 1)
    return _finite({name: total / (tokens * probes) for name, total in totals.items()})


def planned_views(task: PlanTask) -> list[LinearView]:
    """Return the planned linears as they stand in the model, in the order of the budget."""
    views = {view.name: view for view in find_all_linears(task.model)}
    return [views[linear.name] for linear in task.budget.linears]


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return random signs with the shape, dtype and device of `like`."""
    drawn = torch.randint(2, like.shape, generator=generator, dtype=torch.int8)
    return (drawn * 2 - 1).to(like)


def _finite(values: dict[str, float]) -> dict[str, float]:
    """Return `values`, or say which is not a number."""
    for name, value in values.items():
        if not abs(value) < float("inf"):
            raise NumericError(
                f"the sensitivity of `{name}` is NaN or infinite", hint="look for NaN in the weights, or use float32"
            )
    return values
