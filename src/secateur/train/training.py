"""How to fine-tune: the settings of a training, and those that cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from secateur.core.errors import InputError, RecipeError, did_you_mean

Schedule = Literal["linear", "cosine", "constant"]
LEAST = {  # of what is counted
    "steps": 1,
    "length": 2,
    "batch_size": 1,
    "accumulation": 1,
    "evaluate_every": 1,
    "log_every": 1,
    "save_every": 1,
}
MOST = 3.4e38  # of real numbers: what float32 can hold


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


def check_training(training: Training) -> None:
    """Raise RecipeError for a setting that cannot be, InputError for what is not installed."""
    from transformers.training_args import OptimizerNames

    for name, least in LEAST.items():
        value = getattr(training, name)
        if value is not None and not value >= least:
            raise RecipeError(f"`{name}` is {value}, but must be {least} or more")
    for name in ("epochs", "learning_rate", "weight_decay", "warmup", "clip"):
        value, positive = getattr(training, name), name in ("epochs", "learning_rate")
        if value is not None and not (0 <= value <= MOST and (value or not positive)):
            lowest = "above 0" if positive else "of 0 or more"
            raise RecipeError(f"`{name}` is {value}, but must be a number {lowest}, and at most {MOST:g}")
    if len(training.betas) != 2 or not all(0 <= beta < 1 for beta in training.betas):
        raise RecipeError(f"`betas` is {training.betas}, but must be two numbers from 0 to below 1")
    schedules = get_args(Schedule)
    if training.schedule not in schedules:
        raise RecipeError(
            f"`schedule` is `{training.schedule}`, which is none{did_you_mean(training.schedule, schedules)}",
            hint=f"known: {', '.join(schedules)}",
        )
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
