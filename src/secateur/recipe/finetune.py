"""`finetune`: train an adapter, or all kept weights, on instructions or text; zeros stay zero."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import RecipeError, StateError, TimeLimitReached
from secateur.core.progress import Progress
from secateur.core.versions import versions
from secateur.data.instructions import Examples, load_examples
from secateur.engine.memory import peak_memory
from secateur.methods.registry import REGISTRY
from secateur.models.files import save_model
from secateur.models.linears import sparsity
from secateur.models.publish import publish
from secateur.recipe.build import build_method, describe
from secateur.recipe.finetune_folder import (
    CHECKPOINTS,
    as_published,
    is_done,
    merged,
    refuse_output,
    save_adapter,
    side_of,
    unfinished,
    weight_sides,
)
from secateur.recipe.job import Job, Result, refuse_existing
from secateur.train.sharding import accelerate_settings, check_sharding, is_asked_for

STEPS = 500  # where neither steps nor epochs are given
RATE = 2e-4  # of adapters that suggest none
FULL_RATE = 2e-5  # of all weights
SELECTING = 32  # examples that a selection by activations or gradients reads


@accelerate_settings()
def finetune(
    model: str | Path | nn.Module,
    tokenizer: Any = None,
    *,
    data: str | Path | Sequence[Mapping[str, Any]] | Examples | None = None,
    adapter: Any = "spp",
    evaluation: str | Path | Sequence[Mapping[str, Any]] | Examples | None = None,
    instruction_field: str | None = None,
    response_field: str | None = None,
    field: str = "text",
    skip_bad: int = 0,
    steps: int | None = None,
    epochs: float | None = None,
    length: int = 1024,
    batch_size: int = 8,
    accumulation: int = 1,
    learning_rate: float | None = None,
    schedule: str = "linear",
    warmup: float = 0.03,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    clip: float = 1.0,
    optimizer: str = "adamw_torch",
    around: Any = None,
    completion_only: bool = True,
    packing: bool = False,
    gradient_checkpointing: bool = False,
    bf16: bool | None = None,
    keep_zeros: bool = True,
    compact_state: bool = False,
    evaluate_every: int | None = None,
    log_every: int = 10,
    save_every: int = 100,
    log_to: str | Sequence[str] = (),
    merge: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    inplace: bool = False,
    max_minutes: float | None = None,
    strict: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Fine-tune a model by an adapter, or all of its weights, with TRL's SFTTrainer; what is sparse stays as sparse.

    Started by `accelerate launch` or `torchrun`, each process calls this alike and the first one writes the output.

    Args:
        model: what `load` takes, or a live `transformers` causal language model.
        tokenizer: of a live model.
        data: examples to learn: what `load_examples` takes, or a list of records such as
            `{"instruction": ..., "response": ...}`, `{"messages": [...]}` or `{"text": ...}`.
        adapter: `spp`, `masked_lora`, `s2ft`, `pst` or `lora`, by name, as `{"name": ..., field: value}`, or any PEFT
            configuration; None trains all weights.
        evaluation: examples whose loss is measured before and after, and every `evaluate_every` steps.
        instruction_field: field of the question, where it has an unusual name; needs `response_field`.
        response_field: field of the answer.
        field: field of plain text.
        skip_bad: bad records of a data file that may be skipped.
        steps: of the optimizer; 500 where `epochs` is not given either.
        epochs: passes over the data, in place of `steps`.
        length: tokens of a sequence; longer ones are cut.
        batch_size: sequences of one forward on each process.
        accumulation: forwards of one step.
        learning_rate: the adapter's own suggestion if None, 2e-5 for all weights.
        schedule: `linear`, `cosine` or `constant` after the warm-up.
        warmup: steps, or a fraction of all where below 1.
        weight_decay: of AdamW and its kin.
        betas: of AdamW.
        clip: largest norm of a gradient; 0 leaves gradients alone.
        optimizer: `adamw_torch`, `sgd` and so on, as transformers calls them.
        around: an optimizer of the shelf that works around it, such as `cram`.
        completion_only: learn answers, not prompts.
        packing: several examples in one sequence, none of them seeing another.
        gradient_checkpointing: keep no activations inside blocks, and compute them again in backward.
        bf16: compute in bfloat16 by autocast; None: on GPUs that can.
        keep_zeros: when all weights are trained, weights of the blocks that are zero stay zero.
        compact_state: when all weights are trained, keep optimizer states for kept weights alone.
        evaluate_every: steps between evaluations.
        log_every: steps between lines of the loss curve.
        save_every: steps between checkpoints, of which the last two are kept while the run goes on.
        log_to: `tensorboard`, `trackio` and so on, as transformers calls them.
        merge: write the whole model with the adapter merged, not the adapter; a merge that would fill zeros is refused.
        seed: decides the order of examples and all randomness of training.
        device, dtype: as in `prune`.
        output: folder to publish the adapter, or the model, in; None returns it only.
        resume: go on from the last checkpoint of an earlier unfinished run of the same settings.
        overwrite: replace an earlier output and forget an unfinished run.
        inplace: change a live `model` itself instead of a copy.
        max_minutes: write a checkpoint and stop after this time; needs `output`, and `resume` goes on.
        strict, allow_pickle, trust_remote_code, revision, dry_run, progress: as in `prune`.

    Returns:
        `Result(model, report)`: PEFT's model with the adapter active, or the whole model; in eval mode. Where training
        had it in shards (FSDP2), every process gets all of it again, on the CPU.

    Raises:
        NumericError: the loss or a gradient was not finite; the last checkpoint before it is kept.
        InputError: data that cannot be used, with their lines; a merge that would change zeros.
        TimeLimitReached: `max_minutes` were over.
        SecateurError: another of its kinds; nothing is published then.
    """
    if data is None:
        raise RecipeError("`data` is missing", hint="for example --data builtin:tiny-instructions")
    if steps is not None and epochs is not None:
        raise RecipeError("`steps` and `epochs` are both given", hint="leave one of them out")
    config = None if adapter is None else build_method(adapter, "adapter", where="adapter")
    outer = None if around is None else build_method(around, "optimizer", where="around")
    if config is None and merge:
        raise RecipeError("`merge` has nothing to merge where all weights are trained", hint="leave it out")
    if config is not None and compact_state:
        raise RecipeError("`compact_state` is for training all weights", hint="leave out the adapter, or this")
    in_shards = is_asked_for()
    if in_shards:
        live = isinstance(model, nn.Module)
        check_sharding(two_pass=outer is not None, compact=compact_state, inplace=inplace and live)
    main = int(os.environ.get("RANK", "0")) == 0
    if main:
        refuse_existing(output, resume, overwrite)
        refuse_output(output, model)
    job = Job("finetune", model, tokenizer, None, {**locals(), "state": None})
    words = job.need_tokenizer("fine-tune")
    examples = _examples(data, job, "calibration")
    tested = None if evaluation is None else _examples(evaluation, job, "evaluation")

    from secateur.train.training import Training, check_training

    training = Training(
        steps=steps if steps is not None or epochs is not None else STEPS,
        epochs=epochs,
        length=length,
        batch_size=batch_size,
        accumulation=accumulation,
        learning_rate=_rate(config) if learning_rate is None else learning_rate,
        schedule=schedule,  # type: ignore[arg-type]
        warmup=warmup,
        weight_decay=weight_decay,
        betas=tuple(betas),  # type: ignore[arg-type]
        clip=clip,
        optimizer=optimizer,
        completion_only=completion_only,
        packing=packing,
        gradient_checkpointing=gradient_checkpointing,
        bf16=bf16,
        evaluate_every=evaluate_every,
        log_every=log_every,
        save_every=save_every,
        log_to=(log_to,) if isinstance(log_to, str) else tuple(log_to),
        seed=seed,
    )
    check_training(training)
    zeros = sparsity(job.model)
    settings = {
        "adapter": None if config is None else _described(config),
        "around": None if outer is None else describe(outer),
        "keep_zeros": keep_zeros,
        "compact_state": compact_state,
        "merge": merge,
        **asdict(training),
    }
    report: dict[str, Any] = {
        "stage": "finetune",
        "model": job.spec,
        "output": None if output is None else str(output),
        **settings,
        "data": _data_line(examples),
        "evaluation": None if tested is None else _data_line(tested),
        "device": str(job.device),
        "dtype": str(next(job.model.parameters()).dtype).removeprefix("torch."),
        "versions": versions(),
        "sparsity_before": zeros,
    }
    if dry_run:
        return Result(job.model, {**report, "dry_run": True, "warnings": job.warnings})
    identity = {
        "stage": "finetune",
        **{name: value for name, value in settings.items() if name not in ("log_to", "log_every", "merge")},
        "model": job.identity() if output is not None else {},
        "data": report["data"],
        "evaluation": report["evaluation"],
        "dtype": report["dtype"],
        "device": job.device.type,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        **({"shards": True} if in_shards else {}),
        "versions": report["versions"],
    }
    made = {**identity, "merge": merge}  # an unfinished run does not depend on it, its output does
    target = None if output is None else Path(output)
    if target is not None and resume:
        if is_done(target, made):  # every process sees that it has nothing to do
            job.warnings.append(f"`{target}` was complete already, so nothing was done")
            return Result(job.model, {**report, **as_published(target), "warnings": job.warnings})
        if main:
            refuse_existing(target, resume=False, overwrite=overwrite)
    with unfinished(target, identity, resume=resume, overwrite=overwrite, main=main) as state:
        tuned = _with_adapter(job, config, examples, words) if config is not None else _whole(job.model)
        masks = None
        if config is None and keep_zeros and zeros > 0:
            from secateur.train.masking import FixedMasks

            masks = FixedMasks.from_zeros(job.model)
        if compact_state and masks is None:
            raise RecipeError("`compact_state` needs a sparse model and `keep_zeros`", hint="leave it out")
        trained = _trained(job, tuned, words, examples, tested, training, state, target, masks, outer, config)
        tuned = trained.model
        report |= {
            "steps_done": trained.steps,
            "losses": trained.losses,
            "evaluations": trained.evaluations,
            "sequences": trained.examples,
            "dropped": trained.dropped,
            "cut": trained.cut,
            "cut_tokens": trained.cut_tokens,
            **_trainable(tuned),
        }
        job.warnings += trained.notes
        if strict and job.warnings:
            raise StateError(
                f"not everything was done as asked: {job.warnings[0]}", hint="leave out --strict to accept it"
            )
        side = side_of(made, merge or config is None, job)
        if merge:
            result = merged(tuned, words, job, state if main else None, target if main else None, side)
        else:
            result = tuned
            if target is not None and main:
                with publish(target, overwrite) as folder:
                    if config is None:
                        job.warnings += save_model(
                            result, words, folder, {**side, "weights": weight_sides(result, job)}
                        )
                    else:
                        save_adapter(result, words, folder, side)
        after = sparsity_beneath(result)
    report |= {
        "sparsity": after,
        "merged": merge,
        "seconds": time.perf_counter() - job.started,
        "peak_memory_bytes": peak_memory(job.device),
        "warnings": job.warnings,
    }
    return Result(result.eval(), report)


def _examples(given: Any, job: Job, role: Any) -> Examples:
    """Return the examples that were given, whatever they were given as."""
    if isinstance(given, Examples):
        return given
    options = job.options
    reading = {name: options[name] for name in ("instruction_field", "response_field", "field", "skip_bad")}
    found = load_examples(given, role=role, **reading)
    job.warnings += found.notes
    return found


def _data_line(examples: Examples) -> dict[str, Any]:
    return {"source": examples.source, "examples": len(examples.rows), "digest": examples.digest}


def _described(config: Any) -> dict[str, Any]:
    if REGISTRY.entry_of(config) is not None:
        return describe(config)
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return {"name": type(config).__name__, **plain}


def _rate(config: Any) -> float:
    """Return the learning rate that an adapter suggests."""
    return FULL_RATE if config is None else float(getattr(config, "suggested_rate", RATE))


def _with_adapter(job: Job, config: Any, examples: Examples, tokenizer: Any) -> Any:
    """Return PEFT's model with a new adapter, which alone is to be trained."""
    from peft import get_peft_model

    if getattr(config, "task_type", None) is None:
        config.task_type = "CAUSAL_LM"
    if hasattr(config, "prepared"):
        config = config.prepared(job.model, lambda: _batches(examples, tokenizer, int(job.options["length"])))
    job.model.requires_grad_(False)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with _drawn_alike(job.model, int(job.options["seed"])):
            model = get_peft_model(job.model, config)
    if job.source is not None:
        for made in model.peft_config.values():
            made.base_model_name_or_path = _findable(job.spec)
    job.warnings += [str(one.message) for one in heard if issubclass(one.category, UserWarning)]
    return model


@contextmanager
def _drawn_alike(model: nn.Module, seed: int) -> Iterator[None]:
    """Let PEFT's own adapters, which draw from torch's generators, begin alike in every process and run."""
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _findable(spec: str) -> str:
    """Return what names the base model from any working folder."""
    return str(Path(spec).absolute()) if Path(spec).exists() else spec


def _whole(model: nn.Module) -> nn.Module:
    """Return `model` with every weight to be trained."""
    return model.requires_grad_(True)


def _batches(examples: Examples, tokenizer: Any, length: int) -> Iterator[Tensor]:
    """Yield the ids `(1, tokens)` of some examples, for methods that look at text before they train."""
    for row in examples.rows[:SELECTING]:
        if "text" in row:
            text = row["text"]
        else:
            text = "\n\n".join(message["content"] for part in ("prompt", "completion") for message in row[part])
        ids = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
        if ids.numel():
            yield ids


def _trained(
    job: Job,
    model: Any,
    tokenizer: Any,
    examples: Examples,
    tested: Examples | None,
    training: Any,
    state: Path | None,
    target: Path | None,
    masks: Any,
    outer: Any,
    config: Any,
) -> Any:
    from secateur.train.supervised import train

    trained = train(
        model,
        tokenizer,
        examples,
        training,
        evaluation=tested,
        folder=None if state is None else state / CHECKPOINTS,
        logs=None if target is None else target.with_name(f"{target.name}.logs"),
        device=job.device,
        masks=masks,
        compact=bool(job.options["compact_state"]),
        callbacks=config.callbacks() if hasattr(config, "callbacks") else (),
        around=None if outer is None else outer.around,
        deadline=job.deadline,
        progress=job.progress,
    )
    if not trained.finished:
        raise TimeLimitReached(
            f"the time limit was reached after {trained.steps} steps; they are kept in `{state}`",
            hint="run the same again with --resume",
        )
    return trained


def _trainable(model: nn.Module) -> dict[str, Any]:
    """Return how many values were trained, and their share of all."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    return {"trainable": trained, "trainable_share": trained / every}


def sparsity_beneath(model: Any) -> float:
    """Return the fraction of zeros in the linears of the blocks, those under adapters as they are without them."""
    if not hasattr(model, "get_base_model"):
        return sparsity(model)
    from secateur.train.adapter_model import without_adapters

    base = model.get_base_model()
    with without_adapters(base):
        return sparsity(base)
