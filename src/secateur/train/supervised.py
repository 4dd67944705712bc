"""Supervised fine-tuning on TRL's SFTTrainer: what a long run needs beside it, so that it can be trusted.

TRL renders conversations, masks prompts, packs and batches; transformers' Trainer steps, evaluates, logs and writes
checkpoints. Added here: a loss or gradient that is not finite ends the run before it is saved, a checkpoint counts only
once it is whole, a time limit, zeros that stay zero, shards (FSDP2) that become one model again, and nothing of the run
is left in the process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import PrinterCallback, TrainerCallback

from secateur.core.errors import InputError
from secateur.core.progress import Progress, Silent
from secateur.core.shards import is_sharded
from secateur.data.instructions import Examples
from secateur.train import sharding
from secateur.train.callbacks import Deadline, LoggedAsAsked, Shown, tensorboard
from secateur.train.checkpoints import Sealed, last_whole, refusing_full_disk
from secateur.train.fine_tuner import FineTuner, in_words_of_trl
from secateur.train.fitting import check_tokenizer, data_set, has_template, notes_on_length, template_refused
from secateur.train.masking import FixedMasks
from secateur.train.surroundings import put_back, quietly, undisturbed
from secateur.train.trainer import KeepZeros
from secateur.train.training import Training, check_training

if TYPE_CHECKING:
    from trl.trainer.sft_config import SFTConfig


@dataclass
class Trained:
    """What came of a run.

    Attributes:
        steps: that were taken, those of earlier parts of a resumed run included.
        losses: `{"step", "loss", "learning_rate", "grad_norm"}` every `log_every` steps, of the first and of the last one.
        evaluations: `{"step", "loss"}`.
        examples: that were trained on: sequences, after packing.
        dropped: examples of which `length` left no token to learn.
        cut: examples whose end was left out because they are longer than `length`.
        cut_tokens: that were left out so.
        tokens: of all forwards of this process in this part of the run.
        finished: False if the time limit ended it.
        notes: what a reader of the report should know.
        model: that was trained; where training sharded it, all of it again, on the CPU of each process.
    """

    steps: int = 0
    losses: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    examples: int = 0
    dropped: int = 0
    cut: int = 0
    cut_tokens: int = 0
    tokens: int = 0
    finished: bool = True
    notes: list[str] = field(default_factory=list)
    model: Any = None


def train(
    model: nn.Module,
    tokenizer: Any,
    data: Examples,
    training: Training,
    *,
    evaluation: Examples | None = None,
    folder: Path | None = None,
    logs: Path | None = None,
    device: torch.device | None = None,
    masks: FixedMasks | None = None,
    compact: bool = False,
    around: Callable[[torch.optim.Optimizer, nn.Module], torch.optim.Optimizer] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    deadline: float | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train what `requires_grad` in `model`, in place, and return the loss curve.

    Where a launcher asks for shards (FSDP2), `model` is taken apart, and the result has all of it in a new one.

    Args:
        model: a transformers causal language model, or PEFT's around one.
        tokenizer: of the model; one without padding token pads with its end token.
        data: examples.
        training: how.
        evaluation: examples whose loss is measured before, during and after.
        folder: of the checkpoints; the last whole one in it is gone on with. None: no checkpoints.
        logs: where TensorBoard's files go; beside the checkpoints if None.
        device: where to train, if not where transformers would; under a launcher each process has its own.
        masks: pruned weights that stay zero while all weights are trained.
        compact: keep optimizer states for kept weights alone; needs `masks`.
        around: wraps the optimizer, as CrAM does.
        callbacks: more of them, such as the schedule of an adapter.
        deadline: of `time.monotonic`; then a checkpoint is written and the run ends.
        progress: shown every step.

    Raises:
        NumericError: the loss, a gradient or a trained weight is not finite; the last whole checkpoint is kept.
        InputError: no example is left, or nothing is to be trained.
        RecipeError: a setting does not fit the data or the machine.
    """
    check_training(training)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("no weight of the model is to be trained")
    result = Trained(model=model)
    if data.answers and not has_template(tokenizer):
        result.notes.append(
            "the tokenizer has no chat template, so prompts are written as `### Instruction:` and `### Response:`"
        )
    base: Any = bare(model)
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < training.length:
        training = replace(training, length=positions)  # what is cut then is noted
    check_tokenizer(tokenizer, [data, *([] if evaluation is None else [evaluation])])
    in_shards = sharding.is_asked_for()
    empty = sharding.emptied(model) if in_shards else None
    with undisturbed(), put_back(model, base, tokenizer), tempfile.TemporaryDirectory() as scratch, quietly():
        checkpoints = folder or Path(scratch)
        over = None if deadline is None else Deadline(deadline)
        added: list[TrainerCallback] = [Shown(progress or Silent()), LoggedAsAsked(), *callbacks]
        if folder is not None:
            added.append(Sealed())
        if masks is not None and not compact:
            added.append(KeepZeros(sharding.whole_masks(model, masks.pairs()) if in_shards else masks))
        if over is not None:
            added.append(over)
        if "tensorboard" in training.log_to:
            added.append(tensorboard(logs or checkpoints / "logs"))
        settings = in_words_of_trl(
            training,
            checkpoints,
            device,
            answers=data.answers,
            save=folder is not None,
            evaluate=evaluation is not None,
        )
        trainer = _trainer(model, tokenizer, data, evaluation, settings, added)
        trainer.make_compact = masks if compact else None
        trainer.around = around
        _note(result, trainer, data, evaluation, training.length)
        trainer.accelerator.wait_for_everyone()  # so that all find the same checkpoint, before one writes the next
        last = None if folder is None else last_whole(folder)
        settings.eval_on_start = evaluation is not None and last is None  # a checkpoint remembers what came of it
        with refusing_full_disk(checkpoints):
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
            trainer.refuse_broken_weights()
            result.finished = over is None or not over.is_over
            if evaluation is not None and result.finished:
                trainer.evaluate()
        result.steps = trainer.state.global_step
        result.tokens = int(trainer._total_train_tokens)
        result.losses, result.evaluations = _curves(trainer.state.log_history)
        if empty is not None and any(map(is_sharded, trainer.model.parameters())):
            result.model = sharding.whole_again(empty, trainer.model)
    return result


def _trainer(
    model: nn.Module,
    tokenizer: Any,
    data: Examples,
    evaluation: Examples | None,
    settings: SFTConfig,
    callbacks: list[TrainerCallback],
) -> FineTuner:
    """Return the trainer, which has rendered and cut the examples.

    Raises:
        InputError: the chat template does not take them, or none is left.
        RecipeError: the launcher asks for shards that cannot be trained.
    """
    try:
        trainer = FineTuner(
            model,
            args=settings,
            train_dataset=data_set(data, tokenizer),
            eval_dataset=None if evaluation is None else data_set(evaluation, tokenizer),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    except TemplateError as error:
        raise template_refused(error) from error
    if sharding.is_asked_for():
        sharding.check_sharded(trainer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _note(result: Trained, trainer: FineTuner, data: Examples, evaluation: Examples | None, length: int) -> None:
    """Write into `result` what there is to know before the first step."""
    if sharding.is_asked_for() and sharding.wraps_nothing(trainer):
        result.notes.append(
            "every forward gathers the whole model; --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP gathers one "
            "block at a time"
        )
    result.examples = len(trainer.train_dataset)
    found = trainer.fitted["train"]
    result.dropped, result.cut, result.cut_tokens = found.dropped, found.cut, found.cut_tokens
    result.notes += notes_on_length(found, data, length)
    if evaluation is not None:
        result.notes += notes_on_length(trainer.fitted["eval"], evaluation, length)


def bare(model: nn.Module) -> nn.Module:
    """Return the transformers model inside PEFT's, or `model` itself."""
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inner


def _curves(history: Sequence[dict[str, Any]]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Return the losses and the evaluations in the Trainer's log."""
    names: tuple[str, ...] = ("step", "loss", "learning_rate", "grad_norm")
    losses = [{name: float(line[name]) for name in names if name in line} for line in history if "loss" in line]
    found = {int(line["step"]): float(line["eval_loss"]) for line in history if "eval_loss" in line}
    return losses, [{"step": step, "loss": loss} for step, loss in sorted(found.items())]
