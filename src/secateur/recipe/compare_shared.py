"""Rows of a comparison that share their statistics: solved together in one traversal of the dense model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.core.errors import RecipeError, StateError
from secateur.core.pattern import parse_pattern
from secateur.engine.budget import assign, divide, divides_model
from secateur.engine.journal import Journal
from secateur.engine.memory import forget_peak, peak_memory, plan_memory
from secateur.engine.planning import planning_of
from secateur.engine.shared import Case, shared_sweep, solve_together
from secateur.engine.stream import compute_dtype, write_back_
from secateur.engine.sweep import Sweep
from secateur.models.blocks import find_blocks
from secateur.models.files import save_model
from secateur.models.publish import publish
from secateur.recipe import stages
from secateur.recipe.compare_folder import CompareFolder
from secateur.recipe.comparison import Row
from secateur.recipe.plan_folder import plan_folder

if TYPE_CHECKING:
    from secateur.recipe.compare import Comparing


class Solved:
    """Rows that are solved together on the dense model's statistics, each kept block by block until it is measured."""

    def __init__(self, run: Comparing, folder: CompareFolder, journals: ExitStack) -> None:
        self.run = run
        self.folder = folder
        self.journals = journals
        self.cases: dict[str, Case] = {}
        self.failed: dict[str, Exception] = {}
        self.planning: dict[str, float] = {}  # seconds of the plan
        self.peak: int | None = None

    def key(self, row: Row) -> str:
        """Return what rows have in common that differ by their tuner alone."""
        return self.folder.key(self.settings(row))

    def settings(self, row: Row) -> dict[str, Any]:
        """Return what decides the solution of a row, its tuner left out, as plain data."""
        return {"solved": {**row.settings(), "tuner": None}}

    def solve(self, wanted: Sequence[Row]) -> None:
        """Solve what the rows need in one traversal."""
        run = self.run
        given = run.given
        if not wanted:
            return
        forget_peak(run.device)
        model = run.dense()
        data = run.data
        ids = torch.zeros(1, 2, dtype=torch.int64) if data is None else data.ids
        keep = None if data is None else data.keep
        sweep = Sweep(
            patterns={},
            refit=given["refit"],
            guard=given["guard"],
            freeze_zeros=given["freeze_zeros"],
            seed=given["seed"],
            device=run.device,
            offload=given["offload"],
            batch_tokens=given["batch_tokens"],
            ignore=tuple(given["ignore"]),
            fallback="error" if given["strict"] else given["fallback"],
        )
        for row in {self.key(row): row for row in wanted}.values():
            try:
                self.cases[self.key(row)] = self.case(row, model, ids, keep, sweep)
            except StateError:
                raise
            except Exception as error:  # becomes the row's own
                self.fail(self.key(row), error)
        blocks = find_blocks(model)
        names = [key for key, case in self.cases.items() if case.journal.finished < len(blocks.names)]
        cases = [self.cases[key] for key in names]
        if cases:
            walk = shared_sweep(cases, sweep)
            width = model.config.get_text_config().hidden_size  # type: ignore[union-attr,operator]
            plan = plan_memory(blocks, walk, ids.shape[0], ids.shape[1], width, compute_dtype(model, run.device))
            plan.refuse_if_short(given["memory_limit"])
        solve_together(
            model,
            ids,
            keep,
            cases,
            sweep,
            failed=lambda place, error: self.fail(names[place], error),
            progress=run.show,
        )
        self.peak = peak_memory(run.device)

    def case(self, row: Row, model: nn.Module, ids: Tensor, keep: Tensor | None, sweep: Sweep) -> Case:
        """Return how one row is to be solved: every linear's pattern, and where its blocks go."""
        given = self.run.given
        patterns = assign(model, str(row.pattern), given["overrides"], given["ignore"])
        if divides_model(patterns.values()):
            scoring = Sweep(**{**vars(sweep), "patterns": patterns, "pruner": row.method, "sequential": False})
            patterns = divide(patterns, lambda: scoring.scores(model, ids, keep, progress=self.run.show))
        journal = Journal(self.folder.state(self.settings(row)), {"row": self.settings(row)}, resume=True)
        self.journals.callback(journal.close, remove=False)
        if row.plan is not None:
            general = parse_pattern(str(row.pattern))
            planning = planning_of(row.plan, model, patterns, general, list(given["overrides"] or ()))
            planned = Sweep(**{**vars(sweep), "patterns": patterns, "pruner": row.method})
            budget = planning.budget(planned, model)
            kept = plan_folder(self.folder.plans, row.plan, budget, {"common": self.folder.common})
            plan = planning.run(planned, model, ids, keep, folder=kept, progress=self.run.show)
            self.planning[self.key(row)] = plan.seconds
            if plan.masks is not None or plan.weights:
                raise RecipeError(
                    "a plan that chooses masks or weights cannot share its statistics with other rows",
                    hint="use --statistics own",
                )
            patterns = {**patterns, **plan.patterns}
        return Case(row.method, patterns, journal)

    def fail(self, key: str, error: Exception) -> None:
        """Remember why a row cannot be."""
        if self.run.given["strict"]:
            raise error
        self.failed[key] = error.with_traceback(None)  # whose frames hold matrices
        self.cases.pop(key, None)

    def model_of(self, row: Row, record: dict[str, Any]) -> nn.Module:
        """Return the model of a row, tuned if the row says so, and note what making it took."""
        key = self.key(row)
        if key in self.failed:
            raise self.failed[key]
        journal = self.cases[key].journal
        model = self.run.dense()
        if model is self.run.live:
            model = copy.deepcopy(model)
        blocks = find_blocks(model)
        losses: list[float] = []
        notes: list[str] = []
        seconds = self.planning.get(key, 0.0)
        for index in range(journal.finished):
            block = journal.read(index)
            write_back_(blocks.modules[index], block.weights, assign=True)
            lines = block.report["layers"]
            losses += [line["loss_after"] for line in lines]
            notes += [f"`{line['name']}` is {note}" for line in lines for note in line["notes"] if "degraded" in note]
            seconds += block.report["seconds"]
        record |= {
            "seconds": seconds,
            "peak_memory_bytes": self.peak,
            "layer_loss": sum(losses) / len(losses) if losses else None,
            "warnings": [*journal.warnings, *notes],
        }
        given = self.run.given
        if row.tuner is not None:
            names = "ignore seed device offload batch_tokens memory_limit strict progress"
            result = stages.tune(
                model,
                self.run.tokenizer,
                method=row.tuner,
                teacher=self.run.live if self.run.live is not None else given["model"],
                calibration=self.run.data,
                state=self.folder.state(row.settings()),
                resume=True,
                inplace=True,
                **{name: given[name] for name in names.split()},
                **self.run.loading(),
            )
            model = result.model
            record["seconds"] += result.report["seconds"]
            record["peak_memory_bytes"] = max(self.peak or 0, result.report["peak_memory_bytes"])
            record["warnings"] += result.report["warnings"]
        if given["keep_models"]:
            target = self.folder.model(row)
            side = {"stage": "compare", "base_model": self.run.common["model"], "settings": record["settings"]}
            with publish(target, True) as folder:
                record["warnings"] += save_model(model, self.run.tokenizer, folder, side)
            record["model"] = str(target)
        return model
