"""The stages, which are the public functions: prune, tune, evaluate, inspect, export, load.

The command line and recipes call these same functions. A model goes in as a name or as a live `transformers` model; what
comes out is a `Result`: the model, and a report that is plain JSON.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.core.contracts import BlockTuner, Pruner
from secateur.core.errors import InputError, RecipeError, StateError
from secateur.core.mask import Masks
from secateur.core.pattern import Pattern, parse_pattern
from secateur.core.progress import Progress, Silent
from secateur.data.calibration import Calibration, from_ids, from_texts, sample
from secateur.data.text import Text, load_text, tokenise
from secateur.engine.activations import Offload
from secateur.engine.budget import assign, divide, divides_model
from secateur.engine.journal import Journal
from secateur.engine.memory import peak_memory, plan_memory
from secateur.engine.stream import compute_dtype
from secateur.engine.sweep import Sweep, SweepReport
from secateur.export import bitmask
from secateur.export.summary import inspect as summarise
from secateur.models.blocks import find_blocks
from secateur.models.files import Loaded, Source, save_model
from secateur.models.files import load as load_checkpoint
from secateur.models.linears import find_all_linears
from secateur.models.publish import publish
from secateur.recipe.build import build_method, describe

Method = str | Mapping[str, Any] | object
CalibrationData = str | Path | Sequence[str] | Tensor | Calibration


class Result(NamedTuple):
    """What `prune` and `tune` return.

    Attributes:
        model: the model, eval mode.
        report: plain JSON values: sparsity, seconds, peak memory, layers, blocks, warnings.
    """

    model: nn.Module
    report: dict[str, Any]


def load(
    spec: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    tokenizer: bool = True,
) -> Loaded:
    """Load a model and its tokenizer from whatever names one.

    Args:
        spec: a `save_pretrained` folder, a Hub id, a `.gguf` file, `builtin:smollm2-135m`, or a folder in the bitmask
            format of `export`.
        dtype: dtype of the weights, the stored one if None.
        allow_pickle: read `.bin` weights (with `weights_only`).
        trust_remote_code: run code that the model brings along; a Hub id then needs a `revision`.
        revision: commit, branch or tag of a Hub id.
        tokenizer: load the tokenizer as well.

    Returns:
        `Loaded(model, tokenizer, source)`, the model in eval mode on CPU.

    Raises:
        InputError: if the model is damaged, unsupported, or would need code to be run.
    """
    folder = Path(spec)
    if bitmask.is_packed(folder):
        model, words = bitmask.read(folder, dtype=_dtype(dtype))
        return Loaded(model, words, Source(str(spec), "bitmask", folder, None, bitmask.fingerprint(folder)))
    return load_checkpoint(
        str(spec),
        dtype=_dtype(dtype),
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        revision=revision,
        tokenizer=tokenizer,
    )


def prune(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    method: Method = "sparsegpt",
    pattern: str | float | Pattern = "50%",
    calibration: CalibrationData | None = None,
    samples: int = 128,
    length: int = 2048,
    tuner: Method | None = None,
    refit: bool = False,
    sequential: bool = True,
    error_correction: bool = False,
    guard: bool = True,
    freeze_zeros: bool = False,
    ignore: Sequence[str] = (),
    overrides: Mapping[str, str | float | Pattern | None] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: Offload = "ram",
    batch_tokens: int = 8192,
    field: str = "text",
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    inplace: bool = False,
    max_minutes: float | None = None,
    memory_limit: int | None = None,
    strict: bool = False,
    skip_bad: int = 0,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Prune a language model, and win the quality back block by block if a `tuner` is given.

    Args:
        model: what `load` takes, or a live `transformers` causal language model.
        tokenizer: the tokenizer of a live model; not needed where `calibration` is token ids.
        method: a pruner: its name, `{"name": ..., field: value}`, or an object such as `SparseGPT(damping=0.1)`.
        pattern: `70%`, `0.7`, `2:4` (2 of 4 kept), `70% row`, `70% layer`, `70% model`.
        calibration: a text (file, Hub data set, `builtin:` name), a list of texts, or int64 ids `(samples, length)`.
            May be None for methods that need no data.
        samples: calibration samples taken from a text.
        length: tokens of each sample.
        tuner: a block tuner, e.g. `ebft`, run on each block after its linears are pruned.
        refit: exact least-squares refit of every linear on its final mask.
        sequential: calibrate each linear on inputs from already pruned ones; False is the published one-pass habit.
        error_correction: aim each linear at the dense path's outputs, so that errors of earlier blocks are made up for.
        guard: drop a weight update that makes a layer's loss worse than its mask alone.
        freeze_zeros: zeros that the model already has stay, and count in the budget.
        ignore: linears to leave dense: exact names, classes, globs (`*.down_proj`) or `re:<regex>`.
        overrides: `{name pattern: pattern}` for single linears; `dense` or None leaves them alone.
        seed: decides the calibration samples and all randomness of tuning.
        device: where blocks are computed; a CUDA device if there is one, else `cpu`.
        dtype: dtype of the weights of a model that is loaded here; the stored one if None.
        offload: `ram` or `disk`, where hidden states wait.
        batch_tokens: tokens of one calibration batch.
        field: field of a `.jsonl` or `.parquet` calibration file.
        output: folder to publish the model in; None returns it only.
        resume: go on with an earlier unfinished run of the same settings; simply starts if there is none.
        overwrite: replace an earlier output and forget an unfinished run.
        inplace: change a live `model` itself instead of a copy.
        max_minutes: stop at a block boundary after this time; needs `output`, and `resume` goes on.
        memory_limit: bytes of main memory that may be used; the system's free memory if None.
        strict: raise instead of warn where something was not done as asked.
        skip_bad: bad lines of a data file that may be skipped.
        allow_pickle: see `load`.
        trust_remote_code: see `load`.
        revision: see `load`.
        dry_run: return the plan and do nothing; the model of the result is not changed.
        progress: shown every step; silent if None.

    Returns:
        `Result(model, report)`.

    Raises:
        SecateurError: one of its kinds, see `core/errors.py`; nothing is published then.
    """
    pruner = build_method(method, "pruner")
    assert isinstance(pruner, Pruner)
    tuning = _tuner(tuner)
    general = parse_pattern(pattern)
    _refuse_existing(output, resume, overwrite)
    job = _Job("prune", model, tokenizer, None, locals())
    patterns = assign(job.model, general, overrides, ignore)
    data = job.calibration(needed=bool(pruner.needs) or tuning is not None or refit or error_correction)
    sweep = Sweep(
        patterns=patterns,
        pruner=pruner,
        tuner=tuning,
        sequential=sequential,
        error_correction=error_correction,
        refit=refit,
        guard=guard,
        freeze_zeros=freeze_zeros,
        seed=seed,
        device=job.device,
        offload=offload,
        batch_tokens=batch_tokens,
        mapped=job.mapped,
        deadline=job.deadline,
    )
    settings = {
        "method": describe(pruner),
        "pattern": str(general),
        "tuner": describe(tuning) if tuning is not None else None,
        "refit": refit,
        "sequential": sequential,
        "error_correction": error_correction,
        "guard": guard,
        "freeze_zeros": freeze_zeros,
        "ignore": list(ignore),
        "overrides": {name: None if wanted is None else str(wanted) for name, wanted in (overrides or {}).items()},
    }
    return job.run(sweep, data, settings, None)


def tune(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    method: Method = "ebft",
    calibration: CalibrationData | None = None,
    teacher: str | Path | nn.Module | None = None,
    samples: int = 128,
    length: int = 2048,
    ignore: Sequence[str] = (),
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: Offload = "ram",
    batch_tokens: int = 8192,
    field: str = "text",
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    inplace: bool = False,
    max_minutes: float | None = None,
    memory_limit: int | None = None,
    strict: bool = False,
    skip_bad: int = 0,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Tune the blocks of a model that is sparse already, whoever pruned it; its zeros stay.

    Args:
        model: the sparse model; masks are read from its zeros.
        method: a block tuner, e.g. `ebft`.
        teacher: the dense model; None takes the base model named in the sparse model's `secateur.json`.
        tokenizer, calibration, samples, length, ...: as in `prune`.

    Returns:
        `Result(model, report)`.

    Raises:
        InputError: if no teacher is known, it does not fit, or the model has no zeros to keep.
        SecateurError: as `prune`.
    """
    tuning = _tuner(method)
    assert tuning is not None
    _refuse_existing(output, resume, overwrite)
    job = _Job("tune", model, tokenizer, teacher, locals())
    patterns: dict[str, Pattern] = {}
    allowed = assign(job.model, "0%", None, ignore)
    for linear in find_all_linears(job.model):
        zeros = int((linear.read() == 0).sum()) / (linear.out_features * linear.in_features)
        if zeros > 0 and linear.name in allowed:
            patterns[linear.name] = parse_pattern(zeros)
    if not patterns:
        raise InputError("the model has no zeros to keep", hint="prune it first, or use `secateur prune --tuner ebft`")
    data = job.calibration(needed=True)
    sweep = Sweep(
        patterns=patterns,
        tuner=tuning,
        seed=seed,
        device=job.device,
        offload=offload,
        batch_tokens=batch_tokens,
        mapped=job.mapped,
        deadline=job.deadline,
    )
    settings = {"method": describe(tuning), "tuner": describe(tuning), "pattern": "as found", "ignore": list(ignore)}
    return job.run(sweep, data, settings, job.teacher)


def evaluate(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    perplexity: str | Path | Sequence[str | Path] = (),
    length: int = 1024,
    limit: int | None = None,
    tasks: str | Sequence[str] = (),
    task_limit: int | None = None,
    lines: bool = False,
    label: str | None = None,
    field: str = "text",
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    skip_bad: int = 0,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model: perplexity on texts, accuracy on tasks, sparsity.

    Args:
        model: what `load` takes, or a live model with its `tokenizer`.
        tokenizer: of a live model.
        perplexity: texts; each is tokenised once and cut into windows of `length` that do not overlap.
        length: tokens of a window.
        limit: windows at most.
        tasks: names of lm-eval tasks, or local files or folders of JSONL rows with question, choices and answer.
        task_limit: documents per task at most.
        lines: join the text's non-empty lines by blank lines first, as is customary for raw WikiText-2.
        label: name of the model in reports.
        field: field of a `.jsonl` or `.parquet` text.
        batch_size: windows per forward; chosen from `length` if None.
        device: where the model runs.
        dtype: as in `load`.
        skip_bad, allow_pickle, trust_remote_code, revision, progress: as in `prune`.

    Returns:
        `{"model", "label", "perplexity": {text: value}, "tokens": {text: n}, "tasks": {...}, "sparsity", "seconds",
        "peak_memory_bytes"}`.

    Raises:
        InputError: if a text is too short for one window, or the tokenizer does not fit the model.
    """
    from secateur.evaluate.perplexity import perplexity as measure

    started = time.perf_counter()
    show = progress or Silent()
    job = _Job("evaluate", model, tokenizer, None, {**locals(), "inplace": True})
    live = job.model.to(job.device) if job.device.type != "cpu" else job.model
    texts = [perplexity] if isinstance(perplexity, str | Path) else list(perplexity)
    wanted = [tasks] if isinstance(tasks, str) else list(tasks)
    values: dict[str, float] = {}
    tokens: dict[str, int] = {}
    notes: list[str] = []
    for spec in texts:
        text = load_text(str(spec), field=field, skip_bad=skip_bad, lines=lines, role="evaluation")
        notes += text.notes
        ids = tokenise(text, job.need_tokenizer("measure perplexity"))
        found = measure(live, ids, length=length, limit=limit, batch_size=batch_size, device=job.device, progress=show)
        values[str(spec)], tokens[str(spec)] = found.value, found.tokens
    scores: dict[str, Any] = {}
    if wanted:
        from secateur.evaluate.harness import run_tasks

        scores = run_tasks(live, job.need_tokenizer("run tasks"), wanted, limit=task_limit)
    return {
        "stage": "evaluate",
        "model": job.spec,
        "label": label or job.spec,
        "perplexity": values,
        "tokens": tokens,
        "length": length,
        "tasks": scores,
        "sparsity": sparsity(job.model),
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(job.device),
        "warnings": notes,
    }


def inspect(model: str | Path | nn.Module, **loading: Any) -> dict[str, Any]:
    """Return sparsity and pattern of every linear, dtype, size, and what each format could save.

    Args:
        model: what `load` takes, or a live model.
        loading: options of `load`.
    """
    if isinstance(model, nn.Module):
        return summarise(model)
    loaded = load(model, tokenizer=False, **loading)
    return {"model": str(model), **summarise(loaded.model)}


def export(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    format: str = "checkpoint",
    output: str | Path,
    overwrite: bool = False,
    dtype: str | torch.dtype | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> dict[str, Any]:
    """Write a model in another format.

    Args:
        model: what `load` takes, or a live model.
        tokenizer: of a live model; None leaves it out.
        format: `checkpoint` (plain safetensors, loads everywhere) or `bitmask` (one bit per weight and the kept values).
        output: folder to publish.
        overwrite: replace an earlier output.
        dtype, allow_pickle, trust_remote_code, revision: as in `load`.

    Returns:
        `{"output", "format", "bytes", "dense_bytes", "ratio", "sparsity"}`; bytes are those of the weights.

    Raises:
        RecipeError: for an unknown format.
        StateError: if the output exists.
    """
    if format not in ("checkpoint", "bitmask"):
        raise RecipeError(f"format `{format}` must be `checkpoint` or `bitmask`")
    target = Path(output)
    _refuse_existing(target, False, overwrite)
    job = _Job("export", model, tokenizer, None, {**locals(), "inplace": True})
    side = {"stage": "export", "base_model": job.identity()}
    with publish(target, overwrite) as folder:
        if format == "bitmask":
            bitmask.write(job.model, job.tokenizer, folder, side)
        else:
            save_model(job.model, job.tokenizer, folder, job.side or side)
    dense = sum(parameter.nbytes for parameter in job.model.parameters())
    written = sum(file.stat().st_size for file in target.iterdir() if file.suffix in (".safetensors", ".secateur"))
    return {
        "stage": "export",
        "model": job.spec,
        "output": str(target),
        "format": format,
        "bytes": written,
        "dense_bytes": dense,
        "ratio": written / dense,
        "sparsity": sparsity(job.model),
    }


def sparsity(model: nn.Module) -> float:
    """Return the fraction of zeros over all linears of the blocks, 0..1."""
    zeros = size = 0
    for linear in find_all_linears(model):
        weight = linear.read()
        zeros += weight.numel() - int(torch.count_nonzero(weight))
        size += weight.numel()
    return zeros / size if size else 0.0


def versions() -> dict[str, str]:
    """Return the versions of this package and of those that decide a result."""
    found: dict[str, str] = {}
    for package in ("secateur", "torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


class _Job:
    """The model of one call: opened, identified, and published at the end."""

    def __init__(self, stage: str, model: Any, tokenizer: Any, teacher: Any, options: Mapping[str, Any]) -> None:
        self.started = time.perf_counter()
        self.stage = stage
        self.options = options
        self.progress: Progress = options.get("progress") or Silent()
        self.device = _device(options.get("device"))
        self.warnings: list[str] = []
        minutes = options.get("max_minutes")
        if minutes is not None and options.get("output") is None:
            raise RecipeError("`max_minutes` needs an `output`, where the unfinished run can wait")
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.side: dict[str, Any] | None = None
        if isinstance(model, nn.Module):
            self.source: Source | None = None
            self.spec = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
            self.model = model if options.get("inplace") else copy.deepcopy(model)
            self.tokenizer = tokenizer
            self.mapped = False
        else:
            loaded = self._load(model)
            self.source, self.model, self.spec = loaded.source, loaded.model, str(model)
            self.tokenizer = tokenizer if tokenizer is not None else loaded.tokenizer
            self.mapped = True
            self.side = _side_file(loaded.source)
        self.model.eval()
        self.teacher = self._teacher(teacher) if stage == "tune" else None

    def _load(self, spec: Any) -> Loaded:
        loading = ("dtype", "allow_pickle", "trust_remote_code", "revision")
        return load(spec, **{name: self.options[name] for name in loading if name in self.options})

    def _teacher(self, teacher: Any) -> nn.Module:
        if isinstance(teacher, nn.Module):
            return teacher.eval()
        if teacher is None:
            base = (self.side or {}).get("base_model", {}).get("spec")
            if not base:
                raise InputError("the dense model that this one was pruned from is not known", hint="name it with --teacher MODEL")
            teacher = base
        return self._load(teacher).model

    def identity(self) -> dict[str, Any]:
        """Return what tells this model from any other."""
        if self.source is not None:
            return {"spec": self.spec, "fingerprint": self.source.fingerprint}
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy())
        return {"spec": self.spec, "fingerprint": digest.hexdigest()}

    def need_tokenizer(self, purpose: str) -> Any:
        """Return the tokenizer, or say that `purpose` needs one."""
        if self.tokenizer is None:
            raise InputError(f"a tokenizer is needed to {purpose}", hint="pass `tokenizer`, or token ids instead of a text")
        return self.tokenizer

    def calibration(self, *, needed: bool) -> Calibration:
        """Return the calibration tokens; a single token where none are needed and none were given."""
        options = self.options
        given = options.get("calibration")
        config = self.model.config.get_text_config()
        vocabulary = self.model.get_input_embeddings().num_embeddings
        limit = getattr(config, "max_position_embeddings", None)
        if given is None:
            if needed:
                raise RecipeError("`calibration` is missing: this method looks at data", hint="for example --calibration wikitext2")
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
            self.warnings += text.notes
            return sample(text, words, **choice)
        return from_texts(list(given), words, **choice)

    def run(self, sweep: Sweep, data: Calibration, settings: dict[str, Any], teacher: nn.Module | None) -> Result:
        """Sweep, publish, report."""
        options = self.options
        blocks = find_blocks(self.model)
        dtype = compute_dtype(self.model, self.device)
        hidden = self.model.config.get_text_config().hidden_size
        plan = plan_memory(blocks, sweep, *data.ids.shape, hidden, dtype)
        report: dict[str, Any] = {
            "stage": self.stage,
            "model": self.spec,
            "output": None if options["output"] is None else str(options["output"]),
            **settings,
            "calibration": {
                "source": data.source,
                "samples": data.ids.shape[0],
                "length": data.ids.shape[1],
                "tokens": int(data.ids.numel()),
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
            shares = divide(sweep.patterns, lambda: sweep.scores(self.model, data.ids, data.keep, progress=self.progress))
            sweep = _with(sweep, patterns=shares)
        identity = {
            "stage": self.stage,
            **settings,
            "model": self.identity() if options["output"] is not None else {},
            "teacher": None if teacher is None else str(options.get("teacher")),
            "calibration": report["calibration"],
            "seed": options["seed"],
            "dtype": report["dtype"],
            "device": self.device.type,
            "batch_tokens": options["batch_tokens"],
            "versions": report["versions"],
        }
        output = None if options["output"] is None else Path(options["output"])
        if output is None:
            done = sweep.run(self.model, data.ids, data.keep, teacher=teacher, progress=self.progress)
        else:
            done = self._run_and_publish(sweep, data, identity, teacher, output)
        self.warnings += done.warnings + list(getattr(data, "notes", []))
        layers = [
            {**asdict(layer), "shape": list(layer.shape), "notes": list(layer.notes)} for block in done.blocks for layer in block.layers
        ]
        report |= {
            "sparsity": sparsity(self.model),
            "seconds": time.perf_counter() - self.started,
            "peak_memory_bytes": peak_memory(self.device),
            "layers": layers,
            "blocks": [_block_line(block) for block in done.blocks],
            "warnings": self.warnings,
        }
        return Result(self.model, report)

    def _run_and_publish(
        self, sweep: Sweep, data: Calibration, identity: dict[str, Any], teacher: nn.Module | None, output: Path
    ) -> SweepReport:
        options = self.options
        state = state_folder(output)
        if options["overwrite"] and not options["resume"] and state.exists():
            forget(state)
        journal = Journal(state, identity, resume=options["resume"])
        try:
            done = sweep.run(
                self.model, data.ids, data.keep, teacher=teacher, journal=journal, progress=self.progress
            )
            if options["strict"] and done.warnings:
                raise StateError(f"not everything was done as asked: {done.warnings[0]}", hint="leave out --strict to accept it")
            with publish(output, options["overwrite"] or options["resume"]) as folder:
                save_model(self.model, self.tokenizer, folder, self._side(identity, done, sweep))
        except BaseException:
            journal.close(remove=False)
            raise
        journal.close(remove=True)
        return done

    def _side(self, identity: dict[str, Any], done: SweepReport, sweep: Sweep) -> dict[str, Any]:
        """Return the content of `secateur.json`: only what decides the result, so that equal runs write equal bytes."""
        base = (self.side or {}).get("base_model") if self.stage == "tune" else None
        weights = {
            layer.name: {"pattern": str(sweep.patterns[layer.name]), **_mask_line(done.masks, layer.name)}
            for block in done.blocks
            for layer in block.layers
        }
        return {
            "base_model": base or identity["model"],
            "stage": self.stage,
            "settings": {name: value for name, value in identity.items() if name not in ("model", "versions")},
            "versions": identity["versions"],
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
    import json

    try:
        found = json.loads((state / "identity.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in found.items() if key != "format"} if isinstance(found, dict) else {}


def _with(sweep: Sweep, **changes: Any) -> Sweep:
    from dataclasses import replace

    return replace(sweep, **changes)


def _mask_line(masks: Masks, name: str) -> dict[str, Any]:
    mask = masks[name]
    return {"zeros": int((~mask).sum()), "numel": mask.numel(), "mask_sha256": hashlib.sha256(mask.numpy().tobytes()).hexdigest()}


def _block_line(block: Any) -> dict[str, Any]:
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


def _side_file(source: Source) -> dict[str, Any] | None:
    import json

    if source.path is None or not source.path.is_dir():
        return None
    try:
        found = json.loads((source.path / "secateur.json").read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _tuner(spec: Method | None) -> BlockTuner | None:
    if spec is None:
        return None
    tuner = build_method(spec, "block tuner")
    assert isinstance(tuner, BlockTuner)
    return tuner


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise RecipeError(f"device `{device}` is not one that torch knows", hint="use `cpu` or `cuda`") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device `{device}` is not there: torch sees no CUDA device", hint="use --device cpu")
    return chosen


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype == "auto":
        return None
    if dtype not in known:
        raise RecipeError(f"dtype `{dtype}` must be one of {', '.join(known)}")
    return known[dtype]


def _refuse_existing(output: str | Path | None, resume: bool, overwrite: bool) -> None:
    """Refuse an output that is there already, before any work is done."""
    if output is None:
        return
    target = Path(output)
    if target.exists() and not overwrite and not (resume and state_folder(target).exists()):
        empty = target.is_dir() and not any(target.iterdir())
        if not empty:
            raise StateError(f"the output `{target}` exists", hint="choose another --output, or replace it with --overwrite")
