"""The contracts between the engine and the papers. Protocols only: a method inherits nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.core.allocation import Budget
from secateur.core.mask import Masks
from secateur.core.pattern import Pattern
from secateur.core.problem import LayerProblem, Pruned
from secateur.core.progress import Progress, Silent

Statistic = Literal["gram", "diag", "mean"]


@runtime_checkable
class Pruner(Protocol):
    """One linear in, one masked linear out.

    `needs` names the statistics it reads; `scope` is what an unstructured budget is counted over where the pattern
    names nothing. `prune` must not change its problem, and must be deterministic.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    @property
    def scope(self) -> Literal["row", "layer"]: ...

    def prune(self, problem: LayerProblem) -> Pruned: ...


@runtime_checkable
class Scoring(Protocol):
    """A pruner that can rank weights without pruning them, which a budget over the whole model needs."""

    def score(self, problem: LayerProblem) -> Tensor: ...


@dataclass
class BlockTask:
    """One masked block to be tuned, and what it should give.

    Attributes:
        block: the block, its pruned weights already zero; edited in place. Parameters are float32 (or the compute dtype).
        masked: pairs of a parameter of `block` and its bool mask in the parameter's own orientation, True = kept. A tuner
            that moves masks writes the new ones into these tensors; they are checked, reported and stored then.
        inputs: sequence of hidden states `(batch, tokens, hidden)`, one per calibration batch, on the sparse path.
        targets: sequence of the outputs to reach, same shapes.
        call: `call(block, i, rows)` runs the block on `inputs[i][rows]` with that batch's own arguments and returns
            `(rows, tokens, hidden)`; `rows` is a slice of the batch's sequences, or None for all.
        keep: `keep(i)` returns the bool `(batch, tokens)` that is True on real tokens, or None where all are real.
        generator: CPU generator seeded for this block; the only randomness a tuner may use.
        progress: called with a fraction 0..1 of the tuning done.
        select: for each entry of `masked`, `select(score)` returns the mask of the largest scores that the entry's
            pattern allows, an exact budget without frozen zeros, score and mask in the parameter's own orientation.
            Empty where masks must stay.
    """

    block: nn.Module
    masked: list[tuple[nn.Parameter, Tensor]]
    inputs: Sequence[Tensor]
    targets: Sequence[Tensor]
    call: Callable[[nn.Module, int, slice | None], Tensor]
    keep: Callable[[int], Tensor | None]
    generator: torch.Generator
    progress: Callable[[float], None] = field(default=lambda fraction: None)
    select: Sequence[Callable[[Tensor], Tensor]] = ()


@dataclass(frozen=True)
class Tuned:
    """What tuning one block did: the error of its output before and after, and how it got there.

    Attributes:
        before: reconstruction error of the masked block as it came, in the unit of the tuner's loss.
        after: the same error of the block as it was left, never above `before`.
        scale: what both are relative to: the mean square of the targets, or 1 where the error is relative already.
        epochs: epochs run.
        seconds: wall time.
        notes: what did not go as planned ("rate halved", "rolled back").
    """

    before: float
    after: float
    scale: float
    epochs: int
    seconds: float
    notes: tuple[str, ...] = ()


@runtime_checkable
class BlockTuner(Protocol):
    """One block in, the same block better, its masks kept, or moved inside their patterns.

    `dense_path` asks for targets of the dense model's own path.
    """

    @property
    def dense_path(self) -> bool: ...

    def tune(self, task: BlockTask) -> Tuned: ...


@dataclass
class PlanTask:
    """A model whose sparsity is to be divided among its linears.

    Attributes:
        model: a causal language model in evaluation mode, on the device where it runs; a planner leaves it as it was.
        budget: the linears that are planned, in the order of the model, and what they may lose together.
        batches: calibration tokens int64 `(batch, length)`, each with bool `(batch, length)` that is False on padding
            or None; small enough for a backward pass.
        problems: `problems(statistics)` yields `(linear name, its layer problem)` in the order of the model, each with
            the dense weight, the pattern it would get without a plan and the named statistics of the dense model.
        freeze_zeros: zeros of the model stay zero and count in the budget.
        generator: CPU generator, the only randomness a planner may use.
        progress: shown every step.
    """

    model: nn.Module
    budget: Budget
    batches: Sequence[tuple[Tensor, Tensor | None]]
    problems: Callable[[Collection[Statistic]], Iterator[tuple[str, LayerProblem]]]
    freeze_zeros: bool
    generator: torch.Generator
    progress: Progress = field(default_factory=Silent)


@dataclass(frozen=True)
class Plan:
    """What a planner decided; any part may be empty.

    Attributes:
        patterns: `{linear name: Pattern}`.
        masks: masks chosen outright; they fit `patterns`, and whatever pruner follows keeps to them.
        weights: `{linear name: (out_features, in_features)}`, weights that take the place of the model's.
        keep: `{axis name: bool (count,)}`, the units that stay.
        scores: what the decision was made by, `{block or linear name: number}`, for the report.
        notes: what did not go as planned, for the user.
        seconds: what making it took; the engine fills it in.
    """

    patterns: dict[str, Pattern] = field(default_factory=dict)
    masks: Masks | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    keep: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@runtime_checkable
class Planner(Protocol):
    """Whole model in, a plan out: which pattern for which linear, which masks and weights, or which units to keep.

    `copies` is how many float32 copies of the planned weights it holds beside the model, and `backward` whether it runs
    the whole model with gradients; both are read to state the memory beforehand.
    """

    @property
    def copies(self) -> int: ...

    @property
    def backward(self) -> bool: ...

    def plan(self, task: PlanTask) -> Plan: ...
