"""One run of `prune` or `tune`: its sweep planned, journalled, published and reported."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.core.mask import Masks
from secateur.core.versions import versions
from secateur.data.calibration import Calibration
from secateur.engine.budget import divide, divides_model
from secateur.engine.journal import Journal
from secateur.engine.memory import MemoryPlan, peak_memory, plan_memory, with_planning
from secateur.engine.planning import Planning, apply_plan, summary
from secateur.engine.reports import BlockReport, SweepReport
from secateur.engine.stream import compute_dtype
from secateur.engine.sweep import Sweep
from secateur.models.blocks import find_blocks
from secateur.models.files import Loaded, save_model
from secateur.models.linears import find_all_linears, sparsity
from secateur.models.publish import is_complete, publish
from secateur.recipe.job import Job, Result, digest_of, forget, read_side, refuse_existing, state_folder
from secateur.recipe.opening import load
from secateur.recipe.plan_folder import plan_folder


@dataclass
class SweepRun:
    """A sweep over the model of a job, from its memory plan to its report.

    Attributes:
        job: the opened model and the options of the call.
        sweep: what is done; it is replaced by what a planner makes of it.
        data: calibration tokens.
        settings: what the call asked for, as plain data for the report and the identity of the run.
        teacher: the dense model of a tuner; None: the model as it is given.
        planning: how the sparsity is to be divided, if it is.
        planned: what the plan came to, for the report and the published folder.
    """

    job: Job
    sweep: Sweep
    data: Calibration
    settings: dict[str, Any]
    teacher: nn.Module | None = None
    planning: Planning | None = None
    planned: dict[str, Any] | None = None
    plan_cost: dict[str, Any] = field(default_factory=dict)  # its seconds, and whether an earlier run made it

    def run(self) -> Result:
        """Plan, sweep, publish, report."""
        job, options = self.job, self.job.options
        job.warnings += self.data.notes
        job.refuse_warnings()
        memory = self._memory()
        report = self._head(memory)
        memory.refuse_if_short(options["memory_limit"])
        if options["dry_run"]:
            return Result(job.model, {**report, "dry_run": True, "linears": len(self.sweep.patterns)})
        if divides_model(self.sweep.patterns.values()):
            self.sweep = replace(self.sweep, patterns=divide(self.sweep.patterns, self._scores))
        identity = self._identity(report)
        output = None if options["output"] is None else Path(options["output"])
        if output is not None and options["resume"] and (finished := self._finished(output, identity)):
            return Result(finished.model, {**report, **self._as_found(finished, output)})
        if output is None and options.get("state") is None:
            done = self._swept(None, None)
        else:
            done = self._journalled(identity, output)
        report |= {
            "sparsity": done.sparsity,
            "seconds": time.perf_counter() - job.started + done.earlier_seconds,
            "peak_memory_bytes": peak_memory(job.device),
            **({"planned": {**self.planned, **self.plan_cost}} if self.planned is not None else {}),
            "layers": [
                {**asdict(layer), "shape": list(layer.shape), "notes": list(layer.notes)}
                for block in done.blocks
                for layer in block.layers
            ],
            "blocks": [_block_line(block) for block in done.blocks],
            "warnings": job.warnings,
        }
        return Result(job.model, report)

    def _memory(self) -> MemoryPlan:
        """Return what the run will need, planning included."""
        job, data, config = self.job, self.data, self.job.config()
        blocks, dtype = find_blocks(job.model), compute_dtype(job.model, job.device)
        memory = plan_memory(blocks, self.sweep, data.samples, data.length, config.hidden_size, dtype)
        if self.planning is None:
            return memory
        self.planning.budget(self.sweep, job.model).refuse_frozen()
        return with_planning(memory, self.planning.planner, blocks, data.length, config.hidden_size, config.vocab_size)

    def _head(self, memory: MemoryPlan) -> dict[str, Any]:
        """Return what the report says before any work is done."""
        job, data, options = self.job, self.data, self.job.options
        return {
            "stage": job.stage,
            "model": job.spec,
            "output": None if options["output"] is None else str(options["output"]),
            **self.settings,
            "calibration": {
                "source": data.source,
                "samples": data.ids.shape[0],
                "length": data.ids.shape[1],
                "tokens": data.tokens,
                "digest": data.digest,
            },
            "seed": options["seed"],
            "device": str(job.device),
            "dtype": str(next(job.model.parameters()).dtype).removeprefix("torch."),
            "planned_memory_bytes": memory.total,
            "memory_plan": {**memory.host, **memory.device},
            "versions": versions(),
        }

    def _identity(self, report: dict[str, Any]) -> dict[str, Any]:
        """Return all that decides the result."""
        job, options = self.job, self.job.options
        return {
            "stage": job.stage,
            **self.settings,
            "model": job.identity() if options["output"] or options.get("state") else {},
            "teacher": job.teacher_identity,
            "calibration": report["calibration"],
            "seed": options["seed"],
            "dtype": report["dtype"],
            "device": job.device.type,
            "batch_tokens": options["batch_tokens"],
            "versions": report["versions"],
        }

    def _scores(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.sweep.scores(self.job.model, self.data.ids, self.data.keep, progress=self.job.progress)

    def _swept(self, state: Path | None, journal: Journal | None) -> SweepReport:
        """Divide the sparsity if that is asked for, and sweep.

        Raises:
            StateError: with `strict`, if there is anything to warn of.
        """
        job, data, teacher = self.job, self.data, self.teacher
        if self.planning is not None:
            teacher = self._plan(self.planning, state)
            job.refuse_warnings()
        done = self.sweep.run(job.model, data.ids, data.keep, teacher=teacher, journal=journal, progress=job.progress)
        job.warnings += done.warnings
        job.refuse_warnings()
        return done

    def _plan(self, planning: Planning, state: Path | None) -> nn.Module | None:
        """Apply the plan to the sweep and the model; return the teacher that a tuner has then."""
        job, data = self.job, self.data
        kept = state if job.options.get("plans") is None else self._shared_plans(planning)
        again = kept is not None and (kept / Planning.FILES[0]).exists()
        plan = planning.run(self.sweep, job.model, data.ids, data.keep, folder=kept, progress=job.progress)
        self.planned = summary(plan, planning.budget(self.sweep, job.model))
        self.plan_cost = {"seconds": plan.seconds, "again": again}
        job.warnings += plan.notes
        teacher = self.teacher
        if plan.weights and teacher is None and (self.sweep.tuner is not None or self.sweep.error_correction):
            teacher = copy.deepcopy(job.model)  # targets are those of the model as it was given
        self.sweep = apply_plan(plan, self.sweep, job.model)
        return teacher

    def _shared_plans(self, planning: Planning) -> Path:
        """Return the folder of this plan among those that runs share."""
        job, sweep, data = self.job, self.sweep, self.data
        shared = {
            "model": job.identity(),
            "dtype": str(next(job.model.parameters()).dtype),
            "calibration": {"digest": data.digest, "samples": data.samples, "length": data.length},
            "freeze_zeros": sweep.freeze_zeros,
            "seed": sweep.seed,
            "device": job.device.type,
            "batch_tokens": sweep.batch_tokens,
            "versions": versions(),
        }
        return plan_folder(Path(job.options["plans"]), planning.planner, planning.budget(sweep, job.model), shared)

    def _journalled(self, identity: dict[str, Any], output: Path | None) -> SweepReport:
        """Sweep with every finished block safe on disk; publish the model if there is an `output`."""
        job, options = self.job, self.job.options
        state = Path(options["state"]) if output is None else state_folder(output)
        if options["overwrite"] and not options["resume"] and state.exists():
            forget(state)
        journal = Journal(state, identity, resume=options["resume"])
        try:
            done = self._swept(state, journal)
            job.refuse_changed_source()
            if output is not None:
                with publish(output, options["overwrite"]) as folder:
                    job.warnings += save_model(job.model, job.tokenizer, folder, self._side(identity, done))
                    job.refuse_warnings()
        except BaseException:
            journal.close(remove=False)
            raise
        journal.close(remove=True)
        return done

    def _finished(self, output: Path, identity: dict[str, Any]) -> Loaded | None:
        """Return the output if it is what this very run would publish, so that `resume` has nothing left to do.

        Raises:
            StateError: if the output is something else and may not be replaced.
        """
        if not is_complete(output) or (read_side(output) or {}).get("run") != digest_of(identity):
            refuse_existing(output, resume=False, overwrite=self.job.options["overwrite"])
            return None
        if state_folder(output).exists():  # killed between publishing and cleaning up
            forget(state_folder(output))
        return load(output)

    def _as_found(self, finished: Loaded, output: Path) -> dict[str, Any]:
        """Return the part of the report that a finished output still tells: no losses, no times."""
        job, side = self.job, read_side(output) or {}
        layers = [
            {
                "name": linear.name,
                "block": linear.block,
                "shape": [linear.out_features, linear.in_features],
                "sparsity": 1 - int(torch.count_nonzero(linear.read())) / linear.read().numel(),
                "pattern": weight["pattern"],
                "loss_before": None,
                "loss_after": None,
                "seconds": 0.0,
                "notes": [],
            }
            for linear in find_all_linears(finished.model)
            if (weight := side.get("weights", {}).get(linear.name))
        ]
        return {
            **({"planned": side["planned"]} if side.get("planned") is not None else {}),
            "sparsity": sparsity(finished.model),
            "seconds": time.perf_counter() - job.started,
            "peak_memory_bytes": peak_memory(job.device),
            "layers": layers,
            "blocks": [],
            "warnings": [*job.warnings, f"`{output}` was complete already, so nothing was done"],
        }

    def _side(self, identity: dict[str, Any], done: SweepReport) -> dict[str, Any]:
        """Return the content of `secateur.json`: only what decides the result, so that equal runs write equal bytes."""
        job, base = self.job, None
        if job.stage == "tune":
            named = job.options.get("teacher")
            base = job.teacher_identity if isinstance(named, str | Path) else (job.side or {}).get("base_model")
        weights = {
            layer.name: {"pattern": str(self.sweep.patterns[layer.name]), **_mask_line(done.masks, layer.name)}
            for block in done.blocks
            for layer in block.layers
        }
        return {
            "base_model": base or identity["model"],
            "stage": job.stage,
            "run": digest_of(identity),
            "settings": {name: value for name, value in identity.items() if name not in ("model", "versions")},
            "versions": identity["versions"],
            **({"planned": self.planned} if self.planned is not None else {}),
            "weights": weights,
        }


def _mask_line(masks: Masks, name: str) -> dict[str, Any]:
    mask = masks[name]
    return {
        "zeros": int((~mask).sum()),
        "numel": mask.numel(),
        "mask_sha256": hashlib.sha256(mask.numpy().tobytes()).hexdigest(),
    }


def _block_line(block: BlockReport) -> dict[str, Any]:
    tuned = block.tuned
    return {
        "index": block.index,
        "seconds": block.seconds,
        "error_before": None if tuned is None else tuned.before,
        "error_after": None if tuned is None else tuned.after,
        "scale": None if tuned is None else tuned.scale,
        "epochs": None if tuned is None else tuned.epochs,
        "notes": [] if tuned is None else list(tuned.notes),
    }
