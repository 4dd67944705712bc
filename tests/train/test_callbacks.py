"""Progress and time limit, called as a trainer calls them."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
import torch

from secateur.train.callbacks import Deadline, LoggedAsAsked, Shown

ARGUMENTS = SimpleNamespace(device=torch.device("cpu"))


class Heard:
    """A `Progress` that remembers."""

    def __init__(self):
        self.said = []

    def start(self, name, total):
        self.said.append(("start", total))
        return 1

    def advance(self, step, count):
        self.said.append(("advance", count))

    def finish(self, step):
        self.said.append(("finish",))


def state(step, total=5):
    return SimpleNamespace(global_step=step, max_steps=total)


def test_progress_begins_where_an_earlier_part_of_the_run_ended():
    heard = Heard()
    shown = Shown(heard)
    shown.on_train_begin(None, state(3), None)
    shown.on_step_end(None, state(4), None)
    shown.on_train_end(None, state(5), None)
    assert heard.said == [("start", 5), ("advance", 3), ("advance", 1), ("finish",)]


@pytest.mark.parametrize(
    ("deadline", "step", "stops"),
    [(math.inf, 1, False), (-math.inf, 1, True), (-math.inf, 5, False)],
    ids=["in time", "too late", "too late for nothing"],
)
def test_time_that_is_over_ends_a_run_that_has_steps_left_with_a_checkpoint(deadline, step, stops):
    over = Deadline(time.monotonic() + deadline)
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    over.on_step_end(ARGUMENTS, state(step), control)
    assert (over.is_over, control.should_save, control.should_training_stop) == (stops, stops, stops)


@pytest.mark.parametrize(("step", "logs"), [(4, False), (5, True)])
def test_the_last_step_is_logged_whatever_its_number(step, logs):
    control = SimpleNamespace(should_log=False)
    LoggedAsAsked().on_step_end(ARGUMENTS, state(step), control)
    assert control.should_log is logs
