"""Supervised fine-tuning on TRL's SFTTrainer: what a long run needs beside it, so that it can be trusted.

TRL renders conversations, masks prompts, packs and batches; transformers' Trainer steps, evaluates, logs and writes
checkpoints. Added here: a loss or gradient that is not finite ends the run before it is saved, a checkpoint counts only
once it is whole, a time limit, zeros that stay zero, shards (FSDP2) that become one model again, and nothing of the run
is left in the process.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from secateur.core.errors import InputError, NumericError, RecipeError, ResourceError, missing_extra
from secateur.core.fetch import unwritable
from secateur.core.progress import Progress, Silent
from secateur.core.shards import is_sharded, local
from secateur.data.instructions import Examples
from secateur.train import sharding
from secateur.train.callbacks import Deadline, LoggedAsAsked, Shown, tensorboard
from secateur.train.checkpoints import Sealed, full_disk, last_whole
from secateur.train.fitting import (
    Fitted,
    check_tokenizer,
    data_set,
    fit,
    has_template,
    notes_on_length,
    pieces,
    template_refused,
)
from secateur.train.masking import FixedMasks, KeptOnly
from secateur.train.surroundings import put_back, quietly, undisturbed
from secateur.train.trainer import KeepZeros, TwoPassTrainer
from secateur.train.training import Training, check_training

try:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("datasets", "trl"):
        raise
    raise missing_extra(str(error.name), "train", "fine-tune models") from error


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
        settings = _settings(training, folder or Path(scratch), data, folder is not None, evaluation, device)
        over = None if deadline is None else Deadline(deadline)
        added: list[TrainerCallback] = [Shown(progress or Silent()), LoggedAsAsked(), *callbacks]
        if folder is not None:
            added.append(Sealed())
        if masks is not None and not compact:
            added.append(KeepZeros(sharding.whole_masks(model, masks.pairs()) if in_shards else masks))
        if over is not None:
            added.append(over)
        if "tensorboard" in training.log_to:
            added.append(tensorboard(logs or (folder or Path(scratch)) / "logs"))
        try:
            trainer = FineTuner(
                model,
                args=settings,
                train_dataset=data_set(data, tokenizer),
                eval_dataset=None if evaluation is None else data_set(evaluation, tokenizer),
                processing_class=tokenizer,
                callbacks=added,
            )
        except TemplateError as error:
            raise template_refused(error) from error
        if in_shards:
            sharding.check_sharded(trainer)
            if sharding.wraps_nothing(trainer):
                result.notes.append(
                    "every forward gathers the whole model; --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP gathers one "
                    "block at a time"
                )
        trainer.remove_callback(PrinterCallback)
        trainer.make_compact = masks if compact else None
        trainer.around = around
        result.examples = len(trainer.train_dataset)
        found = trainer.fitted["train"]
        result.dropped, result.cut, result.cut_tokens = found.dropped, found.cut, found.cut_tokens
        result.notes += notes_on_length(found, data, training.length)
        if evaluation is not None:
            result.notes += notes_on_length(trainer.fitted["eval"], evaluation, training.length)
        trainer.accelerator.wait_for_everyone()  # so that all find the same checkpoint, before one writes the next
        last = None if folder is None else last_whole(folder)
        settings.eval_on_start = evaluation is not None and last is None  # a checkpoint remembers what came of it
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
            trainer.refuse_broken_weights()
            if over is not None:
                result.finished = not over.is_over
            if evaluation is not None and result.finished:
                trainer.evaluate()
        except Exception as error:
            if (full := full_disk(error, Path(settings.output_dir))) is None:
                raise
            refused = unwritable(Path(settings.output_dir), full)
            raise ResourceError(
                f"no checkpoint can be kept: {refused}",
                hint=f"{refused.hint}; --resume goes on from the last whole checkpoint, if there is one",
            ) from error
        result.steps = trainer.state.global_step
        result.tokens = int(trainer._total_train_tokens)
        result.losses, result.evaluations = _curves(trainer.state.log_history)
        if empty is not None and any(map(is_sharded, trainer.model.parameters())):
            result.model = sharding.whole_again(empty, trainer.model)
    return result


class FineTuner(TwoPassTrainer, SFTTrainer):
    """TRL's trainer, for two-pass optimizers too, that neither takes nor saves a step that is not finite."""

    make_compact: FixedMasks | None = None
    around: Callable[[torch.optim.Optimizer, nn.Module], torch.optim.Optimizer] | None = None
    fitted: dict[str, Fitted]

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Return the token rows; what `max_length` takes from them is counted, also where they are packed."""
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        text, length = "text" in dataset.column_names, int(args.max_length)
        rows = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        if text and packing:  # all of a long text is learned, piece by piece
            rows = rows.map(pieces, fn_kwargs={"length": length}, batched=True, remove_columns=rows.column_names)
        if not hasattr(self, "fitted"):
            self.fitted = {}
        rows, self.fitted[dataset_name] = fit(rows, length)
        if not self.fitted[dataset_name].kept:
            return rows
        return super()._prepare_dataset(rows, processing_class, args, packing, formatting_func, dataset_name)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss of a micro-batch.

        Raises:
            NumericError: it is not finite on some process.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        losses = self.accelerator.gather(loss.detach().float().reshape(1))
        if not bool(torch.isfinite(losses).all()):
            raise self.not_finite(f"the loss is {float(losses.sum())}")
        gradients = [gradient for parameter in self.model.parameters() if (gradient := parameter.grad) is not None]
        if self.accelerator.sync_gradients and not self._are_finite(gradients):
            raise self.not_finite("a gradient is NaN or infinite")
        return loss

    def refuse_broken_weights(self) -> None:
        """Raise NumericError if a trained weight is NaN or infinite on some process: the last step has overflowed."""
        if not self._are_finite([parameter for parameter in self.model.parameters() if parameter.requires_grad]):
            raise self.not_finite("a trained weight became NaN or infinite", self.state.global_step)

    def not_finite(self, what: str, step: int | None = None) -> NumericError:
        """Return the error for a step that cannot be taken, the coming one if `step` does not say which."""
        last = last_whole(Path(self.args.output_dir))
        kept = "no checkpoint was written before it" if last is None else f"the last checkpoint, `{last}`, is kept"
        trained = {parameter.dtype for parameter in self.model.parameters() if parameter.requires_grad}
        return NumericError(
            f"{what} at step {step or self.state.global_step + 1} of {self.state.max_steps}; {kept}",
            hint="train in another `dtype`, such as bfloat16: the states of optimizers overflow and vanish in float16"
            if torch.float16 in trained
            else "lower `learning_rate`, raise `warmup`, or look at the data for empty or broken records",
        )

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint, never one of weights that are not finite."""
        self.refuse_broken_weights()
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[no-untyped-call]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Return the optimizer, with states for kept weights only or another one around it where that is asked for."""
        found: Any = self.optimizer
        if found is None:
            try:
                super().create_optimizer(*args, **kwargs)
            except ImportError as error:
                raise InputError(f"the optimizer `{self.args.optim.value}` cannot be used: {error}") from error
            except ValueError as error:
                raise RecipeError(f"the optimizer `{self.args.optim.value}` cannot be used: {error}") from error
            found = self.optimizer
            if self.make_compact is not None:
                kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                found = KeptOnly(lambda groups: kind(groups, **settings), found.param_groups, self.make_compact)
            if self.around is not None:
                found = self.around(found, self.model)
            self.optimizer: Any = found
        made: torch.optim.Optimizer = found
        return made

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what transformers does, but not the whole model into a checkpoint that has all of it in shards."""
        if not (_internal_call and self.is_fsdp_enabled):
            super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: a checkpoint is for resuming, the published folder says what it is."""

    def _are_finite(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether all values of `tensors` are finite on every process."""
        parts = [part for part in map(local, tensors) if part.numel()]
        # the largest magnitude: a sum of squares overflows where all values are finite
        largest = torch._foreach_norm(parts, float("inf")) if parts else []
        total = torch.stack([one.float() for one in largest]).amax() if largest else torch.zeros(())
        return bool(torch.isfinite(self.accelerator.gather(total.reshape(1).to(self.accelerator.device))).all())


def bare(model: nn.Module) -> nn.Module:
    """Return the transformers model inside PEFT's, or `model` itself."""
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inner


def _settings(
    training: Training,
    folder: Path,
    data: Examples,
    save: bool,
    evaluation: Examples | None,
    device: torch.device | None,
) -> SFTConfig:
    """Return the training in TRL's words."""
    on_cpu = device is not None and device.type == "cpu"
    bf16 = training.bf16
    if bf16 is None:
        bf16 = not on_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    during = evaluation is not None and training.evaluate_every is not None
    return SFTConfig(
        output_dir=str(folder),
        max_steps=training.steps or -1,
        num_train_epochs=training.epochs or 1.0,
        max_length=training.length,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule if training.schedule != "constant" else "constant_with_warmup",
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        max_grad_norm=training.clip,
        optim=training.optimizer,
        completion_only_loss=training.completion_only and data.answers,
        packing=training.packing,
        gradient_checkpointing=training.gradient_checkpointing,
        bf16=bf16,
        fp16=False,
        use_cpu=on_cpu,
        eval_strategy="steps" if during else "no",
        eval_steps=training.evaluate_every if during else None,
        logging_steps=training.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if save else "no",
        save_steps=training.save_every,
        save_total_limit=2,
        report_to=[name for name in training.log_to if name != "tensorboard"],
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
        seed=training.seed,
        data_seed=training.seed,
    )


def _curves(history: Sequence[dict[str, Any]]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Return the losses and the evaluations in the Trainer's log."""
    names: tuple[str, ...] = ("step", "loss", "learning_rate", "grad_norm")
    losses = [{name: float(line[name]) for name in names if name in line} for line in history if "loss" in line]
    found = {int(line["step"]): float(line["eval_loss"]) for line in history if "eval_loss" in line}
    return losses, [{"step": step, "loss": loss} for step, loss in sorted(found.items())]
