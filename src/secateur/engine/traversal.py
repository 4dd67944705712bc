"""One sweep under way: what is done to each block, in which order, and what is kept between blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from secateur.core.contracts import BlockTask, BlockTuner, Tuned
from secateur.core.errors import (
    InputError,
    RecipeError,
    SecateurError,
    TimeLimitReached,
)
from secateur.core.faults import hit
from secateur.core.mask import Masks
from secateur.core.problem import LayerProblem
from secateur.core.progress import Progress, step
from secateur.engine.activations import Activations
from secateur.engine.batches import Batches
from secateur.engine.calibrate import at_once, beside_dense, in_sequence
from secateur.engine.groups import Group
from secateur.engine.journal import Journal, generator_for
from secateur.engine.layer_solver import LayerSolver
from secateur.engine.mishaps import Mishaps
from secateur.engine.movable import Movable, pattern_of_mask
from secateur.engine.outside import Largest, Outside, statistics
from secateur.engine.reports import BlockReport, LayerReport, SweepReport, from_json, kept_line, to_json
from secateur.engine.stream import (
    WorkingBlock,
    borrow,
    changed_parameters,
    compute_dtype,
    return_free_memory,
    write_back_,
)
from secateur.models.blocks import Blocks, find_blocks
from secateur.models.linears import LinearView
from secateur.models.pages import Mappings
from secateur.models.repair import zero_nonfinite_
from secateur.models.skeleton import run_block

if TYPE_CHECKING:
    from secateur.engine.sweep import Sweep


@dataclass
class PrunedBlock:
    """What pruning a block found: a line for each linear, the masks, and the block's outputs where they were computed.

    Attributes:
        layers: one line for each linear that has a pattern.
        masks: their masks.
        outputs: of the block as it was left, on the sparse path; None where they were not computed.
        dense: outputs on the dense path, None likewise.
    """

    layers: list[LayerReport] = field(default_factory=list)
    masks: Masks = field(default_factory=Masks)
    outputs: Activations | None = None
    dense: Activations | None = None


class Traversal:
    """One sweep under way."""

    def __init__(
        self,
        settings: Sweep,
        model: nn.Module,
        ids: Tensor,
        keep: Tensor | None,
        teacher: nn.Module | None,
        journal: Journal | None,
        progress: Progress,
    ) -> None:
        self.settings = settings
        if settings.error_correction and not settings.sequential:
            raise RecipeError("`error_correction: true` needs `sequential: true`, where both paths run in step")
        self.model = model
        self.blocks = find_blocks(model)
        self.teacher = find_blocks(teacher) if teacher is not None else None
        if self.teacher is not None and self.teacher.names != self.blocks.names:
            raise InputError("the teacher does not have the blocks of the model that is tuned")
        self.journal = journal
        self.progress = progress
        self.dtype = compute_dtype(model, settings.device)
        self.batches = Batches(
            model,
            self.blocks,
            ids,
            keep,
            sequences=max(1, settings.batch_tokens // ids.shape[1]),
            dense_path=settings.error_correction or (settings.tuner is not None and settings.tuner.dense_path),
            device=settings.device,
            dtype=self.dtype,
            offload=settings.offload,
        )
        self.mishaps = Mishaps(self.batches, skip=settings.nonfinite == "skip-batch")
        self.report = SweepReport()
        self.solver = LayerSolver(settings, self.blocks, self.dtype, self.report.warnings)
        if settings.nonfinite == "zero":
            self.report.warnings += zero_nonfinite_(model)

    @torch.no_grad()
    def run(self) -> SweepReport:
        """Go through all blocks, and what is to be pruned outside of them."""
        count = len(self.blocks.names)
        outside = Outside(self.model, self.blocks, self.settings.patterns, self.settings.ignore)
        self.batches.embed(self.progress)
        with step(self.progress, self.title(), count) as number:
            start = self.catch_up()
            self.progress.advance(number, start)
            for index in range(start, count):
                if self.settings.deadline is not None and time.monotonic() > self.settings.deadline and index > start:
                    raise TimeLimitReached(
                        f"the time limit was reached after {index} of {count} blocks", hint="go on with --resume"
                    )
                hit("sweep.block")
                last = index == count - 1 and not outside.linears
                try:
                    self.mishaps.survive(partial(self.block, index, partial(self.progress.advance, number), last))
                except SecateurError as error:
                    error.add_note(f"in block {index} (`{self.blocks.names[index]}`)")
                    raise
        if outside.linears and len(self.report.blocks) == count:
            self.prune_outside(outside)
        self.report.warnings += self.mishaps.warnings
        return self.report

    def problems(self) -> Iterator[tuple[str, LayerProblem]]:
        """Yield the problems of all linears in the dense model, block by block."""
        self.batches.embed(self.progress)
        with step(self.progress, "scoring", len(self.blocks.names)) as number:
            for index in range(len(self.blocks.names)):
                with torch.no_grad():
                    work = self.work(index)
                    chosen = [linear for linear in work.linears if linear.name in self.settings.patterns]
                    for linear, group in at_once(self.batches, work, chosen, self.solver.wanted()):
                        yield linear.name, self.solver.problem(linear, group)
                    self.batches.sparse = self.batches.forward(work, self.batches.sparse)
                self.release(index)
                self.progress.advance(number, 1)

    def title(self) -> str:
        """Return what is being done, in words."""
        doing = [
            word for word, active in (("pruning", self.settings.pruner), ("tuning", self.settings.tuner)) if active
        ]
        return " and ".join(doing) or "walking"

    def catch_up(self) -> int:
        """Take over the journal's finished blocks, and the hidden states that leave them; return their number."""
        if self.journal is None or not self.journal.finished:
            return 0
        self.report.warnings += self.journal.warnings
        batches, blocks = self.batches, len(self.blocks.names)
        stored = [self.journal.read(number) for number in range(self.journal.finished)]
        reports = [from_json(finished.report) for finished in stored]
        self.report.earlier_seconds = sum(report.seconds for report in reports)
        self.mishaps.repeat([mishap for report in reports for mishap in report.mishaps])
        waiting = batches.paths() if len(stored) <= blocks else {}  # nothing is left to do behind the blocks
        states = {path: self.journal.hidden(path, len(batches)) for path in waiting}
        whole = all(found is not None for found in states.values())
        for index, (finished, report) in enumerate(zip(stored, reports, strict=True)):
            if index == blocks:  # what is outside the blocks comes last
                write_back_(self.model, finished.weights, assign=True)
                self.account(report, finished.masks)
                continue
            if batches.dense_path and not whole:
                batches.dense = batches.forward(self.dense_work(index), batches.dense)
            write_back_(self.blocks.modules[index], finished.weights, assign=True)
            self.account(report, finished.masks)
            if not whole:
                batches.sparse = batches.forward(self.work(index), batches.sparse)
                self.release(index)
        if whole:
            for path, store in waiting.items():
                for batch, hidden in enumerate(states[path] or []):
                    store[batch] = hidden
        return min(self.journal.finished, blocks)

    def block(self, index: int, advance: Callable[[float], None], last: bool) -> None:
        """Do one block, from the copy to the journal."""
        started = time.perf_counter()
        tuner, batches = self.settings.tuner, self.batches
        work = self.work(index)
        dense = self.dense_work(index) if self.teacher is not None or self.settings.error_correction else None
        dense_next: Activations | None = None  # what leaves this block on the dense path
        targets: Activations | None = None
        if tuner is not None and not self.settings.error_correction:
            targets = batches.forward(dense or work, batches.dense if tuner.dense_path else batches.sparse)
            dense_next = targets if tuner.dense_path else None
        share = 1.0 if tuner is None else 0.25
        found = self.prune(work, dense, lambda part: advance(part * share))
        outputs, masks = found.outputs, found.masks
        dense_next = found.dense if dense_next is None else dense_next
        if self.settings.error_correction and tuner is not None:
            targets = dense_next if tuner.dense_path else batches.forward(dense or work, batches.sparse)
        tuned = None
        if tuner is not None and targets is not None:
            told = [0.0]

            def tell(fraction: float) -> None:
                advance((fraction - told[0]) * (1 - share))
                told[0] = fraction

            return_free_memory()
            if masks:
                tuned = self.tune(tuner, work, masks, targets, tell)
            tell(1.0)
        self.solver.round_(work, masks)
        if not last and (tuner is not None or outputs is None):
            outputs = None  # freed before the next ones take its place
            outputs = batches.forward(work, batches.sparse)
        if not last and outputs is not None:
            batches.sparse = outputs
        if dense_next is not None:
            batches.dense = dense_next
        zeros = sum(int((linear.read() == 0).sum()) for linear in work.linears)
        size = sum(linear.read().numel() for linear in work.linears)
        seconds = time.perf_counter() - started
        mishaps = self.mishaps.since_last()
        report = BlockReport(index, tuple(found.layers), tuned, seconds, zeros, size, mishaps)
        self.finish(work, report, masks)

    def prune(self, work: WorkingBlock, dense: WorkingBlock | None, advance: Callable[[float], None]) -> PrunedBlock:
        """Prune the linears of `work` that have a pattern."""
        pruner, batches = self.settings.pruner, self.batches
        chosen = [linear for linear in work.linears if linear.name in self.settings.patterns]
        found = PrunedBlock()
        if pruner is None:
            for linear in chosen:
                mask = linear.read() != 0
                found.masks[linear.name] = mask
                found.layers.append(kept_line(linear, mask, str(self.settings.patterns[linear.name])))
            advance(1.0)
            return found

        def decide(linear: LinearView, group: Group) -> None:
            report, mask = self.solver.solve(linear, group, pruner)
            found.layers.append(report)
            found.masks[linear.name] = mask
            advance(1 / len(chosen))

        if not chosen:
            if self.settings.error_correction and dense is not None:
                found.dense = batches.forward(dense, batches.dense)  # later blocks aim at what leaves this one
            advance(1.0)
        elif self.settings.error_correction and dense is not None:
            found.outputs, found.dense = beside_dense(batches, work, dense, chosen, self.solver.wanted(), decide)
        elif self.settings.sequential:
            finish = self.settings.tuner is None
            found.outputs = in_sequence(batches, work, chosen, self.solver.wanted(), decide, finish=finish)
        else:
            for linear, group in at_once(batches, work, chosen, self.solver.wanted()):
                decide(linear, group)
        return found

    def prune_outside(self, outside: Outside) -> None:
        """Prune what stands behind the blocks, on what leaves the last of them."""
        pruner = self.settings.pruner
        if pruner is None:
            return
        started, layers, masks = time.perf_counter(), [], Masks()
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        weights: dict[str, Tensor] = {}
        for linear in outside.linears:
            embedding = linear.class_name == "Embedding"
            group = statistics(self.batches, linear, self.solver.wanted())
            report, mask = self.solver.solve(linear, group, Largest() if embedding else pruner)
            layers.append(report)
            masks[linear.name] = mask
            weights[names[id(linear.parameter)]] = linear.parameter.detach()
        whole = BlockReport(len(self.blocks), tuple(layers), None, time.perf_counter() - started, 0, 0)
        if self.journal is not None:
            write_back_(self.model, self.journal.add(weights, masks, to_json(whole), {}).weights, assign=True)
        self.account(whole, masks)

    def tune(
        self, tuner: BlockTuner, work: WorkingBlock, masks: Masks, targets: Activations, tell: Callable[[float], None]
    ) -> Tuned:
        """Tune the working copy, gradients on."""
        device, calls, inputs = self.settings.device, self.batches.calls, self.batches.sparse
        keeps = self.batches.keeps

        def call(block: nn.Module, batch: int, rows: slice | None) -> Tensor:
            hidden = inputs[batch]
            arguments = calls[batch][work.index].rows(rows, hidden.shape[0]).to(device, self.dtype)
            chosen = hidden if rows is None else hidden[rows]
            return run_block(block, chosen.to(device, non_blocking=True), arguments)

        movable = self.movable(work, masks)
        task = BlockTask(
            block=work.module,
            masked=[(each.linear.parameter, each.mask) for each in movable],
            inputs=inputs,
            targets=targets,
            call=call,
            keep=lambda batch: keeps[batch],
            generator=generator_for(self.settings.seed, work.index, "tune"),
            progress=tell,
            select=[each.select for each in movable],
        )
        with torch.enable_grad():
            tuned = tuner.tune(task)
        for each in movable:
            if (moved := each.moved(masks[each.linear.name])) is not None:
                masks[each.linear.name] = moved
        return tuned

    def movable(self, work: WorkingBlock, masks: Masks) -> list[Movable]:
        """Return the masks of `work` with what a tuner that moves them must respect."""
        pruner, device = self.settings.pruner, self.settings.device
        frozen: dict[str, Tensor] = {}
        if self.settings.freeze_zeros:
            frozen = {linear.name: linear.read() == 0 for linear in self.work(work.index).linears}
        return [
            Movable(
                linear,
                pattern_of_mask(masks[linear.name]) if pruner is None else self.settings.patterns[linear.name],
                "layer" if pruner is None else pruner.scope,
                frozen.get(linear.name),
                linear.parameter_mask(masks[linear.name].to(device)),
            )
            for linear in work.linears
            if linear.name in masks
        ]

    def finish(self, work: WorkingBlock, report: BlockReport, masks: Masks) -> None:
        """Write a finished block back, store it, and count it."""
        original = self.blocks.modules[work.index]
        weights = changed_parameters(work, original)
        self.release(work.index)  # the old weights' pages, before other tensors take their place
        if self.journal is not None:
            finished = self.journal.add(weights, masks, to_json(report), self.batches.paths())
            write_back_(original, finished.weights, assign=True)
        else:
            write_back_(original, weights, assign=False)
        self.release(work.index)
        self.account(report, masks)

    def release(self, index: int) -> None:
        """Give back the memory of a block that is not needed for a while, where it is a mapped file."""
        return_free_memory()
        mappings = Mappings()
        mappings.release(self.blocks.modules[index].parameters())
        if self.teacher is not None:
            mappings.release(self.teacher.modules[index].parameters())

    def account(self, report: BlockReport, masks: Masks) -> None:
        """Count a finished block in the report."""
        self.report.blocks.append(report)
        self.report.zeros += report.zeros
        self.report.size += report.size
        for name, mask in masks.items():
            self.report.masks[name] = mask

    def dense_work(self, index: int) -> WorkingBlock:
        """Return a copy of the dense block: the teacher's, or the model's own before it is pruned."""
        return self.work(index, self.teacher)

    def work(self, index: int, blocks: Blocks | None = None) -> WorkingBlock:
        """Return a working copy of block `index` of the model, or of other `blocks`."""
        return borrow(blocks or self.blocks, index, self.settings.device, self.dtype, self.settings.ignore)
