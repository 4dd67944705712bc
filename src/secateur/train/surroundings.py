"""What a training by somebody else's library would leave changed in the process, and is put back."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import nn
from transformers.utils import logging as transformers_logging


@contextmanager
def put_back(model: nn.Module, base: Any, tokenizer: Any) -> Iterator[None]:
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
def undisturbed() -> Iterator[None]:
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
def quietly() -> Iterator[None]:
    """Keep the bars and remarks of the libraries off the terminal."""
    import datasets

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
