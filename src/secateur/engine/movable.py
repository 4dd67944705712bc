"""Masks that a block tuner may move: how it chooses new ones, and the check of what it leaves.

Beside the sweep because a tuner sees parameters, in whatever orientation a model stores them, and patterns only see
`(out_features, in_features)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from secateur.core.errors import PatternError
from secateur.core.pattern import NM, Pattern, Unstructured
from secateur.models.linears import LinearView

GROUPS = (4, 8, 16, 32)  # widths M of N:M patterns that are looked for in a mask
TYPICAL = 0.99  # fraction of the groups or rows that must keep the common number; the others hold accidental zeros


@dataclass(frozen=True, eq=False)
class Movable:
    """The mask of one linear while its block is tuned.

    Attributes:
        linear: where the weight lives.
        pattern: what any mask of it must meet.
        scope: what an unstructured budget is counted over where the pattern names nothing.
        frozen: bool `(out_features, in_features)`, True where an entry is zero for ever; or None.
        mask: bool in the parameter's own orientation, True = kept; a tuner may write a new mask into it.
    """

    linear: LinearView
    pattern: Pattern
    scope: Literal["row", "layer"]
    frozen: Tensor | None
    mask: Tensor

    def select(self, score: Tensor) -> Tensor:
        """Return the mask of the largest scores that the pattern allows, frozen zeros last.

        Args:
            score: in the parameter's own orientation, no NaN, larger is kept first.

        Returns:
            bool, same shape.
        """
        own = score.detach().T if self.linear.transposed else score.detach()
        if self.frozen is not None:
            own = own.masked_fill(self.frozen, -torch.inf)
        return self.linear.parameter_mask(self.pattern.mask(own.contiguous(), self.scope))

    def moved(self, before: Tensor) -> Tensor | None:
        """Return the mask `(out_features, in_features)` on CPU if it is no longer `before`, else None.

        Raises:
            PatternError: if the new mask breaks the pattern, or frees a frozen zero.
        """
        after = (self.mask.T if self.linear.transposed else self.mask).cpu()
        if torch.equal(after, before):
            return None
        try:
            self.pattern.check(after, self.scope)
        except PatternError as error:
            raise PatternError(f"the tuner broke the pattern of `{self.linear.name}`: {error}") from error
        if self.frozen is not None and bool((after & self.frozen.cpu()).any()):
            raise PatternError(f"the tuner brought back frozen zeros of `{self.linear.name}`")
        return after


def pattern_of_mask(mask: Tensor) -> Pattern:
    """Return the pattern that a mask which was found in a model meets: N:M, a budget per row, or one per layer.

    N:M and row budgets are those of the fullest group and row, where nearly all agree.

    Args:
        mask: bool `(out_features, in_features)`, True = kept.
    """
    columns = mask.shape[1]
    for width in GROUPS:
        if columns % width == 0 and (kept := _common(mask.reshape(-1, width).sum(1))) not in (None, width):
            return NM(int(kept or 0), width)
    kept = _common(mask.sum(1))
    if kept is not None:
        return Unstructured(1 - kept / columns, "row")
    return Unstructured(1 - int(mask.sum()) / mask.numel(), "layer")


def _common(counts: Tensor) -> int | None:
    """Return the largest of `counts` if nearly all are equal to it, else None."""
    most = counts.max()
    return int(most) if float((counts == most).float().mean()) >= TYPICAL else None
