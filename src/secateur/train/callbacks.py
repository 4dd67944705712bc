"""What is called at the steps of a training: its progress, its time limit, and TensorBoard."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from secateur.core import faults
from secateur.core.progress import Progress
from secateur.train.sharding import in_any_process


class Shown(TrainerCallback):  # type: ignore[misc]
    """Tells the steps to a `Progress`."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._step: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say how many steps there are, and how many of them are done."""
        self._step = self.progress.start("fine-tuning", state.max_steps)
        self.progress.advance(self._step, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count a step."""
        faults.hit("train.step")
        if self._step is not None:
            self.progress.advance(self._step, 1)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say that it is over."""
        if self._step is not None:
            self.progress.finish(self._step)


class LoggedAsAsked(TrainerCallback):  # type: ignore[misc]
    """Logs as often as is asked for now where a run goes on, and its last step; transformers does as its checkpoint says."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the steps between two lines of the log from the settings."""
        state.logging_steps = args.logging_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have the last step logged whatever its number, so that the last loss of a curve is that of the result."""
        if state.global_step >= state.max_steps:
            control.should_log = True


class Deadline(TrainerCallback):  # type: ignore[misc]
    """Ends the run when its time is over, in all processes at the same step, with a checkpoint to go on from.

    Args:
        deadline: of `time.monotonic`.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.is_over = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the clock; the last step has nothing left to stop."""
        if state.global_step < state.max_steps and in_any_process(time.monotonic() > self.deadline, args.device):
            control.should_save = True
            control.should_training_stop = True
            self.is_over = True


def tensorboard(folder: Path) -> TrainerCallback:
    """Return transformers' callback with a writer into `folder`."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))
