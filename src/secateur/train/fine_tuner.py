"""TRL's trainer as the library runs it: it neither takes nor saves a step that is not finite, and counts what is cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import InputError, NumericError, RecipeError, missing_extra
from secateur.core.shards import local
from secateur.train.checkpoints import last_whole
from secateur.train.fitting import Fitted, fit, pieces
from secateur.train.masking import FixedMasks, KeptOnly
from secateur.train.trainer import TwoPassTrainer
from secateur.train.training import Training

try:
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("datasets", "trl"):
        raise
    raise missing_extra(str(error.name), "train", "fine-tune models") from error


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


def in_words_of_trl(
    training: Training, folder: Path, device: torch.device | None, *, answers: bool, save: bool, evaluate: bool
) -> SFTConfig:
    """Return the settings of a training as TRL has them.

    Args:
        training: how.
        folder: of the checkpoints.
        device: where to train, if not where transformers would.
        answers: whether the examples have answers, which alone may be learned.
        save: whether there are checkpoints.
        evaluate: whether there is something to evaluate on.
    """
    on_cpu = device is not None and device.type == "cpu"
    bf16 = training.bf16
    if bf16 is None:
        bf16 = not on_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    during = evaluate and training.evaluate_every is not None
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
        completion_only_loss=training.completion_only and answers,
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
