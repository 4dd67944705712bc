"""One linear of a block: its problem put together, solved, and written back as it will be stored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.core.contracts import Pruner
from secateur.core.errors import NumericError
from secateur.core.faults import hit
from secateur.core.linalg import corrected_target, is_finite
from secateur.core.mask import Masks
from secateur.core.problem import LayerProblem
from secateur.core.solve import solve
from secateur.engine.groups import Group
from secateur.engine.reports import LayerReport
from secateur.engine.stream import WorkingBlock
from secateur.models.blocks import Blocks
from secateur.models.linears import OUTSIDE, LinearView

if TYPE_CHECKING:
    from secateur.engine.sweep import Sweep


@dataclass
class LayerSolver:
    """Solves the linears of working copies as a sweep says.

    Attributes:
        settings: the sweep.
        blocks: of the model, which know the dtype that weights are stored in.
        dtype: of working copies.
        warnings: what was not done as asked.
    """

    settings: Sweep
    blocks: Blocks
    dtype: torch.dtype
    warnings: list[str] = field(default_factory=list)

    def wanted(self) -> set[str]:
        """Return the statistics that this sweep collects."""
        pruner = self.settings.pruner
        wanted = set(pruner.needs) if pruner is not None else set()
        if self.settings.refit or self.settings.error_correction:
            wanted.add("gram")
        if self.settings.error_correction:
            wanted.add("cross")
        return wanted

    def solve(self, linear: LinearView, group: Group, pruner: Pruner) -> tuple[LayerReport, Tensor]:
        """Prune one linear of the working copy, in its storage dtype's precision."""
        hit("sweep.solve")
        problem = self.problem(linear, group)
        dense = problem.weight if problem.dense is None else problem.dense
        notes: tuple[str, ...] = ()
        if not group.stats.count and linear.class_name != "Embedding":
            notes = ("no calibration token reached it, so all inputs counted alike",)
        refit = self.settings.refit and problem.gram is not None
        try:
            result = solve(pruner, problem, refit=refit, guard=self.settings.guard, name=linear.name)
        except NumericError as error:
            if self.settings.fallback != "diag" or problem.gram is None or not is_finite(problem.gram):
                raise
            notes += (f"degraded: solved on the diagonal of its Gram matrix, because {error.args[0]}",)
            self.warnings.append(f"`{linear.name}` is degraded: {error.args[0]}")
            simple = replace(problem, gram=torch.diag(problem.gram.diagonal()), shared={})
            result = solve(pruner, simple, refit=refit, guard=self.settings.guard, name=linear.name)
        linear.write(result.pruned.weight.to(self.stored_dtype(linear)).to(self.dtype))
        mask = result.pruned.mask
        report = LayerReport(
            linear.name,
            linear.block,
            (dense.shape[0], dense.shape[1]),
            1 - int(mask.sum()) / mask.numel(),
            str(problem.pattern),
            result.loss_before,
            result.loss_after,
            result.seconds,
            notes + result.notes,
        )
        return report, mask

    def problem(self, linear: LinearView, group: Group) -> LayerProblem:
        """Return the layer problem of `linear` with the statistics of its inputs."""
        dense = linear.read().to(self.settings.device, torch.float32)
        if not bool(torch.isfinite(dense).all()):
            bad = int((~torch.isfinite(dense)).sum())
            raise NumericError(f"{bad} values of the weight of `{linear.name}` are NaN or infinite")
        statistics = group.statistics()
        target = dense
        if "cross" in statistics and group.stats.count:
            target = corrected_target(dense, statistics["cross"], statistics["gram"])
        return LayerProblem(
            weight=target,
            pattern=self.settings.patterns[linear.name],
            gram=statistics.get("gram"),
            diag=statistics.get("diag"),
            mean=statistics.get("mean"),
            frozen=self.frozen(linear, dense),
            dense=dense if target is not dense else None,
            shared=group.shared,
        )

    def frozen(self, linear: LinearView, dense: Tensor) -> Tensor | None:
        """Return what must be zero in the weight of `linear`, or None if that is up to the pruner."""
        masks = self.settings.masks
        if masks is not None and linear.name in masks:
            return ~masks[linear.name].to(dense.device)
        return (dense == 0) if self.settings.freeze_zeros else None

    def round_(self, work: WorkingBlock, masks: Masks) -> None:
        """Bring the working copy to the precision it will be stored in, its zeros to true zeros."""
        original = dict(self.blocks.modules[work.index].named_parameters())
        stored = next(iter(original.values())).dtype
        if stored != self.dtype:
            for parameter in work.module.parameters():
                parameter.data = parameter.data.to(stored).to(self.dtype)
        for linear in work.linears:
            if linear.name in masks:
                linear.write(linear.read().masked_fill(~masks[linear.name].to(linear.read().device), 0.0))

    def stored_dtype(self, linear: LinearView) -> torch.dtype:
        """Return the dtype that the model keeps the weights of this linear in."""
        if linear.block == OUTSIDE:
            return linear.parameter.dtype
        return next(self.blocks.modules[linear.block].parameters()).dtype
