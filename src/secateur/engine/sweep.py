"""The sweep: block after block is calibrated, pruned, tuned and left behind, in one traversal of the model.

For each block: copy it to the device; run the dense path if anybody asks for it; run all batches on the sparse path in
step, pruning each linear when its statistics are complete; tune the masked block; compute what enters the next block;
write the block back, and to the journal if there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.core.contracts import BlockTuner, Pruner, Scoring
from secateur.core.errors import PatternError
from secateur.core.mask import Masks
from secateur.core.pattern import Pattern
from secateur.core.problem import LayerProblem
from secateur.core.progress import Progress, Silent
from secateur.engine.activations import Offload
from secateur.engine.journal import Journal
from secateur.engine.reports import SweepReport
from secateur.engine.traversal import Traversal
from secateur.models.linears import find_all_linears

CPU = torch.device("cpu")
Nonfinite = Literal["error", "zero", "skip-batch"]
Fallback = Literal["error", "diag"]


@dataclass(frozen=True)
class Sweep:
    """How to go through a model.

    Attributes:
        patterns: `{linear name: Pattern}`; linears without one are left dense.
        masks: masks chosen beforehand, which fit `patterns`; the pruner may only change the weights they keep.
        pruner: None keeps the zeros that are there (tuning only).
        tuner: tunes each block after its linears are pruned.
        sequential: a linear sees inputs from the already pruned linears before it in its block; False takes the
            statistics of the dense block, as the published code does.
        error_correction: aim at the dense path's outputs (needs the cross Gram and one more dense pass).
        refit: exact refit of every linear on its final mask.
        guard: never leave a layer worse than its mask alone.
        freeze_zeros: zeros of the given model stay zero and count in the budget.
        seed: decides all randomness.
        device: where blocks are computed.
        offload: where hidden states wait.
        batch_tokens: tokens of one calibration batch.
        ignore: linears that are not even looked at (also matrices of kinds that are not known), see `models.linears.match`.
        nonfinite: what to do about NaN and infinity: `error`; `zero` sets such weights to zero before anything else;
            `skip-batch` leaves out calibration batches whose hidden states are not finite, up to 1 % (at least one).
        fallback: `diag` solves a linear on the diagonal of its Gram where no factorisation works, and says so.
        deadline: `time.monotonic()` after which the sweep stops at a block boundary.
    """

    patterns: Mapping[str, Pattern]
    pruner: Pruner | None = None
    tuner: BlockTuner | None = None
    sequential: bool = True
    error_correction: bool = False
    refit: bool = False
    guard: bool = True
    freeze_zeros: bool = False
    seed: int = 0
    device: torch.device = CPU
    offload: Offload = "ram"
    batch_tokens: int = 8192
    ignore: tuple[str, ...] = ()
    nonfinite: Nonfinite = "error"
    fallback: Fallback = "error"
    deadline: float | None = None
    masks: Masks | None = None

    def run(
        self,
        model: nn.Module,
        ids: Tensor,
        keep: Tensor | None = None,
        *,
        teacher: nn.Module | None = None,
        journal: Journal | None = None,
        progress: Progress | None = None,
    ) -> SweepReport:
        """Prune and tune `model` in place.

        Args:
            model: a causal language model, on any device.
            ids: int64 `(samples, length)`, calibration tokens.
            keep: bool `(samples, length)`, False on padding; None where all tokens are real.
            teacher: the dense model where `model` is sparse already; None takes the blocks of `model` as they come.
            journal: where finished blocks are stored and found again.
            progress: told about every block.

        Raises:
            SecateurError: any of its kinds; with a journal, finished blocks are safe.
        """
        return Traversal(self, model, ids, keep, teacher, journal, progress or Silent()).run()

    def scores(
        self, model: nn.Module, ids: Tensor, keep: Tensor | None = None, *, progress: Progress | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield `(linear name, score (out_features, in_features))` of every linear in `patterns`, on dense inputs.

        What budgets over the whole model are divided by; nothing is changed.

        Args:
            model: a causal language model.
            ids: int64 `(samples, length)`; not looked at by a pruner that needs no statistics.
            keep: bool `(samples, length)`, False on padding.
            progress: told about every block.

        Raises:
            PatternError: if the pruner cannot score without pruning.
        """
        if not isinstance(self.pruner, Scoring):
            raise PatternError(
                f"`{type(self.pruner).__name__}` ranks no weights by themselves, which a budget over the whole model needs",
                hint="use a budget per layer or row, or another method",
            )
        if not self.pruner.needs:
            for linear in find_all_linears(model):
                if linear.name in self.patterns:
                    yield (
                        linear.name,
                        self.pruner.score(LayerProblem(linear.read().float(), self.patterns[linear.name])),
                    )
            return
        pruner = self.pruner
        for name, problem in self.problems(model, ids, keep, progress=progress):
            yield name, pruner.score(problem)

    def problems(
        self, model: nn.Module, ids: Tensor, keep: Tensor | None = None, *, progress: Progress | None = None
    ) -> Iterator[tuple[str, LayerProblem]]:
        """Yield `(linear name, layer problem)` of every linear in `patterns`, on dense inputs, in the model's order.

        Each problem holds the statistics that the pruner needs; nothing is changed.

        Args:
            model: a causal language model.
            ids: int64 `(samples, length)`.
            keep: bool `(samples, length)`, False on padding.
            progress: told about every block.
        """
        yield from Traversal(self, model, ids, keep, None, None, progress or Silent()).problems()
