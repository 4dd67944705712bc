"""Wanda: magnitude times input norm, no weight update.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, arXiv 2306.11695.
A weight matters if it is large *and* its input is; scores are compared inside one output row.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from secateur.core.method import method
from secateur.core.problem import LayerProblem, Pruned


def wanda_score(weight: Tensor, input_norm: Tensor) -> Tensor:
    """Return |W| * ||x||, the score of each weight (section 3 of the paper).

    Args:
        weight: `(out_features, in_features)`.
        input_norm: `(in_features,)`, root mean square of each input over the calibration tokens.

    Returns:
        `(out_features, in_features)`, larger is kept first.
    """
    return weight.abs() * input_norm


@method
class Wanda:
    """One-shot pruner: score once, the kept weights stay as they are.

    Where `problem.start` is given, its values are scored and kept instead of the target's.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"diag"})
    scope: ClassVar[Literal["row", "layer"]] = "row"

    def prune(self, problem: LayerProblem) -> Pruned:
        """Return `problem` solved by one selection."""
        return Pruned.keep(problem.point, problem.select(self.score(problem), self.scope))

    def score(self, problem: LayerProblem) -> Tensor:
        """Return |W| * ||x||, `(out_features, in_features)`."""
        return wanda_score(problem.point, problem.need("diag").sqrt())
