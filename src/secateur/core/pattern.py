"""Patterns: which positions of a weight may stay, as exact integer budgets.

A pattern never looks at weights, only at scores; the same pattern object serves every pruner. `NM(2, 4)` keeps 2 of
every 4 consecutive inputs; `Unstructured(0.7)` removes exactly `floor(0.7 * size)` entries of each row, layer or model.
Patterns are read and checked without torch, so that a wrong recipe fails at once; only masks import it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from secateur.core.errors import NumericError, PatternError

if TYPE_CHECKING:
    from torch import Tensor

Scope = Literal["row", "layer", "model"]
SCOPES: tuple[Scope, ...] = ("row", "layer", "model")


def pruned_count(sparsity: float, size: int) -> int:
    """Return `floor(sparsity * size)`, forgiving the last bits of a decimal fraction (0.29 of 100 is 29)."""
    return math.floor(sparsity * size + 1e-6)


@dataclass(frozen=True)
class NM:
    """Keep exactly `n` of every `m` consecutive input columns (NVIDIA's reading of "2:4").

    Raises:
        PatternError: unless `0 <= n <= m` and `m >= 1`.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if self.m < 1 or not 0 <= self.n <= self.m:
            raise PatternError(
                f"pattern `{self.n}:{self.m}` must keep N of M with 0 <= N <= M and M >= 1",
                hint="`2:4` keeps 2 of every 4 consecutive inputs",
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, 0..1."""
        return 1 - self.n / self.m

    @property
    def stride(self) -> int:
        """Columns that are decided together."""
        return self.m

    def fit(self, rows: int, columns: int, name: str = "this layer") -> None:
        """Raise PatternError unless a `(rows, columns)` weight can carry the pattern."""
        if columns % self.m:
            raise PatternError(
                f"pattern `{self}` needs in_features divisible by {self.m}, `{name}` has {columns}",
                hint="leave the layer out with `ignore`, or choose another pattern for it",
            )

    def mask(self, score: Tensor, scope: Scope = "row") -> Tensor:
        """Return bool `(rows, columns)`: the `n` largest scores of each group, ties to the lower column.

        `scope` is accepted so that every pattern is called alike; it does not change an N:M mask.
        """
        from secateur.core.select import top_of_groups

        _refuse_nan(score)
        self.fit(*score.shape)
        return top_of_groups(score, self.n, self.m)

    def check(self, mask: Tensor, scope: Scope = "row") -> None:
        """Raise PatternError unless every group of `mask` keeps exactly `n`."""
        self.fit(*mask.shape)
        kept = mask.reshape(-1, self.m).sum(1)
        wrong = int((kept != self.n).sum())
        if wrong:
            raise PatternError(f"{wrong} of {kept.numel()} groups do not keep exactly {self.n} of {self.m}")


@dataclass(frozen=True)
class Unstructured:
    """Remove exactly `floor(sparsity * size)` entries, counted per row, per layer or over the whole model.

    Args:
        sparsity: fraction of zeros, 0..1.
        scope: what the budget is counted over; None takes the pruner's own (`row` for Wanda, `layer` for SparseGPT).
            A `model` budget becomes one `layer` budget per linear before any pruner sees it (`engine/budget.py`).

    Raises:
        PatternError: if `sparsity` is outside 0..1 or NaN, or `scope` is unknown.
    """

    sparsity: float
    scope: Scope | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise PatternError(
                f"sparsity `{self.sparsity}` must lie between 0 and 1", hint="write `70%` or `0.7` for 70 percent zeros"
            )
        if self.scope is not None and self.scope not in SCOPES:
            raise PatternError(f"scope `{self.scope}` must be one of {', '.join(SCOPES)}")

    def __str__(self) -> str:
        percent = f"{100 * self.sparsity:.10g}%"
        return f"{percent} {self.scope}" if self.scope else percent

    @property
    def stride(self) -> None:
        """No columns are decided together."""
        return None

    def fit(self, rows: int, columns: int, name: str = "this layer") -> None:
        """Every weight can carry an unstructured pattern."""

    def mask(self, score: Tensor, scope: Scope = "layer") -> Tensor:
        """Return bool `(rows, columns)` that keeps the largest scores, ties to the lower index.

        Args:
            score: `(rows, columns)`, no NaN.
            scope: the pruner's own scope, used where the pattern names none.
        """
        from secateur.core.select import top_of_matrix, top_of_rows

        _refuse_nan(score)
        rows, columns = score.shape
        if self.counted_over(scope) == "row":
            return top_of_rows(score, columns - pruned_count(self.sparsity, columns))
        return top_of_matrix(score, rows * columns - pruned_count(self.sparsity, rows * columns))

    def check(self, mask: Tensor, scope: Scope = "layer") -> None:
        """Raise PatternError unless `mask` removes exactly the budget in every row, or in the layer."""
        rows, columns = mask.shape
        if self.counted_over(scope) == "row":
            expected, removed = pruned_count(self.sparsity, columns), columns - mask.sum(1)
            if bool((removed != expected).any()):
                raise PatternError(
                    f"pattern `{self}` removes {expected} of {columns} entries in every row, "
                    f"got between {int(removed.min())} and {int(removed.max())}"
                )
            return
        wanted, got = pruned_count(self.sparsity, rows * columns), rows * columns - int(mask.sum())
        if got != wanted:
            raise PatternError(f"pattern `{self}` removes {wanted} of {rows * columns} entries, got {got}")

    def counted_over(self, scope: Scope) -> Literal["row", "layer"]:
        """Return the scope that applies when the pruner's own is `scope`.

        Raises:
            PatternError: for a `model` budget that nobody has divided among the layers yet.
        """
        chosen = self.scope or scope
        if chosen == "model":
            raise PatternError(
                f"pattern `{self}` counts over the whole model and must be divided among the layers first"
            )
        return chosen


Pattern = NM | Unstructured

_NM = re.compile(r"(-?\d+)\s*:\s*(-?\d+)")
_UNSTRUCTURED = re.compile(r"([+-]?[\d.]+(?:e[+-]?\d+)?|nan|[+-]?inf)\s*(%?)\s*([a-z]*)", re.IGNORECASE)


def parse_pattern(text: str | float | Pattern) -> Pattern:
    """Return the pattern that `text` names: `70%`, `0.7`, `2:4`, `4:8`, `70% row`, `70% layer`, `70% model`.

    Raises:
        PatternError: for any other text, or for numbers out of range.
    """
    if isinstance(text, NM | Unstructured):
        return text
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise PatternError(f"pattern must be a text or a number, got {type(text).__name__}")
    words = str(text).strip()
    if match := _NM.fullmatch(words):
        return NM(int(match[1]), int(match[2]))
    if match := _UNSTRUCTURED.fullmatch(words):
        try:
            number = float(match[1])
        except ValueError:
            number = math.nan
        scope = match[3].lower() or None
        if scope is not None and scope not in SCOPES:
            raise PatternError(f"pattern `{words}` ends in an unknown scope `{scope}`", hint=f"use {', '.join(SCOPES)}")
        return Unstructured(number / 100 if match[2] else number, scope)
    raise PatternError(f"pattern `{words}` is not understood", hint="write `70%`, `0.7`, `2:4`, `4:8` or `70% row`")


def _refuse_nan(score: Tensor) -> None:
    # the sum is NaN if an entry is (or for opposite infinities), and costs a tenth of looking at every entry
    if bool(score.sum().isnan()) and bool(score.isnan().any()):
        raise NumericError(
            "a score is NaN, which would be kept as the largest", hint="look for NaN in the weights or the calibration"
        )
