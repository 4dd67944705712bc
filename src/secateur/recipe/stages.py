"""The stages, which are the public functions: prune, tune, finetune, evaluate, inspect, export, load.

The command line and recipes call these same functions. A model goes in as a name or as a live `transformers` model; what
comes out is a `Result`: the model, and a report that is plain JSON.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.contracts import BlockTuner, Pruner
from secateur.core.errors import InputError, RecipeError
from secateur.core.pattern import Pattern, parse_pattern
from secateur.core.progress import Progress, Silent
from secateur.data.calibration import Calibration
from secateur.data.text import load_text, tokenise
from secateur.engine.activations import Offload
from secateur.engine.budget import assign
from secateur.engine.memory import peak_memory
from secateur.engine.planning import planning_of
from secateur.engine.sweep import Fallback, Nonfinite, Sweep
from secateur.export import bitmask
from secateur.export.summary import inspect as summarise
from secateur.models.files import save_model
from secateur.models.linears import find_all_linears, sparsity
from secateur.models.publish import publish
from secateur.recipe.build import build_method, describe
from secateur.recipe.finetune import finetune
from secateur.recipe.finetune_run import effective_sparsity
from secateur.recipe.job import Job, Result, refuse_existing
from secateur.recipe.opening import load, modes_back
from secateur.recipe.sweep_run import SweepRun

__all__ = ["Result", "evaluate", "export", "finetune", "inspect", "load", "prune", "tune"]

Method = str | Mapping[str, Any] | object
CalibrationData = str | Path | Sequence[str] | Tensor | Calibration


def prune(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    method: Method = "sparsegpt",
    pattern: str | float | Pattern = "50%",
    plan: Method | None = None,
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
    include: Sequence[str] = (),
    overrides: Mapping[str, str | float | Pattern | None] | None = None,
    nonfinite: Nonfinite = "error",
    fallback: Fallback = "error",
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: Offload = "ram",
    batch_tokens: int = 8192,
    field: str = "text",
    output: str | Path | None = None,
    state: str | Path | None = None,
    plans: str | Path | None = None,
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
        plan: a planner, e.g. `owl`, that gives each linear its own sparsity, or its own N:M, within the budget that
            `pattern` means for all of them together; linears with an override keep that.
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
        include: linears outside the blocks to prune as well, such as `lm_head`; an embedding by its exact name, pruned by
            magnitude. A head that is tied to the embedding needs both names. They come after the last block.
        overrides: `{name pattern: pattern}` for single linears; `dense` or None leaves them alone.
        nonfinite: NaN or infinity is an `error`; `zero` sets such weights to zero first; `skip-batch` leaves out
            calibration batches that overflow, up to 1 % of them (at least one).
        fallback: where no factorisation of a Gram matrix works: `error`, or `diag` to use its diagonal alone and call
            the linear degraded in the report (an error all the same with `strict`).
        seed: decides the calibration samples and all randomness of tuning.
        device: where blocks are computed; a CUDA device if there is one, else `cpu`.
        dtype: dtype of the weights of a model that is loaded here; the stored one if None.
        offload: `ram` or `disk`, where hidden states wait.
        batch_tokens: tokens of one calibration batch.
        field: field of a `.jsonl` or `.parquet` calibration file.
        output: folder to publish the model in; None returns it only.
        state: folder where a run without `output` keeps its finished blocks until its end, so that `resume` goes on.
        plans: folder where plans are kept, so that runs which plan alike with the same model and text plan once.
        resume: go on with an earlier unfinished run of the same settings; simply starts if there is none.
        overwrite: replace an earlier output and forget an unfinished run.
        inplace: change a live `model` itself instead of a copy.
        max_minutes: stop at a block boundary after this time; needs `output` or `state`, and `resume` goes on.
        memory_limit: bytes of main memory that may be used; the system's free memory if None.
        strict: raise an error where there would be a warning, before the work if it is known by then; nothing is
            published.
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
    planner = None if plan is None else build_method(plan, "planner", where="plan")
    tuning = _tuner(tuner)
    general = parse_pattern(pattern)
    refuse_existing(output, resume, overwrite)
    job = Job("prune", model, tokenizer, None, locals())
    patterns = assign(job.model, general, overrides, ignore, include)
    planning = None if planner is None else planning_of(planner, job.model, patterns, general, list(overrides or ()))
    looks = bool(pruner.needs) or tuning is not None or planner is not None or refit or error_correction
    data = job.calibration(needed=looks)
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
        ignore=tuple(ignore),
        nonfinite=nonfinite,
        fallback="error" if strict else fallback,
        deadline=job.deadline,
    )
    settings = {
        "method": describe(pruner),
        "pattern": str(general),
        "plan": describe(planner) if planner is not None else None,
        "tuner": describe(tuning) if tuning is not None else None,
        "refit": refit,
        "sequential": sequential,
        "error_correction": error_correction,
        "guard": guard,
        "freeze_zeros": freeze_zeros,
        "ignore": list(ignore),
        "include": list(include),
        "nonfinite": nonfinite,
        "fallback": fallback,
        "overrides": {name: None if wanted is None else str(wanted) for name, wanted in (overrides or {}).items()},
    }
    return SweepRun(job, sweep, data, settings, planning=planning).run()


@modes_back("teacher")
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
    nonfinite: Nonfinite = "error",
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: Offload = "ram",
    batch_tokens: int = 8192,
    field: str = "text",
    output: str | Path | None = None,
    state: str | Path | None = None,
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
        teacher: the dense model; None takes the base model named in the sparse model's `secateur.json`, if it still is
            what it was.
        tokenizer, calibration, samples, length, nonfinite, ...: as in `prune`.

    Returns:
        `Result(model, report)`.

    Raises:
        InputError: if no teacher is known, it does not fit, or the model has no zeros to keep.
        SecateurError: as `prune`.
    """
    tuning = _tuner(method)
    assert tuning is not None
    refuse_existing(output, resume, overwrite)
    job = Job("tune", model, tokenizer, teacher, locals())
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
        ignore=tuple(ignore),
        nonfinite=nonfinite,
        deadline=job.deadline,
    )
    settings = {
        "method": describe(tuning),
        "tuner": describe(tuning),
        "pattern": "as found",
        "ignore": list(ignore),
        "nonfinite": nonfinite,
    }
    return SweepRun(job, sweep, data, settings, job.teacher).run()


@modes_back()
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
    job = Job("evaluate", model, tokenizer, None, {**locals(), "inplace": True})
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
        "sparsity": effective_sparsity(job.model),
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
    refuse_existing(target, False, overwrite)
    job = Job("export", model, tokenizer, None, {**locals(), "inplace": True})
    side = job.side or {"stage": "export", "base_model": job.identity()}
    with publish(target, overwrite) as folder:
        writer = bitmask.write if format == "bitmask" else save_model
        notes = writer(job.model, job.tokenizer, folder, side)
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
        "warnings": [*job.warnings, *(notes or [])],
    }


def _tuner(spec: Method | None) -> BlockTuner | None:
    if spec is None:
        return None
    tuner = build_method(spec, "block tuner")
    assert isinstance(tuner, BlockTuner)
    return tuner
