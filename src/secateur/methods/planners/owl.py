"""OWL: blocks with more outliers stay denser.

Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
ICML 2024, arXiv 2310.05175. A block's share of weights whose score is many times the block's mean score says how much
it suffers from pruning; its sparsity moves away from the average by up to the spread, in proportion.

Unlike the published program the average is over weights, not over blocks, and is met to the last weight; equal shares
in all blocks give the uniform plan instead of a division by zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.contracts import Plan, PlanTask
from secateur.core.errors import NumericError
from secateur.core.method import method
from secateur.core.pattern import NM
from secateur.methods.pruners.wanda import wanda_score

SPREAD = 0.08  # the paper's lambda for unstructured patterns
SPREAD_NM = 0.25  # and for N:M: 2 of 8


@method
class OWL:
    """One sparsity per block, by the share of outliers among its scores.

    Attributes:
        factor: a score is an outlier above this many times the mean of its block (the paper's M).
        spread: how far a block's sparsity lies from the average at most, as far as the budget allows (the paper's
            lambda); None takes 0.08, and 0.25 for an N:M pattern, whose steps are coarse.
        least: lower bound of every sparsity.
        most: upper bound of every sparsity.
    """

    factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    spread: Annotated[float, Field(ge=0, le=1)] | None = None
    least: Annotated[float, Field(ge=0, le=1)] = 0.0
    most: Annotated[float, Field(ge=0, le=1)] = 1.0

    copies: ClassVar[int] = 0
    backward: ClassVar[bool] = False

    def plan(self, task: PlanTask) -> Plan:
        """Return the plan; one pass over the dense model for the norms of the inputs.

        Raises:
            PatternError: if `least` and `most` leave no room for the budget.
            NumericError: if a score is NaN or infinite.
        """
        blocks = {linear.name: linear.block for linear in task.budget.linears}
        shares: dict[int, float] = {}
        scores: list[Tensor] = []
        last = -1
        for name, problem in task.problems({"diag"}):
            if blocks[name] != last and scores:
                shares[last] = outlier_share(scores, self.factor)
                scores = []
            last = blocks[name]
            score = wanda_score(problem.weight, problem.need("diag").sqrt())
            if not bool(torch.isfinite(score).all()):
                raise NumericError(f"the scores of `{name}` hold NaN or infinity")
            scores.append(score)
        shares[last] = outlier_share(scores, self.factor)
        spread = self.spread
        if spread is None:
            spread = SPREAD_NM if isinstance(task.budget.pattern, NM) else SPREAD
        wanted = sparsities(shares, spread)
        patterns = task.budget.near(
            {name: wanted[block] for name, block in blocks.items()}, self.least, self.most, units=blocks
        )
        return Plan(patterns, scores={f"block {block}": share for block, share in shares.items()})


def outlier_share(scores: list[Tensor], factor: float) -> float:
    """Return the fraction of all entries that exceed `factor` times the mean of all entries (section 3.1).

    Args:
        scores: of the linears of one block, not negative, `(out_features, in_features)` each.
        factor: how many times the mean.
    """
    size = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / size
    return sum(int((score > factor * mean).sum()) for score in scores) / size


def sparsities(shares: Mapping[int, float], spread: float) -> dict[int, float]:
    """Return how far each block's sparsity lies below the sparsest block's, negative, within `2 * spread` (section 3.2).

    Args:
        shares: outliers of each block.
        spread: half the distance between the sparsest and the densest block.
    """
    low, high = min(shares.values()), max(shares.values())
    width = high - low
    return {block: -2 * spread * (share - low) / width if width else 0.0 for block, share in shares.items()}
