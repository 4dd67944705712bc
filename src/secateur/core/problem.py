"""The one problem that every layer-wise pruner solves, and its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from secateur.core.errors import InputError
from secateur.core.linalg import quadratic_loss
from secateur.core.pattern import Pattern

T = TypeVar("T")


@dataclass(frozen=True)
class LayerProblem:
    """Approximate `weight` under a sparsity pattern, in the metric of the layer's inputs.

        argmin_V  tr((V - weight) gram (V - weight)^T)      with the zeros of V as `pattern` allows

    Solvers see these few matrices and never tokens. With input errors (the sparse path differs from the dense one)
    the engine puts the corrected target `W cross gram^-1` in `weight`, so solvers need not know.

    Attributes:
        weight: float32 `(out_features, in_features)`, what to approximate.
        pattern: the zeros that are asked for.
        gram: float32 `(in_features, in_features)`, mean over tokens of x x^T; None if nobody asked for it.
        diag: float32 `(in_features,)`, mean over tokens of x^2.
        mean: float32 `(in_features,)`, mean over tokens of x.
        start: `(out_features, in_features)`, a point that a refinement starts from; its zeros are its mask.
        frozen: bool `(out_features, in_features)`, True where an entry is zero for ever and counts as pruned.
        dense: the dense weight where `weight` is a corrected target, else None (it is `weight` itself).
        shared: results that linears with the same inputs share, see `once`.
    """

    weight: Tensor
    pattern: Pattern
    gram: Tensor | None = None
    diag: Tensor | None = None
    mean: Tensor | None = None
    start: Tensor | None = None
    frozen: Tensor | None = None
    dense: Tensor | None = None
    shared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def point(self) -> Tensor:
        """What a one-shot pruner scores and keeps: `start` if it is given, else the target itself."""
        return self.weight if self.start is None else self.start

    def loss(self, value: Tensor) -> float:
        """Return `tr((value - weight) G (value - weight)^T)`: squared output error per token, summed over outputs.

        G is the Gram matrix; its diagonal if only that is known; the identity without any statistics.
        """
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        error = value.to(wide) - self.weight.to(wide)
        if self.gram is not None:
            return max(float(quadratic_loss(error, self.gram.to(wide))), 0.0)
        if self.diag is not None:
            return float((error.square() * self.diag).sum(dtype=torch.float64))
        return float(error.square().sum(dtype=torch.float64))

    def size(self) -> float:
        """Return the loss of the all-zero weight: what `loss` is relative to."""
        return self.loss(torch.zeros_like(self.weight))

    def select(self, score: Tensor, scope: Any) -> Tensor:
        """Return the pattern's mask of `score`, bool `(out_features, in_features)`, frozen entries pruned first.

        Args:
            score: `(out_features, in_features)`, larger is kept first.
            scope: the pruner's own scope, `row` or `layer`.
        """
        if self.frozen is not None:
            score = score.masked_fill(self.frozen, float("-inf"))
        return self.pattern.mask(score, scope)

    def once(self, key: Any, compute: Callable[[], T]) -> T:
        """Return `compute()`, kept under `key` for every problem that shares this one's inputs.

        For what depends on the inputs alone: a factor of the Gram, its inverse, its eigenvalues.
        """
        if key not in self.shared:
            self.shared[key] = compute()
        result: T = self.shared[key]
        return result

    def need(self, statistic: str) -> Tensor:
        """Return the statistic `gram`, `diag` or `mean`.

        Raises:
            InputError: if it was not collected; a pruner lists what it uses in `needs`.
        """
        value = getattr(self, statistic)
        if value is None:
            raise InputError(f"this pruner needs the statistic `{statistic}`, which was not collected")
        return value  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Pruned:
    """A pruned weight.

    Attributes:
        weight: `(out_features, in_features)`, exactly zero where `mask` is False.
        mask: bool `(out_features, in_features)`, True = kept.
    """

    weight: Tensor
    mask: Tensor

    @classmethod
    def keep(cls, weight: Tensor, mask: Tensor) -> Pruned:
        """Return `weight` with everything outside `mask` set to a true (positive) zero."""
        # a product takes a third of the time of `masked_fill`; adding zero turns its negative zeros into positive ones
        return cls((weight * mask).add_(0.0), mask)
