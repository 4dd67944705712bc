"""Magnitude pruning: the largest weights stay, no data is needed.

The classical score (Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015,
arXiv 1506.02626). A baseline for language models, poor above 30 to 40 percent, and a fair start for block tuning.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from secateur.core.method import method
from secateur.core.problem import LayerProblem, Pruned


@method
class Magnitude:
    """One-shot pruner without calibration: all weights of a linear compete, the kept ones stay as they are.

    Where `problem.start` is given, its values are scored and kept instead of the target's.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    scope: ClassVar[Literal["row", "layer"]] = "layer"

    def prune(self, problem: LayerProblem) -> Pruned:
        """Return `problem` solved by one selection."""
        return Pruned.keep(problem.point, problem.select(self.score(problem), self.scope))

    def score(self, problem: LayerProblem) -> Tensor:
        """Return |W|, `(out_features, in_features)`."""
        return problem.point.abs()
