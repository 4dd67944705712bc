"""One sweep under way: what is done to each block, in which order, and what is kept between blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from secateur.core.contracts import BlockTask, BlockTuner, Pruner, Scoring, Tuned
from secateur.core.errors import (
    InputError,
    NumericError,
    RecipeError,
    SecateurError,
    TimeLimitReached,
)
from secateur.core.faults import hit
from secateur.core.linalg import corrected_target
from secateur.core.mask import Masks
from secateur.core.problem import LayerProblem
from secateur.core.progress import Progress, step
from secateur.core.solve import solve
from secateur.engine.activations import Activations
from secateur.engine.groups import Group, Groups
from secateur.engine.journal import Journal, generator_for
from secateur.engine.lanes import in_step
from secateur.engine.movable import Movable, pattern_of_mask
from secateur.engine.reports import BlockReport, LayerReport, SweepReport, from_json, kept_line, to_json
from secateur.engine.stream import (
    WorkingBlock,
    borrow,
    changed_parameters,
    compute_dtype,
    return_free_memory,
    write_back_,
)
from secateur.models.blocks import Blocks, capture, find_blocks, run_block
from secateur.models.calls import BlockCall
from secateur.models.linears import LinearView
from secateur.models.pages import Mappings

if TYPE_CHECKING:
    from secateur.engine.sweep import Sweep


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
        self.dense_path = settings.error_correction or (settings.tuner is not None and settings.tuner.dense_path)
        sequences = max(1, settings.batch_tokens // ids.shape[1])
        self.ids = list(torch.split(ids, sequences))
        self.keeps: list[Tensor | None] = [None] * len(self.ids)
        if keep is not None and not bool(keep.all()):
            self.keeps = list(torch.split(keep, sequences))
        self.calls: list[list[BlockCall]] = []
        self.sparse = Activations(len(self.ids), settings.offload)
        self.dense = Activations(len(self.ids), settings.offload)
        self.report = SweepReport()

    @torch.no_grad()
    def embed(self) -> None:
        """Fill the stores with what enters block 0, and remember what else the blocks are called with."""
        with step(self.progress, "embedding the calibration text", len(self.ids)) as number:
            for batch, ids in enumerate(self.ids):
                like = self.calls[-1] if self.calls else None
                hidden, calls = capture(self.model, self.blocks, ids, self.keeps[batch], dtype=self.dtype, like=like)
                self.calls.append(calls)
                self.sparse[batch] = hidden.to(self.dtype)
                if self.dense_path:
                    self.dense[batch] = hidden.to(self.dtype)
                self.progress.advance(number, 1)
        Mappings().release(self.model.parameters())

    @torch.no_grad()
    def run(self) -> SweepReport:
        """Go through all blocks."""
        count = len(self.blocks.names)
        self.embed()
        with step(self.progress, self.title(), count) as number:
            start = self.catch_up()
            self.progress.advance(number, start)
            for index in range(start, count):
                if self.settings.deadline is not None and time.monotonic() > self.settings.deadline and index > start:
                    raise TimeLimitReached(
                        f"the time limit was reached after {index} of {count} blocks", hint="go on with --resume"
                    )
                hit("sweep.block")
                try:
                    self.block(index, lambda part: self.progress.advance(number, part), last=index == count - 1)
                except SecateurError as error:
                    error.add_note(f"in block {index} (`{self.blocks.names[index]}`)")
                    raise
        return self.report

    def scores(self, pruner: Scoring) -> Iterator[tuple[str, Tensor]]:
        """Yield the scores of all linears in the dense model, block by block."""
        self.embed()
        with step(self.progress, "scoring", len(self.blocks.names)) as number:
            for index in range(len(self.blocks.names)):
                with torch.no_grad():
                    work = self.work(index)
                    chosen = [linear for linear in work.linears if linear.name in self.settings.patterns]
                    for linear, group in self.observe(work, chosen):
                        yield linear.name, pruner.score(self.problem(linear, group))
                    self.forward(work, self.sparse, self.sparse)
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
        stored = {path: self.journal.hidden(path, len(self.ids)) for path in self.paths()}
        whole = all(states is not None for states in stored.values())
        for index in range(self.journal.finished):
            if self.dense_path and not whole:
                self.forward(self.dense_work(index), self.dense, self.dense)
            finished = self.journal.read(index)
            write_back_(self.blocks.modules[index], finished.weights, assign=True)
            self.account(from_json(finished.report), finished.masks)
            if not whole:
                self.forward(self.work(index), self.sparse, self.sparse)
                self.release(index)
        if whole:
            for path, store in self.paths().items():
                for batch, states in enumerate(stored[path] or []):
                    store[batch] = states
        return self.journal.finished

    def paths(self) -> dict[str, Activations]:
        """Return the hidden states that are carried from block to block, by path."""
        return {"sparse": self.sparse, "dense": self.dense} if self.dense_path else {"sparse": self.sparse}

    def block(self, index: int, advance: Callable[[float], None], last: bool) -> None:
        """Do one block, from the copy to the journal."""
        started = time.perf_counter()
        tuner = self.settings.tuner
        work = self.work(index)
        dense = self.dense_work(index) if self.teacher is not None or self.settings.error_correction else None
        targets: Activations | None = None
        if tuner is not None:
            targets = self.sparse.like()
            if tuner.dense_path and not self.settings.error_correction:
                self.forward(dense or work, self.dense, targets)
            elif not tuner.dense_path:
                self.forward(dense or work, self.sparse, targets)
        share = 1.0 if tuner is None else 0.25
        outputs = self.sparse.like()
        layers, masks = self.prune(work, dense, outputs, lambda part: advance(part * share))
        if self.settings.error_correction and tuner is not None and tuner.dense_path:
            targets = self.dense
        elif targets is not None and tuner is not None and tuner.dense_path:
            self.dense = targets
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
        self.round_(work, masks)
        rerun = tuner is not None or not self.outputs_are_final()
        if not last and rerun:
            self.forward(work, self.sparse, self.sparse)
        elif not last:
            self.sparse = outputs
        zeros = sum(int((linear.read() == 0).sum()) for linear in work.linears)
        size = sum(linear.read().numel() for linear in work.linears)
        seconds = time.perf_counter() - started
        self.finish(work, BlockReport(index, tuple(layers), tuned, seconds, zeros, size), masks)

    def outputs_are_final(self) -> bool:
        """Whether the pruning pass itself computed the pruned block's outputs."""
        return self.settings.pruner is not None and self.settings.sequential

    def prune(
        self, work: WorkingBlock, dense: WorkingBlock | None, outputs: Activations, advance: Callable[[float], None]
    ) -> tuple[list[LayerReport], Masks]:
        """Prune the linears of `work` that have a pattern; fill `outputs` where the pass computes them."""
        pruner = self.settings.pruner
        chosen = [linear for linear in work.linears if linear.name in self.settings.patterns]
        reports: list[LayerReport] = []
        masks = Masks()
        if pruner is None:
            for linear in chosen:
                masks[linear.name] = linear.read() != 0
                reports.append(kept_line(linear, masks[linear.name], str(self.settings.patterns[linear.name])))
            advance(1.0)
            return reports, masks

        def solved(linear: LinearView, group: Group) -> None:
            report, mask = self.solve(linear, group, pruner)
            reports.append(report)
            masks[linear.name] = mask
            advance(1 / len(chosen))

        if not chosen:
            if self.settings.error_correction and dense is not None:
                self.forward(dense, self.dense, self.dense)  # later blocks aim at what leaves this one, pruned or not
            if self.outputs_are_final():
                self.forward(work, self.sparse, outputs)
            advance(1.0)
        elif self.settings.error_correction and dense is not None:
            self.prune_beside(work, dense, chosen, outputs, solved)
        elif self.settings.sequential:
            self.prune_in_step(work, chosen, outputs, solved)
        else:
            for linear, group in self.observe(work, chosen):
                solved(linear, group)
        return reports, masks

    def prune_in_step(
        self,
        work: WorkingBlock,
        chosen: Sequence[LinearView],
        outputs: Activations,
        solved: Callable[[LinearView, Group], None],
    ) -> None:
        """Prune each linear when all batches wait before it; see `engine/lanes.py`."""
        groups = Groups(self.wanted(), self.settings.device, self.keeps)
        forwards = [self.lane(work, self.sparse, batch) for batch in range(len(self.ids))]
        stop = len(chosen) if self.settings.tuner is not None else None

        def arrive(batch: int, linear: LinearView, given: Tensor) -> None:
            groups.arrive(batch, linear, given, None)

        def leave(batch: int, output: Tensor) -> None:
            outputs[batch] = output

        in_step(
            chosen,
            forwards,
            arrive=arrive,
            decide=lambda linear: solved(linear, groups.current),
            leave=leave,
            stop_after=stop,
        )

    def prune_beside(
        self,
        work: WorkingBlock,
        dense: WorkingBlock,
        chosen: Sequence[LinearView],
        outputs: Activations,
        solved: Callable[[LinearView, Group], None],
    ) -> None:
        """As `prune_in_step`, with every batch's dense path running in step beside its sparse path.

        Lanes 2 b and 2 b + 1 are the dense and the sparse path of batch b, so each sparse arrival finds its dense twin.
        """
        if work.unpacked:
            raise InputError(
                f"error correction compares the two paths token by token, but the experts of `{work.name}` see different tokens",
                hint="leave out `error_correction`",
            )
        groups = Groups(self.wanted(), self.settings.device, self.keeps)
        twins: dict[int, Tensor] = {}
        pairs = {linear.name: linear for linear in chosen}
        forwards: list[Callable[[], Tensor]] = []
        for batch in range(len(self.ids)):
            forwards += [self.lane(dense, self.dense, batch), self.lane(work, self.sparse, batch)]
        dense_chosen = [linear for linear in dense.linears if linear.name in pairs]

        def arrive(lane: int, linear: LinearView, given: Tensor) -> None:
            batch, sparse = divmod(lane, 2)
            if sparse:
                groups.arrive(batch, linear, given, twins.pop(batch))
            else:
                twins[batch] = given

        def leave(lane: int, output: Tensor) -> None:
            batch, sparse = divmod(lane, 2)
            (outputs if sparse else self.dense)[batch] = output

        in_step(
            chosen,
            forwards,
            arrive=arrive,
            decide=lambda linear: solved(linear, groups.current),
            leave=leave,
            also=dense_chosen,
        )

    def observe(self, work: WorkingBlock, chosen: Sequence[LinearView]) -> list[tuple[LinearView, Group]]:
        """Return the statistics of all `chosen` linears with the block's weights as they are, as published code takes them."""
        groups = Groups(self.wanted(), self.settings.device, self.keeps)
        by_linear: dict[str, Group] = {}
        for batch in range(len(self.ids)):

            def arrive(_: int, linear: LinearView, given: Tensor, batch: int = batch) -> None:
                by_linear[linear.name] = groups.arrive(batch, linear, given, None, forget=False)

            # one batch at a time: nothing is decided before all of them have passed
            in_step(
                chosen,
                [self.lane(work, self.sparse, batch)],
                arrive=arrive,
                decide=lambda linear: None,
                leave=lambda lane, output: None,
                stop_after=len(chosen),
            )
        return [(linear, by_linear[linear.name]) for linear in chosen]

    def solve(self, linear: LinearView, group: Group, pruner: Pruner) -> tuple[LayerReport, Tensor]:
        """Prune one linear of the working copy, in its storage dtype's precision."""
        hit("sweep.solve")
        problem = self.problem(linear, group)
        dense = problem.weight if problem.dense is None else problem.dense
        notes = () if group.stats.count else ("no calibration token reached it, so all inputs counted alike",)
        result = solve(pruner, problem, refit=self.settings.refit, guard=self.settings.guard, name=linear.name)
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
        dense = linear.read().float()
        if not bool(torch.isfinite(dense).all()):
            bad = int((~torch.isfinite(dense)).sum())
            raise NumericError(f"{bad} values of the weight of `{linear.name}` are NaN or infinite")
        statistics = group.statistics()
        target = dense
        if self.settings.error_correction and group.stats.count:
            target = corrected_target(dense, statistics["cross"], statistics["gram"])
        return LayerProblem(
            weight=target,
            pattern=self.settings.patterns[linear.name],
            gram=statistics.get("gram"),
            diag=statistics.get("diag"),
            mean=statistics.get("mean"),
            frozen=(dense == 0) if self.settings.freeze_zeros else None,
            dense=dense if target is not dense else None,
            shared=group.shared,
        )

    def tune(
        self, tuner: BlockTuner, work: WorkingBlock, masks: Masks, targets: Activations, tell: Callable[[float], None]
    ) -> Tuned:
        """Tune the working copy, gradients on."""
        device, calls, inputs = self.settings.device, self.calls, self.sparse

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
            keep=lambda batch: self.keeps[batch],
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
            finished = self.journal.add(weights, masks, to_json(report), self.paths())
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
        return next(self.blocks.modules[linear.block].parameters()).dtype

    def dense_work(self, index: int) -> WorkingBlock:
        """Return a copy of the dense block: the teacher's, or the model's own before it is pruned."""
        return self.work(index, self.teacher)

    def work(self, index: int, blocks: Blocks | None = None) -> WorkingBlock:
        """Return a working copy of block `index` of the model, or of other `blocks`."""
        return borrow(blocks or self.blocks, index, self.settings.device, self.dtype, self.settings.ignore)

    def lane(self, work: WorkingBlock, inputs: Activations, batch: int) -> Callable[[], Tensor]:
        """Return the forward of `batch` through `work`, to be run later."""

        def forward() -> Tensor:
            hidden = inputs[batch].to(self.settings.device)
            output = run_block(work.module, hidden, self.calls[batch][work.index].to(self.settings.device, self.dtype))
            if not bool(torch.isfinite(output).all()):
                raise NumericError(f"the outputs of block {work.index} hold NaN or infinity", where=f"batch {batch}")
            return output

        return forward

    def forward(self, work: WorkingBlock, inputs: Activations, outputs: Activations) -> None:
        """Run all batches through `work`; `outputs` may be `inputs`."""
        for batch in range(len(self.ids)):
            outputs[batch] = self.lane(work, inputs, batch)()

    def wanted(self) -> set[str]:
        """Return the statistics that this sweep collects."""
        pruner = self.settings.pruner
        wanted = set(pruner.needs) if pruner is not None else set()
        if self.settings.refit or self.settings.error_correction:
            wanted.add("gram")
        if self.settings.error_correction:
            wanted.add("cross")
        return wanted
