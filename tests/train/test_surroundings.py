"""What a training changes in the process, put back also when it fails."""

from __future__ import annotations

import contextlib
import logging
import random
from types import SimpleNamespace

import datasets
import numpy
import torch

from conftest import random_llama
from secateur.train.surroundings import put_back, quietly, undisturbed


def generators():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()


def test_random_generators_are_put_back():
    before = generators()
    with contextlib.suppress(KeyError), undisturbed():
        random.seed(7)
        numpy.random.seed(7)
        torch.manual_seed(7)
        raise KeyError
    assert generators() == before


def test_forward_mode_configuration_and_padding_are_put_back():
    model = random_llama().eval()
    words = SimpleNamespace(pad_token=None, padding_side="left")
    before = model.config.to_dict()
    with contextlib.suppress(KeyError), put_back(model, model, words):
        model.forward = lambda *args, **kwargs: None
        model.train()
        model.config.use_cache, model.config.pad_token_id = False, 3
        words.pad_token, words.padding_side = "end", "right"
        raise KeyError
    assert model.config.to_dict() == before
    assert not model.training
    assert "forward" not in vars(model)
    assert (words.pad_token, words.padding_side) == (None, "left")


def test_bars_and_levels_of_the_libraries_are_put_back():
    shown, level = datasets.utils.logging.is_progress_bar_enabled(), logging.getLogger("trl").level
    with quietly():
        assert not datasets.utils.logging.is_progress_bar_enabled()
        assert logging.getLogger("trl").level == logging.ERROR
    assert datasets.utils.logging.is_progress_bar_enabled() == shown
    assert logging.getLogger("trl").level == level
