"""One call of a stage: its model opened and identified, the sweep run, the result published and reported."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.core.errors import InputError, RecipeError, ResourceError, StateError
from secateur.core.mask import Masks
from secateur.core.progress import Progress, Silent
from secateur.core.versions import versions
from secateur.data.calibration import Calibration, from_ids, from_texts, sample
from secateur.data.text import load_text
from secateur.engine.budget import divide, divides_model
from secateur.engine.journal import Journal
from secateur.engine.memory import peak_memory, plan_memory, with_planning
from secateur.engine.planning import Planning, apply_plan, summary
from secateur.engine.reports import BlockReport, SweepReport
from secateur.engine.stream import compute_dtype
from secateur.engine.sweep import Sweep
from secateur.models.blocks import find_blocks
from secateur.models.files import Loaded, Source, fingerprint, save_model
from secateur.models.linears import find_all_linears, sparsity
from secateur.models.publish import is_complete, publish
from secateur.recipe.build import describe
from secateur.recipe.opening import device_of, load


class Result(NamedTuple):
    """What `prune` and `tune` return.

    Attributes:
        model: the model, eval mode.
        report: plain JSON values: sparsity, seconds, peak memory, layers, blocks, warnings.
    """

    model: nn.Module
    report: dict[str, Any]


class Job:
    """The model of one call: opened, identified, and published at the end."""

    def __init__(self, stage: str, model: Any, tokenizer: Any, teacher: Any, options: Mapping[str, Any]) -> None:
        self.started = time.perf_counter()
        self.stage = stage
        self.options = options
        self.progress: Progress = options.get("progress") or Silent()
        self.device = device_of(options.get("device"))
        self.warnings: list[str] = []
        minutes = options.get("max_minutes")
        if minutes is not None and options.get("output") is None and options.get("state") is None:
            raise RecipeError("`max_minutes` needs an `output`, where the unfinished run can wait")
        if minutes is not None and not minutes >= 0:
            raise RecipeError(f"`max_minutes` is {minutes}, but must be a number of 0 or more")
        if options.get("output") is not None and options.get("state") is not None:
            raise RecipeError("`state` is for runs without an `output`, beside which the state lies otherwise")
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.side: dict[str, Any] | None = None
        self.planned: dict[str, Any] | None = None
        self.planning: dict[str, Any] = {}  # what the plan took, and whether an earlier run made it
        if isinstance(model, nn.Module):
            self.source: Source | None = None
            self.spec = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
            self.model = model if options.get("inplace") else copy.deepcopy(model)
            self.tokenizer = tokenizer
        else:
            loaded = self._load(model)
            self.source, self.model, self.spec = loaded.source, loaded.model, str(model)
            self.tokenizer = tokenizer if tokenizer is not None else loaded.tokenizer
            self.side = read_side(loaded.source.path) if loaded.source.path is not None else None
            self.warnings += loaded.source.notes
            if loaded.source.kind == "adapter" and stage != "evaluate":
                raise InputError(
                    f"`{model}` is an adapter beside its base model, which `{stage}` does not take",
                    hint=f"merge it first: secateur merge {model} --output DIR",
                )
        self.model.eval()
        self.teacher = self._teacher(teacher) if stage == "tune" else None

    def _load(self, spec: Any) -> Loaded:
        loading = ("dtype", "allow_pickle", "trust_remote_code", "revision")
        known = {name: self.options[name] for name in loading if name in self.options}
        return load(spec, progress=self.progress, **known)

    def _teacher(self, teacher: Any) -> nn.Module:
        if isinstance(teacher, nn.Module):
            return teacher.eval()
        if teacher is None:
            base = (self.side or {}).get("base_model", {}).get("spec")
            if not base:
                raise InputError(
                    "the dense model that this one was pruned from is not known", hint="name it with --teacher MODEL"
                )
            teacher = base
        dense: nn.Module = self._load(teacher).model
        return dense

    def identity(self) -> dict[str, Any]:
        """Return what tells this model from any other."""
        if self.source is not None:
            return {"spec": self.spec, "fingerprint": self.source.fingerprint}
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return {"spec": self.spec, "fingerprint": digest.hexdigest()}

    def config(self) -> Any:
        """Return the configuration of the model's text part."""
        config: Any = self.model.config
        return config.get_text_config()

    def need_tokenizer(self, purpose: str) -> Any:
        """Return the tokenizer, or say that `purpose` needs one."""
        if self.tokenizer is None:
            raise InputError(
                f"a tokenizer is needed to {purpose}", hint="pass `tokenizer`, or token ids instead of a text"
            )
        return self.tokenizer

    def calibration(self, *, needed: bool) -> Calibration:
        """Return the calibration tokens; two tokens where none are needed, whatever was given."""
        options = self.options
        given = options.get("calibration")
        config = self.config()
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        vocabulary = embeddings.num_embeddings
        limit = getattr(config, "max_position_embeddings", None)
        if given is None or not needed:
            if needed:
                raise RecipeError(
                    "`calibration` is missing: this method looks at data", hint="for example --calibration wikitext2"
                )
            if given is not None:
                self.warnings.append("no calibration text was read, because this method looks at weights alone")
            return from_ids(torch.zeros(1, 2, dtype=torch.int64), vocabulary=vocabulary)
        if isinstance(given, Calibration):
            return given
        if isinstance(given, Tensor):
            return from_ids(given, vocabulary=vocabulary, max_positions=limit)
        choice = {
            "samples": options["samples"],
            "length": options["length"],
            "seed": options["seed"],
            "vocabulary": vocabulary,
            "max_positions": limit,
        }
        words = self.need_tokenizer("calibrate on text")
        if isinstance(given, str | Path):
            text = load_text(str(given), field=options["field"], skip_bad=options["skip_bad"])
            return sample(text, words, **choice)
        return from_texts(list(given), words, **choice)

    def run(
        self,
        sweep: Sweep,
        data: Calibration,
        settings: dict[str, Any],
        teacher: nn.Module | None,
        planning: Planning | None = None,
    ) -> Result:
        """Plan, sweep, publish, report."""
        options = self.options
        blocks = find_blocks(self.model)
        dtype = compute_dtype(self.model, self.device)
        plan = plan_memory(blocks, sweep, data.samples, data.length, self.config().hidden_size, dtype)
        if planning is not None:
            planning.budget(sweep, self.model).refuse_frozen()
            width, words = self.config().hidden_size, self.config().vocab_size
            plan = with_planning(plan, planning.planner, blocks, data.length, width, words)
        report: dict[str, Any] = {
            "stage": self.stage,
            "model": self.spec,
            "output": None if options["output"] is None else str(options["output"]),
            **settings,
            "calibration": {
                "source": data.source,
                "samples": data.ids.shape[0],
                "length": data.ids.shape[1],
                "tokens": data.tokens,
                "digest": data.digest,
            },
            "seed": options["seed"],
            "device": str(self.device),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "planned_memory_bytes": plan.total,
            "memory_plan": {**plan.host, **plan.device},
            "versions": versions(),
        }
        plan.refuse_if_short(options["memory_limit"])
        if options["dry_run"]:
            return Result(self.model, {**report, "dry_run": True, "linears": len(sweep.patterns)})
        if divides_model(sweep.patterns.values()):
            shares = divide(
                sweep.patterns, lambda: sweep.scores(self.model, data.ids, data.keep, progress=self.progress)
            )
            sweep = replace(sweep, patterns=shares)
        identity = {
            "stage": self.stage,
            **settings,
            "model": self.identity() if options["output"] or options.get("state") else {},
            "teacher": None if teacher is None else str(options.get("teacher")),
            "calibration": report["calibration"],
            "seed": options["seed"],
            "dtype": report["dtype"],
            "device": self.device.type,
            "batch_tokens": options["batch_tokens"],
            "versions": report["versions"],
        }
        output = None if options["output"] is None else Path(options["output"])
        if output is not None and options["resume"] and (finished := self._finished(output, identity)):
            return Result(finished.model, {**report, **self._as_found(finished, output)})
        if output is None and options.get("state") is None:
            sweep, teacher = self._planned(planning, sweep, data, teacher, None)
            done = sweep.run(self.model, data.ids, data.keep, teacher=teacher, progress=self.progress)
        else:
            done = self._run_with_journal(planning, sweep, data, identity, teacher, output)
        self.warnings += [*data.notes, *done.warnings]
        layers = [
            {**asdict(layer), "shape": list(layer.shape), "notes": list(layer.notes)}
            for block in done.blocks
            for layer in block.layers
        ]
        report |= {
            "sparsity": done.sparsity,
            "seconds": time.perf_counter() - self.started,
            "peak_memory_bytes": peak_memory(self.device),
            **({"planned": {**self.planned, **self.planning}} if self.planned is not None else {}),
            "layers": layers,
            "blocks": [_block_line(block) for block in done.blocks],
            "warnings": self.warnings,
        }
        return Result(self.model, report)

    def _planned(
        self, planning: Planning | None, sweep: Sweep, data: Calibration, teacher: nn.Module | None, folder: Path | None
    ) -> tuple[Sweep, nn.Module | None]:
        """Return the sweep as it was planned, and the teacher of its tuner where the plan changes the model's weights."""
        if planning is None:
            return sweep, teacher
        kept = folder if self.options.get("plans") is None else self._shared_plan(planning, sweep, data)
        again = kept is not None and (kept / Planning.FILES[0]).exists()
        plan = planning.run(sweep, self.model, data.ids, data.keep, folder=kept, progress=self.progress)
        self.planned = summary(plan, planning.budget(sweep, self.model))
        self.planning = {"seconds": plan.seconds, "again": again}
        self.warnings += plan.notes
        if plan.weights and teacher is None and (sweep.tuner is not None or sweep.error_correction):
            teacher = copy.deepcopy(self.model)  # targets are those of the model as it was given
        return apply_plan(plan, sweep, self.model), teacher

    def _shared_plan(self, planning: Planning, sweep: Sweep, data: Calibration) -> Path:
        """Return the folder of this plan among those that runs share, named by all that decides it."""
        budget = planning.budget(sweep, self.model)
        decides = {
            "model": self.identity(),
            "dtype": str(next(self.model.parameters()).dtype),
            "calibration": {"digest": data.digest, "samples": data.samples, "length": data.length},
            "planner": describe(planning.planner),
            "pattern": str(budget.pattern),
            "scope": budget.scope,
            "linears": [asdict(linear) for linear in budget.linears],
            "freeze_zeros": sweep.freeze_zeros,
            "seed": sweep.seed,
            "device": self.device.type,
            "batch_tokens": sweep.batch_tokens,
            "versions": versions(),
        }
        name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:24]
        folder = Path(self.options["plans"]) / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"the folder `{folder}` cannot be made: {error.strerror}") from error
        return folder

    def _run_with_journal(
        self,
        planning: Planning | None,
        sweep: Sweep,
        data: Calibration,
        identity: dict[str, Any],
        teacher: nn.Module | None,
        output: Path | None,
    ) -> SweepReport:
        """Sweep with every finished block safe on disk; publish the model if there is an `output`."""
        options = self.options
        state = Path(options["state"]) if output is None else state_folder(output)
        if options["overwrite"] and not options["resume"] and state.exists():
            forget(state)
        journal = Journal(state, identity, resume=options["resume"])
        try:
            sweep, teacher = self._planned(planning, sweep, data, teacher, state)
            done = sweep.run(self.model, data.ids, data.keep, teacher=teacher, journal=journal, progress=self.progress)
            if options["strict"] and done.warnings:
                raise StateError(
                    f"not everything was done as asked: {done.warnings[0]}", hint="leave out --strict to accept it"
                )
            self.refuse_changed_source()
            if output is not None:
                with publish(output, options["overwrite"]) as folder:
                    self.warnings += save_model(self.model, self.tokenizer, folder, self._side(identity, done, sweep))
        except BaseException:
            journal.close(remove=False)
            raise
        journal.close(remove=True)
        return done

    def refuse_changed_source(self) -> None:
        """Raise StateError if the files of the model changed while it was worked on."""
        source = self.source
        if source is None or source.path is None or source.kind != "folder":
            return
        if fingerprint(source.path) != source.fingerprint:
            raise StateError(
                f"the files of `{self.spec}` changed during the run, so the result would be a mixture",
                hint="run again on files that nobody writes to",
            )

    def _finished(self, output: Path, identity: dict[str, Any]) -> Loaded | None:
        """Return the output if it is what this very run would publish, so that `resume` has nothing left to do.

        Raises:
            StateError: if the output is something else and may not be replaced.
        """
        if not is_complete(output) or (read_side(output) or {}).get("run") != digest_of(identity):
            refuse_existing(output, resume=False, overwrite=self.options["overwrite"])
            return None
        if state_folder(output).exists():  # killed between publishing and cleaning up
            forget(state_folder(output))
        return load(output)

    def _as_found(self, finished: Loaded, output: Path) -> dict[str, Any]:
        """Return the part of the report that a finished output still tells: no losses, no times."""
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
            if (weight := (read_side(output) or {}).get("weights", {}).get(linear.name))
        ]
        planned = (read_side(output) or {}).get("planned")
        return {
            **({"planned": planned} if planned is not None else {}),
            "sparsity": sparsity(finished.model),
            "seconds": time.perf_counter() - self.started,
            "peak_memory_bytes": peak_memory(self.device),
            "layers": layers,
            "blocks": [],
            "warnings": [*self.warnings, f"`{output}` was complete already, so nothing was done"],
        }

    def _side(self, identity: dict[str, Any], done: SweepReport, sweep: Sweep) -> dict[str, Any]:
        """Return the content of `secateur.json`: only what decides the result, so that equal runs write equal bytes."""
        base = None
        if self.stage == "tune":
            named = self.options.get("teacher")
            base = {"spec": str(named)} if isinstance(named, str | Path) else (self.side or {}).get("base_model")
        weights = {
            layer.name: {"pattern": str(sweep.patterns[layer.name]), **_mask_line(done.masks, layer.name)}
            for block in done.blocks
            for layer in block.layers
        }
        return {
            "base_model": base or identity["model"],
            "stage": self.stage,
            "run": digest_of(identity),
            "settings": {name: value for name, value in identity.items() if name not in ("model", "versions")},
            "versions": identity["versions"],
            **({"planned": self.planned} if self.planned is not None else {}),
            "weights": weights,
        }


def state_folder(output: Path) -> Path:
    """Return where an unfinished run towards `output` keeps its state."""
    return output.with_name(output.name + ".unfinished")


def forget(state: Path) -> None:
    """Delete the state of an unfinished run, unless a process is working on it."""
    journal = Journal(state, _identity_of(state), resume=True)
    journal.close(remove=True)


def _identity_of(state: Path) -> dict[str, Any]:
    try:
        found = json.loads((state / "identity.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in found.items() if key != "format"} if isinstance(found, dict) else {}


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


def read_side(folder: Path) -> dict[str, Any] | None:
    """Return what `secateur.json` in `folder` says, or None if there is none."""
    try:
        found = json.loads((folder / "secateur.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def digest_of(identity: Mapping[str, Any]) -> str:
    """Return the sha256 of what decides a result."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def refuse_existing(output: str | Path | None, resume: bool, overwrite: bool) -> None:
    """Refuse an output that is there already, before any work is done."""
    if output is None:
        return
    target = Path(output)
    if target.exists() and not overwrite and not (resume and read_side(target)):
        empty = target.is_dir() and not any(target.iterdir())
        if not empty:
            raise StateError(
                f"the output `{target}` exists", hint="choose another --output, or replace it with --overwrite"
            )
