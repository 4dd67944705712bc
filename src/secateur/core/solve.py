"""One layer, solved safely: what every pruner gets around it and no pruner has to write.

Float32, dead inputs, the optional exact refit, the never-worse guard, the pattern check, one report line.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from secateur.core.contracts import Pruner
from secateur.core.errors import InputError, NumericError, PatternError
from secateur.core.linalg import refit as exact_refit
from secateur.core.problem import LayerProblem, Pruned


@dataclass(frozen=True)
class Solved:
    """A pruned layer and its report.

    Attributes:
        pruned: weight and mask.
        loss_before: relative loss of the same mask with the weights left as they were.
        loss_after: relative loss of the result; both are fractions of the loss of the all-zero weight.
        seconds: wall time of the solver.
        notes: what did not go as planned, in words ("refit was worse, dropped", "3 dead inputs").
    """

    pruned: Pruned
    loss_before: float
    loss_after: float
    seconds: float
    notes: tuple[str, ...] = field(default=())


def solve(
    pruner: Pruner, problem: LayerProblem, *, refit: bool = False, guard: bool = True, name: str = "this layer"
) -> Solved:
    """Return `problem` solved by `pruner`, checked.

    Args:
        pruner: any method of the shelf.
        problem: the layer; not changed.
        refit: solve the kept weights exactly on the final mask (needs the Gram matrix).
        guard: keep the better of the pruner's weights and the same mask without any weight update.
        name: the layer, for messages.

    Raises:
        PatternError: if the pattern does not fit the layer, or the pruner breaks it.
        InputError: if more zeros are frozen than the pattern allows.
        NumericError: if weights or statistics are not finite, or the result is not.
    """
    rows, columns = problem.weight.shape
    problem.pattern.fit(rows, columns, name)
    for what, tensor in (
        ("weight", problem.weight),
        ("gram", problem.gram),
        ("diag", problem.diag),
        ("mean", problem.mean),
    ):
        if tensor is not None and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise NumericError(f"{bad} values of the {what} of `{name}` are NaN or infinite")
    _refuse_thaw(problem, name)
    notes: list[str] = []
    diagonal = (
        problem.diag if problem.diag is not None else problem.gram.diagonal() if problem.gram is not None else None
    )
    if diagonal is not None:
        dead = int((diagonal <= 0).sum())
        if dead:
            notes.append(f"{dead} of {columns} inputs are never active")
    started = time.perf_counter()
    pruned = pruner.prune(problem)
    problem.pattern.check(pruned.mask, pruner.scope)
    if bool((pruned.weight != 0).logical_and(~pruned.mask).any()):
        raise PatternError(f"the pruner left weights of `{name}` outside its own mask")
    if not torch.isfinite(pruned.weight).all():
        raise NumericError(f"the pruned weight of `{name}` holds NaN or infinity")
    if problem.frozen is not None and bool((pruned.mask & problem.frozen).any()):
        raise PatternError(f"the pruner brought back frozen zeros of `{name}`")
    plain = Pruned.keep(problem.weight if problem.dense is None else problem.dense, pruned.mask)
    loss_plain, loss = problem.loss(plain.weight), problem.loss(pruned.weight)
    if refit:
        weight = exact_refit(problem.weight, problem.need("gram"), pruned.mask)
        refitted = problem.loss(weight) if torch.isfinite(weight).all() else float("inf")
        if refitted <= loss:
            pruned, loss = Pruned(weight, pruned.mask), refitted
        else:
            notes.append("the exact refit was not better and was dropped")
    if guard and loss > loss_plain:
        notes.append("the weight update was worse than none and was dropped")
        pruned, loss = plain, loss_plain
    size = problem.size() or 1.0
    return Solved(pruned, loss_plain / size, loss / size, time.perf_counter() - started, tuple(notes))


def _refuse_thaw(problem: LayerProblem, name: str) -> None:
    """Raise unless the zeros that must stay fit in the budget of the pattern."""
    if problem.frozen is None:
        return
    existing = float(problem.frozen.float().mean())
    if existing > problem.pattern.sparsity + 1.0 / problem.frozen.numel():
        raise InputError(
            f"`{name}` already has a sparsity of {existing:.4f}, above the target {problem.pattern.sparsity:.4f}",
            hint="raise the target, or leave the existing zeros free",
        )
