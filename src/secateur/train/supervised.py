"""Supervised fine-tuning on TRL's SFTTrainer: what a long run needs beside it, so that it can be trusted.

TRL renders conversations, masks prompts, packs and batches; transformers' Trainer steps, evaluates, logs and writes
checkpoints. Added here: a loss or gradient that is not finite ends the run before it is saved, a checkpoint counts only
once it is whole, a time limit, zeros that stay zero, and nothing of the run is left in the process.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from secateur.core import faults
from secateur.core.errors import InputError, NumericError, RecipeError, ResourceError, did_you_mean, missing_extra
from secateur.core.progress import Progress, Silent
from secateur.core.shards import local
from secateur.data.instructions import Examples
from secateur.train.masking import FixedMasks, KeptOnly
from secateur.train.trainer import KeepZeros, TwoPassTrainer

try:
    import datasets
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("datasets", "trl"):
        raise
    raise missing_extra(str(error.name), "train", "fine-tune models") from error

WHOLE = "whole.json"  # in a checkpoint folder, once everything else is
FIRST = "first-evaluation.json"
PLAIN = "### Instruction:\n{prompt}\n\n### Response:\n"  # of tokenizers without a chat template
Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        steps: of the optimizer; None: as many as `epochs` take.
        epochs: passes over the data; None: as many as `steps` take.
        length: tokens of a sequence; longer ones are cut.
        batch_size: sequences of one forward, on each process.
        accumulation: forwards of one step.
        learning_rate: at its highest.
        schedule: how the rate goes on after the warm-up: `linear` or `cosine` to zero, or `constant`.
        warmup: steps of it, or a fraction of all where it is below 1.
        weight_decay: of AdamW and its kin.
        betas: of AdamW.
        clip: largest norm of a gradient; 0 leaves gradients alone.
        optimizer: `adamw_torch`, `sgd`, ... as transformers calls them.
        completion_only: learn answers, not prompts.
        packing: put several examples into one sequence, none of them seeing another.
        gradient_checkpointing: keep no activations inside blocks, and compute them again in backward.
        bf16: compute in bfloat16 by autocast; None: on GPUs that can.
        evaluate_every: steps between two evaluations; None: only at the ends.
        log_every: steps between two lines of the loss curve.
        save_every: steps between two checkpoints.
        log_to: `tensorboard`, `trackio`, ... as transformers calls them.
        seed: of the order of examples and of dropout.
    """

    steps: int | None = 500
    epochs: float | None = None
    length: int = 1024
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 2e-4
    schedule: Schedule = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    optimizer: str = "adamw_torch"
    completion_only: bool = True
    packing: bool = False
    gradient_checkpointing: bool = False
    bf16: bool | None = None
    evaluate_every: int | None = None
    log_every: int = 10
    save_every: int = 100
    log_to: tuple[str, ...] = ()
    seed: int = 0


@dataclass
class Trained:
    """What came of a run.

    Attributes:
        steps: that were taken, those of earlier parts of a resumed run included.
        losses: `{"step", "loss", "learning_rate", "grad_norm"}` every `log_every` steps.
        evaluations: `{"step", "loss"}`.
        examples: that were trained on: sequences, after packing.
        dropped: examples of which `length` left no token to learn.
        cut: examples whose end was left out because they are longer than `length`.
        cut_tokens: that were left out so.
        tokens: of all forwards of this process in this part of the run.
        finished: False if the time limit ended it.
        notes: what a reader of the report should know.
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
        NumericError: the loss or a gradient is not finite; the last whole checkpoint is kept.
        InputError: no example is left, or nothing is to be trained.
        RecipeError: a setting does not fit the data or the machine.
    """
    check_training(training)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("no weight of the model is to be trained")
    result = Trained()
    if data.answers and not getattr(tokenizer, "chat_template", None):
        result.notes.append(
            "the tokenizer has no chat template, so prompts are written as `### Instruction:` and `### Response:`"
        )
    base: Any = bare(model)
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < training.length:
        training = replace(training, length=positions)  # what is cut then is noted
    _need_end(tokenizer, [data, *([] if evaluation is None else [evaluation])])
    with _undisturbed(), _put_back(model, base, tokenizer), tempfile.TemporaryDirectory() as scratch, _quiet():
        settings = _settings(training, folder or Path(scratch), data, folder is not None, evaluation, device)
        added: list[TrainerCallback] = [_Shown(progress or Silent(), result), *callbacks]
        if folder is not None:
            added.append(_Sealed())
        if masks is not None and not compact:
            added.append(KeepZeros(masks))
        if deadline is not None:
            added.append(_Deadline(deadline, result))
        if "tensorboard" in training.log_to:
            added.append(_tensorboard(logs or (folder or Path(scratch)) / "logs"))
        rows, tested = _dataset(data, tokenizer), None if evaluation is None else _dataset(evaluation, tokenizer)
        try:
            trainer = FineTuner(
                model,
                args=settings,
                train_dataset=rows,
                eval_dataset=tested,
                processing_class=tokenizer,
                callbacks=added,
            )
        except TemplateError as error:
            raise InputError(
                f"the tokenizer's chat template cannot write these conversations: {error}",
                hint="leave out what it refuses, such as `system`, or give the tokenizer another chat template",
            ) from error
        trainer.remove_callback(PrinterCallback)
        trainer.make_compact = masks if compact else None
        trainer.around = around
        result.examples = len(trainer.train_dataset)
        found = trainer.fitted["train"]
        result.dropped, result.cut, result.cut_tokens = found.dropped, found.cut, found.cut_tokens
        result.notes += _notes_on_length(found, len(data.rows), data, training)
        if evaluation is not None:
            result.notes += _notes_on_length(trainer.fitted["eval"], len(evaluation.rows), evaluation, training)
        last = None if folder is None else last_whole(folder)
        try:
            first = None if evaluation is None else _first_loss(trainer, last, folder)
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
            if evaluation is not None and result.finished:
                trainer.evaluate()
        except Exception as error:
            if "No space left on device" not in str(error):  # safetensors and torch say it in classes of their own
                raise
            raise ResourceError(
                f"a checkpoint cannot be written in `{settings.output_dir}`: no space is left on the device",
                hint="free some disk space; --resume goes on from the last whole checkpoint, if there is one",
            ) from error
        result.steps = trainer.state.global_step
        result.tokens = int(trainer._total_train_tokens)
        result.losses, result.evaluations = _curves(trainer.state.log_history, first)
    return result


@dataclass
class _Fitted:
    """What `length` left of the examples."""

    kept: int
    dropped: int
    cut: int
    cut_tokens: int


class FineTuner(TwoPassTrainer, SFTTrainer):
    """TRL's trainer, for two-pass optimizers too, that never takes or saves a step that is not finite."""

    make_compact: FixedMasks | None = None
    around: Callable[[torch.optim.Optimizer, nn.Module], torch.optim.Optimizer] | None = None
    fitted: dict[str, _Fitted]

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Return the token rows; what `max_length` takes from them is counted, also where they are packed."""
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        text, length = "text" in dataset.column_names, int(args.max_length)
        rows = super()._prepare_dataset(dataset, processing_class, whole, False, formatting_func, dataset_name)
        if text and packing:  # all of a long text is learned, piece by piece
            rows = rows.map(_pieces, fn_kwargs={"length": length}, batched=True, remove_columns=rows.column_names)
        labels = rows["labels"]
        learns = [place for place, row in enumerate(labels) if any(label != -100 for label in row[:length])]
        over = [len(labels[place]) - length for place in learns if len(labels[place]) > length]
        if not hasattr(self, "fitted"):
            self.fitted = {}
        self.fitted[dataset_name] = _Fitted(len(learns), len(labels) - len(learns), len(over), sum(over))
        rows = rows.select(learns)
        if not learns:
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
        if self.accelerator.sync_gradients and not self._gradients_are_finite():
            raise self.not_finite("a gradient is NaN or infinite")
        return loss

    def not_finite(self, what: str) -> NumericError:
        """Return the error for a step that cannot be taken."""
        last = last_whole(Path(self.args.output_dir))
        kept = "no checkpoint was written before it" if last is None else f"the last checkpoint, `{last}`, is kept"
        return NumericError(
            f"{what} at step {self.state.global_step + 1} of {self.state.max_steps}; {kept}",
            hint="lower `learning_rate`, raise `warmup`, or look at the data for empty or broken records",
        )

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

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: a checkpoint is for resuming, the published folder says what it is."""

    def _gradients_are_finite(self) -> bool:
        found = [gradient for parameter in self.model.parameters() if isinstance(gradient := parameter.grad, Tensor)]
        norms = torch._foreach_norm([part for part in map(local, found) if part.numel()])
        total = torch.stack([norm.float() for norm in norms]).sum() if norms else torch.zeros(())
        return bool(torch.isfinite(self.accelerator.gather(total.reshape(1).to(self.accelerator.device))).all())


def bare(model: nn.Module) -> nn.Module:
    """Return the transformers model inside PEFT's, or `model` itself."""
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inner


def last_whole(folder: Path) -> Path | None:
    """Return the checkpoint in `folder` with the most steps that was written to its end, or None."""
    found = [
        (int(step), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (step := path.name.removeprefix("checkpoint-")).isdecimal() and (path / WHOLE).is_file()
    ]
    return max(found)[1] if found else None


def check_training(training: Training) -> None:
    """Raise RecipeError for an optimizer, seed or logger that cannot be, InputError for what is not installed."""
    from transformers.training_args import OptimizerNames

    known = sorted(one.value for one in OptimizerNames)
    if training.optimizer not in known:
        raise RecipeError(
            f"`optimizer` is `{training.optimizer}`, which is none{did_you_mean(training.optimizer, known)}",
            hint=f"known: {', '.join(known)}",
        )
    if not 0 <= training.seed < 2**32:
        raise RecipeError(f"`seed` is {training.seed}, but must be from 0 to {2**32 - 1}")
    check_logging(training.log_to)


def check_logging(names: Sequence[str]) -> None:
    """Raise RecipeError for a logger that transformers does not know, InputError for one that is not installed."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known, there = sorted(INTEGRATION_TO_CALLBACK), set(get_available_reporting_integrations())
    for name in names:
        if name not in known:
            raise RecipeError(
                f"`log_to` names `{name}`, which is no logger{did_you_mean(name, known)}",
                hint=f"known: {', '.join(known)}",
            )
        if name not in there:
            raise InputError(f"`log_to` names `{name}`, which is not installed", hint=f"pip install {name}")


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


def _dataset(data: Examples, tokenizer: Any) -> Any:
    """Return the rows as TRL wants them; conversations become text where the tokenizer knows none."""
    rows = list(data.rows)
    if data.answers and not getattr(tokenizer, "chat_template", None):
        rows = [
            {
                "prompt": PLAIN.format(prompt="\n\n".join(message["content"] for message in row["prompt"])),
                "completion": row["completion"][-1]["content"],
            }
            for row in rows
        ]
    return datasets.Dataset.from_list(rows)


def _need_end(tokenizer: Any, sets: Sequence[Examples]) -> None:
    """Raise InputError if the tokenizer has no token for what training has to end or to pad."""
    if tokenizer.eos_token is not None:
        return
    template = bool(getattr(tokenizer, "chat_template", None))
    if tokenizer.pad_token is None or not all(template and one.answers for one in sets):
        raise InputError(
            "the tokenizer has no `eos_token`, so neither the end of a text nor padding could be written",
            hint="set `eos_token` in its tokenizer_config.json",
        )


def _pieces(rows: dict[str, list[list[int]]], length: int) -> dict[str, list[list[int]]]:
    """Return rows of tokens in pieces of at most `length`."""
    return {
        name: [row[start : start + length] for row in rows[name] for start in range(0, len(row), length)]
        for name in ("input_ids", "labels")
    }


def _notes_on_length(found: _Fitted, rows: int, data: Examples, training: Training) -> list[str]:
    """Return what is to be said of examples that `length` cut or left nothing of.

    Raises:
        InputError: it left nothing of any.
    """
    if not found.kept:
        raise InputError(
            f"no example of `{data.source}` has a token to learn within {training.length} tokens", hint="raise `length`"
        )
    notes = []
    if found.dropped:
        notes.append(
            f"{found.dropped} of {rows} examples have no token to learn within {training.length} tokens "
            "and were left out"
        )
    if found.cut:
        more = "" if data.answers else "; `packing` learns all of a long text"
        notes.append(
            f"{found.cut} of {rows} examples of `{data.source}` are longer than {training.length} tokens, and "
            f"{found.cut_tokens:,} tokens at their ends were left out{more}"
        )
    return notes


def _first_loss(trainer: FineTuner, last: Path | None, folder: Path | None) -> float | None:
    """Return the evaluation loss before any training; a resumed run finds it where the first part left it."""
    note = None if folder is None else folder / FIRST
    if last is not None:
        try:
            return float(json.loads((note or last).read_text(encoding="utf-8"))["loss"])
        except (OSError, ValueError, KeyError):
            return None
    loss = float(trainer.evaluate()["eval_loss"])
    if note is not None:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"loss": loss}), encoding="utf-8")
    return loss


def _curves(
    history: Sequence[dict[str, Any]], first: float | None
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Return the losses and the evaluations in the Trainer's log, with the `first` evaluation in front."""
    names: tuple[str, ...] = ("step", "loss", "learning_rate", "grad_norm")
    losses = [{name: float(line[name]) for name in names if name in line} for line in history if "loss" in line]
    found = {} if first is None else {0: first}
    found |= {int(line["step"]): float(line["eval_loss"]) for line in history if "eval_loss" in line}
    return losses, [{"step": step, "loss": loss} for step, loss in sorted(found.items())]


class _Shown(TrainerCallback):  # type: ignore[misc]
    """Tells the steps to a `Progress`."""

    def __init__(self, progress: Progress, result: Trained) -> None:
        self.progress, self.result = progress, result
        self._step: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._step = self.progress.start("fine-tuning", state.max_steps)
        self.progress.advance(self._step, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        faults.hit("train.step")
        if self._step is not None:
            self.progress.advance(self._step, 1)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._step is not None:
            self.progress.finish(self._step)


class _Sealed(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint as whole once all of it is written."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for file in folder.iterdir():
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        faults.hit("train.seal")
        temporary = folder / f"{WHOLE}.tmp"
        temporary.write_text(json.dumps({"step": state.global_step}), encoding="utf-8")
        temporary.rename(folder / WHOLE)


class _Deadline(TrainerCallback):  # type: ignore[misc]
    """Ends the run when its time is over, with a checkpoint to go on from."""

    def __init__(self, deadline: float, result: Trained) -> None:
        self.deadline, self.result = deadline, result

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() > self.deadline and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
            self.result.finished = False


def _tensorboard(folder: Path) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))


@contextmanager
def _put_back(model: nn.Module, base: Any, tokenizer: Any) -> Iterator[None]:
    """Give `model` and `tokenizer` back with the forward, mode and settings that they came with.

    Args:
        model: what is trained, PEFT's around `base` or `base` itself.
        base: the transformers model, whose forward and configuration TRL changes.
        tokenizer: that gets a padding token where it has none.
    """
    before, mode = base.__dict__.get("forward"), model.training
    names = ("pad_token_id", "use_cache", "output_router_logits", "router_aux_loss_coef")
    always = ("pad_token_id", "use_cache")
    config = {name: getattr(base.config, name, None) for name in names if name in always or hasattr(base.config, name)}
    padding = (tokenizer.pad_token, tokenizer.padding_side)
    try:
        yield
    finally:
        if before is None:
            base.__dict__.pop("forward", None)
        else:
            base.forward = before
        for name, value in config.items():
            setattr(base.config, name, value)
        tokenizer.pad_token, tokenizer.padding_side = padding
        model.train(mode)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put the random generators back, which the Trainer seeds for the whole process."""
    python, numbers, cpu = random.getstate(), numpy.random.get_state(), torch.random.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numbers)
        torch.random.set_rng_state(cpu)
        for number, state in enumerate(devices):
            torch.cuda.set_rng_state(state, number)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the bars and remarks of the data sets library off the terminal."""
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    writing = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in ("trl", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # PEFT and TRL use the names that activation checkpointing had before transformers 5.23
            warnings.filterwarnings(
                "ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning
            )
            # PEFT looks for the base model's config.json, which a packed folder or a live model lacks
            warnings.filterwarnings("ignore", message="Could not find a config file", category=UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if writing:
            transformers_logging.enable_progress_bar()
        if shown:
            datasets.utils.logging.enable_progress_bar()
