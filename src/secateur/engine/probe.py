"""What pruning costs on this machine, measured on one block with a few tokens, to be extrapolated to all of them.

Everything a sweep does to a block is either per token (the forward, the statistics, a tuning epoch) or per block (the
solvers). One block of the middle is measured; blocks are alike in nearly all models, and where they are not the
largest one is taken. A planner looks at the whole model, so it is measured on a model of one block and on one of a few:
what the others add is what every block costs, and the rest is what embeddings and head cost. Costs that are told from a
difference of two times are measured twice, and the lesser time counts, because other programs run too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from secateur.core.contracts import BlockTuner, Planner, Pruner
from secateur.core.errors import SecateurError
from secateur.core.mask import Masks
from secateur.core.pattern import Pattern
from secateur.core.problem import LayerProblem
from secateur.core.progress import Progress, Silent, step
from secateur.core.solve import solve
from secateur.engine.calibrate import at_once
from secateur.engine.groups import Group
from secateur.engine.planning import Planning
from secateur.engine.stream import WorkingBlock
from secateur.engine.sweep import Sweep
from secateur.engine.traversal import Traversal
from secateur.models.blocks import Blocks, find_blocks, shortened
from secateur.models.linears import LinearView

FEW = 3  # blocks of the model that a planner is measured on


@dataclass(frozen=True)
class PlanCost:
    """Measured seconds of a planner.

    Attributes:
        outside: of a token in what lies outside of the blocks.
        token: of a token in one block.
        block: of one block, however many tokens there are.
    """

    outside: float
    token: float
    block: float


@dataclass
class Costs:
    """Measured seconds.

    Attributes:
        blocks: how many blocks the model has.
        parameters: of all blocks together.
        forward: seconds of a token in the forward of one block.
        statistics: `{what is collected: seconds of a token in one block}`, beyond the forward.
        solvers: `{method: seconds of one block}`; the methods that were measured.
        tuners: `{tuner: seconds of a token and an epoch in one block}`.
        planners: `{planner: its seconds}`.
        failed: `{method, tuner or planner: why it could not be measured}`.
        tokens: how many tokens it was measured with.
        seconds: what measuring took.
    """

    blocks: int
    parameters: int
    forward: float = 0.0
    statistics: dict[str, float] = field(default_factory=dict)
    solvers: dict[str, float] = field(default_factory=dict)
    tuners: dict[str, float] = field(default_factory=dict)
    planners: dict[str, PlanCost] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    def planning(self, name: str, tokens: int) -> float:
        """Return the seconds that planner `name` takes for the whole model with so many tokens."""
        cost = self.planners[name]
        return tokens * (cost.outside + self.blocks * cost.token) + self.blocks * cost.block


def probe(
    model: nn.Module,
    ids: Tensor,
    patterns: Mapping[str, Pattern],
    solvers: Mapping[str, tuple[Pruner, bool]],
    tuners: Mapping[str, BlockTuner],
    planners: Mapping[str, tuple[Planner, Pruner]] | None = None,
    *,
    device: torch.device,
    most_seconds: float,
    progress: Progress | None = None,
) -> Costs:
    """Measure one block; the model is left as it is.

    Args:
        model: a causal language model.
        ids: int64 `(samples, length)`, what to measure with; a few hundred to a few thousand tokens.
        patterns: `{linear name: Pattern}`.
        solvers: `{name: (pruner, refit)}`, cheapest first: when `most_seconds` are over, the rest is not measured.
        tuners: `{name: tuner}`, set to a single epoch.
        planners: `{name: (planner, the pruner that follows)}`; measured last.
        device: where blocks are computed.
        most_seconds: begin no further measurement after this time.
        progress: told about every measurement.
    """
    show = progress or Silent()
    started = time.perf_counter()
    blocks = find_blocks(model)
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in blocks.modules]
    middle = len(sizes) // 2
    index = middle if sizes[middle] == max(sizes) else sizes.index(max(sizes))
    costs = Costs(len(sizes), sum(sizes), tokens=ids.numel())
    walk = Traversal(Sweep(patterns=patterns, device=device), model, ids, None, None, None, Silent())
    planners = planners or {}
    with torch.no_grad(), step(show, "measuring one block", 2 + len(solvers) + len(tuners) + len(planners)) as number:
        walk.batches.embed(Silent())
        work = walk.work(index)
        chosen = [linear for linear in work.linears if linear.name in patterns]
        walk.batches.forward(work, walk.batches.sparse)  # the first one pays for what is set up once
        costs.forward = _least(lambda: walk.batches.forward(work, walk.batches.sparse), device) / ids.numel()
        show.advance(number, 1)
        groups = _statistics(costs, walk, work, chosen, ids.numel(), device)
        show.advance(number, 1)
        for name, tuner in tuners.items():
            if time.perf_counter() - started > most_seconds:
                costs.failed[name] = "there was no time left to measure it"
            else:
                costs.tuners[name] = _tuning(walk, index, tuner, patterns) / ids.numel()
            show.advance(number, 1)
        for name, (pruner, refit) in solvers.items():
            if time.perf_counter() - started > most_seconds:
                costs.failed[name] = "there was no time left to measure it"
            else:
                try:
                    costs.solvers[name] = _solving(walk, chosen, groups, pruner, refit, device)
                except SecateurError as error:
                    costs.failed[name] = str(error)
            show.advance(number, 1)
        for name, (planner, pruner) in planners.items():
            if time.perf_counter() - started > most_seconds:
                costs.failed[name] = "there was no time left to measure it"
            else:
                try:
                    costs.planners[name] = _planning(model, blocks, ids, planner, pruner, patterns, device)
                except SecateurError as error:
                    costs.failed[name] = str(error)
            show.advance(number, 1)
    costs.seconds = time.perf_counter() - started
    return costs


def _statistics(
    costs: Costs, walk: Traversal, work: WorkingBlock, chosen: Sequence[LinearView], tokens: int, device: torch.device
) -> dict[str, Group]:
    """Measure what each kind of statistic costs; return all of them for every linear."""
    found: dict[str, Group] = {}

    def look(wanted: Sequence[str]) -> None:
        found.update((linear.name, group) for linear, group in at_once(walk.batches, work, chosen, wanted))

    for kind, wanted in (("diag", ("diag", "mean")), ("gram", ("gram", "diag", "mean"))):
        spent = _least(partial(look, wanted), device) / tokens
        costs.statistics[kind] = max(spent - costs.forward, 0.0)
    return found


def _solving(
    walk: Traversal,
    chosen: Sequence[LinearView],
    groups: Mapping[str, Group],
    pruner: Pruner,
    refit: bool,
    device: torch.device,
) -> float:
    """Return the seconds that a method needs for one block: linears of one shape are measured once."""
    measured: dict[tuple[object, ...], float] = {}
    total = 0.0
    for linear in chosen:
        pattern = walk.settings.patterns[linear.name]
        shape = (linear.out_features, linear.in_features, str(pattern))
        if shape not in measured:
            statistics = groups[linear.name].statistics()
            weight = linear.read().to(device, torch.float32)
            problem = LayerProblem(
                weight, pattern, gram=statistics["gram"], diag=statistics["diag"], mean=statistics["mean"]
            )

            def run(problem: LayerProblem = problem, linear: LinearView = linear) -> None:
                solve(pruner, problem, refit=refit, name=linear.name)

            measured[shape] = _seconds(run, device)
        total += measured[shape]
    return total


def _tuning(walk: Traversal, index: int, tuner: BlockTuner, patterns: Mapping[str, Pattern]) -> float:
    """Return the seconds of one epoch over the probe's tokens, on a block pruned by magnitude."""
    work = walk.work(index)
    targets = walk.batches.forward(work, walk.batches.sparse)
    masks = Masks()
    with torch.no_grad():
        for linear in work.linears:
            if linear.name in patterns:
                weight = linear.read()
                masks[linear.name] = patterns[linear.name].mask(weight.float().abs(), "layer")
                linear.write(weight * masks[linear.name])
    return walk.tune(tuner, work, masks, targets, lambda fraction: None).seconds


def _planning(
    model: nn.Module,
    blocks: Blocks,
    ids: Tensor,
    planner: Planner,
    pruner: Pruner,
    patterns: Mapping[str, Pattern],
    device: torch.device,
) -> PlanCost:
    """Return what `planner` costs, from the first one and the first few blocks of the model."""

    def seconds(count: int, tokens: Tensor) -> float:
        homes = tuple(f"{name}." for name in blocks.names[:count])
        inside = {name: pattern for name, pattern in patterns.items() if name.startswith(homes)}
        sweep = Sweep(patterns=inside, pruner=pruner, device=device)
        planning = Planning(planner, frozenset(inside), next(iter(inside.values())))
        with shortened(model, blocks, count), torch.enable_grad():
            return _least(lambda: planning.run(sweep, model, tokens), device)

    half = ids[:, : ids.shape[1] // 2]
    some, one = seconds(1, half), seconds(1, ids)
    token = max(one - some, 0.0) / (ids.numel() - half.numel())
    block = max(one - token * ids.numel(), 0.0)
    outside = 0.0
    few = min(FEW, len(blocks))
    if few > 1:
        added = max(seconds(few, ids) - one, 0.0) / (few - 1)
        block = min(block, added)
        outside, token = token, (added - block) / ids.numel()
        outside = max(outside - token, 0.0)
    # the first blocks may be smaller than the rest
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in blocks.modules]
    scale = (sum(sizes) / len(sizes)) / (sum(sizes[:few]) / few)
    return PlanCost(outside, token * scale, block * scale)


def _least(work: Callable[[], object], device: torch.device) -> float:
    """Return the lesser wall time of calling `work` twice."""
    return min(_seconds(work, device), _seconds(work, device))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of calling `work` once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
