"""One layer, solved safely: what every pruner gets around it and no pruner has to write.

Float32, dead inputs, the optional exact refit, the never-worse guard, the pattern check, one report line.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from secateur.core.contracts import Pruner
from secateur.core.errors import InputError, NumericError, PatternError
from secateur.core.linalg import is_finite
from secateur.core.linalg import refit as best_refit
from secateur.core.pattern import NM, Pattern, pruned_count
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
    notes = _check(problem, pruner.scope, name)
    started = time.perf_counter()
    pruned = pruner.prune(problem)
    _check_answer(problem, pruned, pruner.scope, name)
    plain = Pruned.keep(problem.weight if problem.dense is None else problem.dense, pruned.mask)
    loss_plain = loss = problem.loss(plain.weight)
    if not torch.equal(plain.weight, pruned.weight):
        loss = problem.loss(pruned.weight)
    if refit:
        weight = best_refit(problem.weight, problem.need("gram"), pruned.mask, start=pruned.weight)
        refitted = problem.loss(weight) if is_finite(weight) else float("inf")
        if refitted <= loss:
            pruned, loss = Pruned(weight, pruned.mask), refitted
        else:
            notes.append("the exact refit was not better and was dropped")
    if guard and loss > loss_plain:
        notes.append("the weight update was worse than none and was dropped")
        pruned, loss = plain, loss_plain
    size = problem.size() or 1.0
    return Solved(pruned, loss_plain / size, loss / size, time.perf_counter() - started, tuple(notes))


def _check(problem: LayerProblem, scope: Literal["row", "layer"], name: str) -> list[str]:
    """Raise unless the problem can be solved; return what is worth noting about it."""
    columns = problem.weight.shape[1]
    shapes = {"gram": (columns, columns), "diag": (columns,), "mean": (columns,)}
    for what in ("weight", "gram", "diag", "mean"):
        tensor: Tensor | None = getattr(problem, what)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shapes.get(what, tensor.shape):
            raise InputError(f"the {what} of `{name}` must have shape {shapes[what]}, got {tuple(tensor.shape)}")
        if not is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NumericError(f"{bad} values of the {what} of `{name}` are NaN or infinite")
    if problem.frozen is not None:
        _refuse_thaw(problem.pattern, problem.frozen, scope, name)
    diagonal = problem.diag
    if diagonal is None and problem.gram is not None:
        diagonal = problem.gram.diagonal()
    dead = 0 if diagonal is None else int((diagonal <= 0).sum())
    return [f"{dead} of {columns} inputs are never active"] if dead else []


def _check_answer(problem: LayerProblem, pruned: Pruned, scope: Literal["row", "layer"], name: str) -> None:
    """Raise if a pruner's answer breaks the pattern, its own mask, or frozen zeros, or is not finite."""
    problem.pattern.check(pruned.mask, scope)
    if not is_finite(pruned.weight):
        raise NumericError(f"the pruned weight of `{name}` holds NaN or infinity")
    if bool((pruned.weight * ~pruned.mask).any()):
        raise PatternError(f"the pruner left weights of `{name}` outside its own mask")
    if problem.frozen is not None and bool((pruned.mask & problem.frozen).any()):
        raise PatternError(f"the pruner brought back frozen zeros of `{name}`")


def _refuse_thaw(pattern: Pattern, frozen: Tensor, scope: Literal["row", "layer"], name: str) -> None:
    """Raise unless the zeros that must stay fit in the budget of the pattern, wherever it is counted."""
    rows, columns = frozen.shape
    if isinstance(pattern, NM):
        parts, counts, room = "groups", frozen.reshape(-1, pattern.m).sum(1), pattern.m - pattern.n
    elif pattern.counted_over(scope) == "row":
        parts, counts, room = "rows", frozen.sum(1), pruned_count(pattern.sparsity, columns)
    else:
        parts, counts, room = "layers", frozen.sum().reshape(1), pruned_count(pattern.sparsity, rows * columns)
    total = int(counts.sum())
    if total > room * counts.numel():
        raise InputError(
            f"`{name}` already has a sparsity of {total / frozen.numel():.4f}, above the target {pattern.sparsity:.4f}",
            hint="raise the target, or leave the existing zeros free",
        )
    crowded = int((counts > room).sum())
    if crowded:
        raise InputError(
            f"{crowded} {parts} of `{name}` already hold more than the {room} zeros that `{pattern}` puts there",
            hint="leave the existing zeros free, or choose a pattern with more zeros",
        )
