"""A plan for a sweep: the task that a planner gets, what it answered, checked, stored and put in place."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.core.allocation import Budget, Prunable
from secateur.core.contracts import Plan, Planner, PlanTask, Statistic
from secateur.core.errors import InputError, NumericError, PatternError, RecipeError, ResourceError, StateError
from secateur.core.faults import hit
from secateur.core.mask import Masks
from secateur.core.pattern import NM, Pattern, Unstructured, parse_pattern
from secateur.core.problem import LayerProblem, Pruned
from secateur.core.progress import Progress, Silent
from secateur.engine.budget import divides_model
from secateur.engine.journal import generator_for
from secateur.engine.sweep import Sweep
from secateur.models.blocks import evaluating
from secateur.models.linears import find_all_linears, match

TOKENS = 2048  # tokens of one batch of a backward pass through the whole model; one sequence at least
FORMAT = 2
REMAKE = "delete its `plan.json`, and the plan is made again"


@dataclass(frozen=True)
class Observer:
    """Stands for a pruner where only the statistics of a linear are wanted."""

    needs: frozenset[str]
    scope: Literal["row", "layer"]

    def prune(self, problem: LayerProblem) -> Pruned:
        """Refuse: nobody asks."""
        raise InputError("an observer prunes nothing")


@dataclass(frozen=True)
class Planning:
    """How a plan for a sweep comes about.

    Attributes:
        planner: what decides.
        names: the linears that are planned; the others keep their patterns.
        pattern: what each of them would get without a plan, and so the budget of all together.
    """

    planner: Planner
    names: frozenset[str]
    pattern: Pattern

    FILES: ClassVar[tuple[str, str]] = ("plan.json", "plan.safetensors")

    def run(
        self,
        sweep: Sweep,
        model: nn.Module,
        ids: Tensor,
        keep: Tensor | None = None,
        *,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> Plan:
        """Return the plan; with `folder` the one that is stored there, or a new one that is then stored.

        The model is left as it was.

        Args:
            sweep: what follows: its pruner's scope, its frozen zeros, its seed and device are the plan's too.
            model: a causal language model.
            ids: int64 `(samples, length)`, calibration tokens.
            keep: bool `(samples, length)`, False on padding.
            folder: where the plan is kept: the state folder of the run, or one that several runs share.
            progress: shown every step.

        Raises:
            PatternError: if the budget cannot be met, or the planner broke it.
            NumericError: if what the plan was made from, or the plan, is not finite.
        """
        budget = self.budget(sweep, model)
        if folder is not None and (stored := load_plan(folder)) is not None:
            check_plan(stored, budget)
            return stored
        show = progress or Silent()
        started = time.perf_counter()
        home = next(model.parameters()).device
        moved = self.planner.backward and home != sweep.device
        try:
            if moved:
                model.to(sweep.device)
            with evaluating(model):
                plan = self.planner.plan(
                    PlanTask(
                        model=model,
                        budget=budget,
                        batches=cut(ids, keep, sweep.batch_tokens),
                        problems=lambda statistics: self._problems(sweep, model, ids, keep, statistics, show),
                        freeze_zeros=sweep.freeze_zeros,
                        generator=generator_for(sweep.seed, 0, "plan"),
                        progress=show,
                    )
                )
        finally:
            if moved:
                model.to(home)
        check_plan(plan, budget)
        plan = replace(plan, seconds=time.perf_counter() - started)
        if folder is not None:
            save_plan(plan, folder)
        return plan

    def budget(self, sweep: Sweep, model: nn.Module) -> Budget:
        """Return the linears that are planned and what they may lose."""
        scope: Literal["row", "layer"] = "layer" if sweep.pruner is None else sweep.pruner.scope
        if isinstance(self.pattern, Unstructured):
            scope = self.pattern.counted_over(scope)
        return Budget(
            tuple(
                Prunable(
                    linear.name,
                    linear.block,
                    linear.out_features,
                    linear.in_features,
                    frozen_zeros(linear.read() == 0, self.pattern, scope) if sweep.freeze_zeros else 0,
                )
                for linear in find_all_linears(model)
                if linear.name in self.names
            ),
            self.pattern,
            scope,
        )

    def _problems(
        self,
        sweep: Sweep,
        model: nn.Module,
        ids: Tensor,
        keep: Tensor | None,
        statistics: Collection[Statistic],
        progress: Progress,
    ) -> Iterator[tuple[str, LayerProblem]]:
        scope: Literal["row", "layer"] = "layer" if sweep.pruner is None else sweep.pruner.scope
        survey = Sweep(
            patterns=dict.fromkeys(sorted(self.names), self.pattern),
            pruner=Observer(frozenset(statistics), scope),
            freeze_zeros=sweep.freeze_zeros,
            seed=sweep.seed,
            device=sweep.device,
            offload=sweep.offload,
            batch_tokens=sweep.batch_tokens,
            ignore=sweep.ignore,
        )
        yield from survey.problems(model, ids, keep, progress=progress)


def planning_of(
    planner: Planner, model: nn.Module, patterns: Mapping[str, Pattern], pattern: Pattern, overrides: Sequence[str]
) -> Planning:
    """Return how `planner` plans the linears that no override names.

    Args:
        planner: what decides.
        model: a causal language model.
        patterns: `{linear name: Pattern}` of all linears that are pruned.
        pattern: the general pattern.
        overrides: name patterns of linears that have a pattern of their own.

    Raises:
        PatternError: if any pattern is a budget over the whole model, which is a plan already.
        RecipeError: if no linear is left to plan.
    """
    if divides_model([pattern, *patterns.values()]):
        raise PatternError(
            "a budget over the whole model and a plan both divide the sparsity among the linears",
            hint="leave out `model` in the pattern, or leave out the plan",
        )
    names = {
        linear.name
        for linear in find_all_linears(model)
        if linear.name in patterns and not match(linear.name, linear.class_name, overrides)
    }
    if not names:
        raise RecipeError("no linear is left to plan", hint="`overrides` and `ignore` name all of them")
    return Planning(planner, frozenset(names), pattern)


def apply_plan(plan: Plan, sweep: Sweep, model: nn.Module) -> Sweep:
    """Return `sweep` with the plan's patterns and masks; the plan's weights are written into `model`."""
    if plan.weights:
        for linear in find_all_linears(model):
            if linear.name in plan.weights:
                linear.write(plan.weights[linear.name])
    return replace(sweep, patterns={**sweep.patterns, **plan.patterns}, masks=plan.masks)


def check_plan(plan: Plan, budget: Budget) -> None:
    """Raise unless the plan fits the linears, spends no more than the budget, and is finite.

    Raises:
        PatternError: naming the linear, or the totals.
        NumericError: if a weight is NaN or infinite.
    """
    spent = 0
    for linear in budget.linears:
        pattern = plan.patterns.get(linear.name)
        if pattern is None:
            raise PatternError(f"the plan has no pattern for `{linear.name}`")
        pattern.fit(linear.rows, linear.columns, linear.name)
        spent += budget.zeros_of(linear, pattern)
        if plan.masks is not None:
            if linear.name not in plan.masks:
                raise PatternError(f"the plan has masks, and none for `{linear.name}`")
            mask = plan.masks[linear.name]
            if tuple(mask.shape) != (linear.rows, linear.columns):
                raise PatternError(f"the plan's mask of `{linear.name}` has shape {tuple(mask.shape)}")
            pattern.check(mask, budget.scope)
        weight = plan.weights.get(linear.name)
        if weight is not None and not bool(torch.isfinite(weight).all()):
            raise NumericError(f"the plan's weight of `{linear.name}` holds NaN or infinity")
    strange = {*plan.patterns, *(plan.masks or ()), *plan.weights} - {linear.name for linear in budget.linears}
    if strange:
        raise PatternError(f"the plan names `{min(strange)}`, which is not planned")
    if spent > budget.total:
        raise PatternError(f"the plan prunes {spent} weights, the budget is {budget.total}")


def summary(plan: Plan, budget: Budget) -> dict[str, Any]:
    """Return the plan as plain JSON values, for reports."""
    spent = sum(budget.zeros_of(linear, plan.patterns[linear.name]) for linear in budget.linears)
    return {
        "budget": budget.total,
        "pruned": spent,
        "size": budget.size,
        "masks": plan.masks is not None,
        "weights": bool(plan.weights),
        "linears": {linear.name: str(plan.patterns[linear.name]) for linear in budget.linears},
        "scores": plan.scores,
        "notes": list(plan.notes),
    }


def frozen_zeros(zeros: Tensor, pattern: Pattern, scope: Literal["row", "layer"]) -> int:
    """Return the fewest zeros of a pattern like `pattern` that can hold all `zeros`, bool `(rows, columns)`."""
    if isinstance(pattern, NM):
        return int(zeros.reshape(-1, pattern.m).sum(1).max()) * (zeros.numel() // pattern.m)
    if scope == "row":
        return int(zeros.sum(1).max()) * zeros.shape[0]
    return int(zeros.sum())


def cut(ids: Tensor, keep: Tensor | None, tokens: int) -> list[tuple[Tensor, Tensor | None]]:
    """Return the calibration tokens in batches that a backward pass through the whole model can take."""
    sequences = max(1, min(tokens, TOKENS) // ids.shape[1])
    batches = list(torch.split(ids, sequences))
    if keep is None or bool(keep.all()):
        return [(batch, None) for batch in batches]
    return list(zip(batches, torch.split(keep, sequences), strict=True))


def save_plan(plan: Plan, folder: Path) -> None:
    """Store `plan` in `folder`: masks and weights first, then the line that says they are whole."""
    words, tensors = (folder / name for name in Planning.FILES)
    masks = plan.masks or Masks()
    stored = {f"mask.{name}": packed for name, packed in masks.packed().items()}
    stored |= {f"weight.{name}": weight.detach().cpu().contiguous() for name, weight in plan.weights.items()}
    content = {
        "format": FORMAT,
        "patterns": {name: _pattern_words(pattern) for name, pattern in plan.patterns.items()},
        "masks": plan.masks is not None,
        "scores": plan.scores,
        "notes": list(plan.notes),
        "seconds": plan.seconds,
    }
    try:
        hit("plan.write")
        if stored:
            save_file(stored, _temporary(tensors), metadata={"widths": json.dumps(masks.widths())})
            with _temporary(tensors).open("rb+") as file:
                os.fsync(file.fileno())
            _temporary(tensors).rename(tensors)
        else:
            tensors.unlink(missing_ok=True)  # of a plan that was deleted
        with _temporary(words).open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        hit("plan.rename")
        _temporary(words).rename(words)
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"the plan could not be written to `{folder}`: {error}", hint="free disk space") from error


def load_plan(folder: Path) -> Plan | None:
    """Return the plan that `save_plan` stored in `folder`, or None if there is none.

    Raises:
        StateError: if what is there cannot be read.
    """
    words, tensors = (folder / name for name in Planning.FILES)
    try:
        content = json.loads(words.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged(words) from error
    masks: Masks | None = None
    weights: dict[str, Tensor] = {}
    try:
        if content["format"] != FORMAT:
            raise StateError(
                f"the stored plan `{words}` is of format {content['format']}, this version reads {FORMAT}",
                hint=REMAKE,
            )
        patterns = {name: _pattern_from(stored) for name, stored in content["patterns"].items()}
        if tensors.exists():
            packed: dict[str, Tensor] = {}
            with safe_open(tensors, "pt") as file:
                widths = json.loads(file.metadata()["widths"])
                for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    kind, _, name = key.partition(".")
                    (packed if kind == "mask" else weights)[name] = file.get_tensor(key)
            masks = Masks.from_packed(packed, widths) if content["masks"] else None
        elif content["masks"]:
            raise _damaged(tensors)
        return Plan(
            patterns,
            masks,
            weights,
            scores=content["scores"],
            notes=tuple(content["notes"]),
            seconds=float(content["seconds"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError, OSError, PatternError, SafetensorError) as error:
        raise _damaged(words) from error


def _pattern_words(pattern: Pattern) -> list[Any]:
    """Return a pattern as JSON that loses no digit."""
    return [str(pattern)] if isinstance(pattern, NM) else [pattern.sparsity, pattern.scope]


def _pattern_from(stored: Sequence[Any]) -> Pattern:
    return parse_pattern(stored[0]) if len(stored) == 1 else Unstructured(stored[0], stored[1])


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _damaged(path: Path) -> StateError:
    return StateError(f"the stored plan `{path}` is damaged", hint=REMAKE)
