"""Many methods, one traversal: the statistics of the dense model's inputs serve every case at once.

A sweep calibrates each linear on what is pruned before it, so its statistics belong to one method and one pattern. Here
every linear is solved on the dense model's own inputs instead, and then N cases need one walk through the model and not
N. The price: what earlier pruning did to the inputs is not seen, and the dense model stays dense all along, so no case
equals a sweep of its own, except those that look at no data at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.core.contracts import Pruner
from secateur.core.faults import hit
from secateur.core.mask import Masks
from secateur.core.pattern import Pattern
from secateur.core.progress import Progress, Silent, step
from secateur.engine.groups import Group, Groups
from secateur.engine.journal import Journal
from secateur.engine.lanes import in_step
from secateur.engine.layer_solver import LayerSolver
from secateur.engine.reports import BlockReport, LayerReport, to_json
from secateur.engine.stream import WorkingBlock, changed_parameters
from secateur.engine.sweep import Sweep
from secateur.engine.traversal import Traversal
from secateur.models.linears import LinearView


@dataclass(frozen=True)
class Case:
    """One way to prune the model.

    Attributes:
        pruner: the method.
        patterns: `{linear name: Pattern}`.
        journal: where its blocks are stored; blocks that are there already are not solved again.
    """

    pruner: Pruner
    patterns: Mapping[str, Pattern]
    journal: Journal


@dataclass(frozen=True)
class _Wanted:
    """Stands where a sweep has its pruner, and asks for the statistics of all cases."""

    needs: frozenset[Any]
    scope: Literal["row", "layer"] = "layer"

    def prune(self, problem: Any) -> Any:
        raise NotImplementedError("each case has a pruner of its own")


def shared_sweep(cases: Sequence[Case], settings: Sweep) -> Sweep:
    """Return the sweep whose one traversal serves all `cases`: what they need together, on dense inputs.

    Args:
        cases: at least one.
        settings: seed, device, offload, batches, refit, guard, frozen zeros and fallback; its pruner and patterns are
            not looked at.
    """
    needs = frozenset(name for case in cases for name in case.pruner.needs)
    patterns = {name: pattern for case in cases for name, pattern in case.patterns.items()}
    return replace(settings, pruner=_Wanted(needs), patterns=patterns, tuner=None, sequential=False)


def solve_together(
    model: nn.Module,
    ids: Tensor,
    keep: Tensor | None,
    cases: Sequence[Case],
    settings: Sweep,
    *,
    failed: Callable[[int, Exception], None],
    progress: Progress | None = None,
) -> None:
    """Solve all `cases` in one traversal of the dense `model`, which stays as it is; results go to their journals.

    Args:
        model: a causal language model.
        ids: int64 `(samples, length)`, calibration tokens.
        keep: bool `(samples, length)`, False on padding; None where all tokens are real.
        cases: what to solve.
        settings: see `shared_sweep`.
        failed: called with the number of a case and its exception; the case is left out from there on. May raise.
        progress: told about every block.

    Raises:
        SecateurError: where the traversal itself cannot go on.
    """
    if not cases:
        return
    show = progress or Silent()
    walk = Traversal(shared_sweep(cases, settings), model, ids, keep, None, None, show)
    looks = [bool(case.pruner.needs) or settings.refit for case in cases]
    alive = dict(enumerate(cases))
    count = len(walk.blocks.names)
    walk.batches.embed(show)
    with torch.no_grad(), step(show, f"solving {len(cases)} rows on shared statistics", count) as number:
        for index in range(count):
            if not alive:
                break
            hit("shared.block")
            waiting = {place: case for place, case in alive.items() if case.journal.finished <= index}
            if not waiting:  # all of them were interrupted later than here
                walk.batches.sparse = walk.batches.forward(walk.work(index), walk.batches.sparse)
                show.advance(number, 1)
                continue
            started = time.perf_counter()
            work = walk.work(index)
            names = {name for case in waiting.values() for name in case.patterns}
            chosen = [linear for linear in work.linears if linear.name in names]
            found: dict[str, Group] = {}

            def look(
                work: WorkingBlock = work, chosen: list[LinearView] = chosen, found: dict[str, Group] = found
            ) -> None:
                found.update(_look(walk, work, chosen))

            walk.mishaps.survive(look)
            spent = time.perf_counter() - started
            for place, case in waiting.items():
                try:
                    _solve_block(walk, index, case, found, spent if looks[place] else 0.0)
                except Exception as error:  # the other cases go on, whatever a method does
                    failed(place, error)
                    del alive[place]
                show.advance(number, 1 / len(waiting))
            walk.release(index)


def _solve_block(walk: Traversal, index: int, case: Case, found: Mapping[str, Group], spent: float) -> None:
    """Solve the linears of one block for one case and store them."""
    started = time.perf_counter()
    own = LayerSolver(replace(walk.settings, patterns=case.patterns, pruner=case.pruner), walk.blocks, walk.dtype)
    work = walk.work(index)
    masks = Masks()
    layers: list[LayerReport] = []
    for linear in work.linears:
        if linear.name in case.patterns:
            line, mask = own.solve(linear, _Seen(found[linear.name], own.wanted()), case.pruner)
            layers.append(line)
            masks[linear.name] = mask
    own.round_(work, masks)
    zeros, size = _count(work.linears)
    weights = changed_parameters(work, walk.blocks.modules[index])
    report = BlockReport(index, tuple(layers), None, spent + time.perf_counter() - started, zeros, size)
    case.journal.add(weights, masks, to_json(report), {})


def _look(walk: Traversal, work: WorkingBlock, chosen: Sequence[LinearView]) -> dict[str, Group]:
    """Run all batches through a block, each once; return the statistics of the `chosen` linears' inputs."""
    batches = walk.batches
    if not chosen:
        batches.sparse = batches.forward(work, batches.sparse)
        return {}
    groups = Groups(walk.solver.wanted(), batches.device, batches.keeps)
    outputs = batches.sparse.like()
    found: dict[str, Group] = {}
    for batch in range(len(batches)):

        def arrive(_: int, linear: LinearView, given: Tensor, batch: int = batch) -> None:
            found[linear.name] = groups.arrive(batch, linear, given, None, forget=False)

        def leave(_: int, output: Tensor, batch: int = batch) -> None:
            outputs[batch] = output

        forward = batches.lane(work, batches.sparse, batch)
        in_step(chosen, [forward], arrive=arrive, decide=lambda linear: None, leave=leave)
    batches.sparse = outputs
    return found


class _Seen(Group):
    """The statistics of a group that one case asked for, so that a method sees no more here than in a sweep of its own."""

    def __init__(self, group: Group, wanted: Collection[str]) -> None:
        self.stats = group.stats
        self.shared = group.shared
        known = {*wanted, "diag"} if "gram" in wanted else set(wanted)
        self._means = {name: value for name, value in group.statistics().items() if name in known}


def _count(linears: Sequence[LinearView]) -> tuple[int, int]:
    """Return zeros and entries of all linears together."""
    zeros = sum(int((linear.read() == 0).sum()) for linear in linears)
    return zeros, sum(linear.read().numel() for linear in linears)
