"""`finetune`: train an adapter, or all kept weights, on instructions or text; zeros stay zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur.core.errors import RecipeError
from secateur.core.processes import is_first
from secateur.core.progress import Progress
from secateur.data.instructions import Examples, load_examples
from secateur.recipe.build import build_method
from secateur.recipe.finetune_folder import refuse_output
from secateur.recipe.finetune_run import FinetuneRun
from secateur.recipe.job import Job, Result, refuse_existing
from secateur.train.sharding import accelerate_settings, check_sharding, is_asked_for

if TYPE_CHECKING:
    from secateur.train.training import Training

STEPS = 500  # where neither steps nor epochs are given
RATE = 2e-4  # of adapters that suggest none
FULL_RATE = 2e-5  # of all weights


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
    given = {**locals(), "state": None}
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
    if is_asked_for():
        live = isinstance(model, nn.Module)
        check_sharding(two_pass=outer is not None, compact=compact_state, inplace=inplace and live)
    if is_first():
        refuse_existing(output, resume, overwrite)
        refuse_output(output, model)
    job = Job("finetune", model, tokenizer, None, given)
    words = job.need_tokenizer("fine-tune")
    examples = _examples(data, job, "calibration")
    tested = None if evaluation is None else _examples(evaluation, job, "evaluation")
    return FinetuneRun(job, words, examples, tested, _training(given, config), config, outer).run()


def _training(given: Mapping[str, Any], config: Any) -> Training:
    """Return the settings of the training, those that are None as the adapter suggests them."""
    from secateur.train.training import Training, check_training

    settings = {field.name: given[field.name] for field in fields(Training)}
    if settings["steps"] is None and settings["epochs"] is None:
        settings["steps"] = STEPS
    if settings["learning_rate"] is None:
        settings["learning_rate"] = FULL_RATE if config is None else float(getattr(config, "suggested_rate", RATE))
    names = settings["log_to"]
    settings |= {"betas": tuple(settings["betas"]), "log_to": (names,) if isinstance(names, str) else tuple(names)}
    training = Training(**settings)
    check_training(training)
    return training


def _examples(given: Any, job: Job, role: Any) -> Examples:
    """Return the examples that were given, whatever they were given as."""
    if isinstance(given, Examples):
        return given
    options = job.options
    reading = {name: options[name] for name in ("instruction_field", "response_field", "field", "skip_bad")}
    found = load_examples(given, role=role, **reading)
    job.warnings += found.notes
    return found
