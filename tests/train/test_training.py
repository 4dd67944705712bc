"""Settings of a training that cannot be, refused before anything is loaded."""

from __future__ import annotations

import pytest

from secateur.core.errors import InputError, RecipeError
from secateur.train.training import Training, check_logging, check_training


def test_the_defaults_can_be():
    check_training(Training())
    check_training(Training(optimizer="sgd", seed=2**32 - 1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": "adamw"}, "`optimizer` is `adamw`"),
        ({"seed": -1}, "`seed` is -1"),
        ({"seed": 2**32}, "`seed` is 4294967296"),
        ({"steps": 0}, "`steps` is 0, but must be 1 or more"),
        ({"steps": None, "epochs": 0.0}, "`epochs` is 0.0, but must be a number above 0"),
        ({"steps": None, "epochs": float("nan")}, "`epochs` is nan"),
        ({"length": 1}, "`length` is 1, but must be 2 or more"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"accumulation": 0}, "`accumulation` is 0"),
        ({"evaluate_every": 0}, "`evaluate_every` is 0"),
        ({"log_every": 0}, "`log_every` is 0"),
        ({"save_every": -1}, "`save_every` is -1"),
        ({"learning_rate": 0.0}, "`learning_rate` is 0.0, but must be a number above 0"),
        ({"learning_rate": 1e39}, "above 0, and at most 3.4e"),
        ({"learning_rate": float("inf")}, "`learning_rate` is inf"),
        ({"warmup": float("nan")}, "`warmup` is nan, but must be a number of 0 or more"),
        ({"weight_decay": -0.1}, "`weight_decay` is -0.1"),
        ({"clip": -1.0}, "`clip` is -1.0"),
        ({"betas": (0.9,)}, "`betas` is"),
        ({"betas": (0.9, 1.0)}, "`betas` is"),
        ({"schedule": "cosin"}, "did you mean `cosine`"),
        ({"log_to": ("tensorbord",)}, "did you mean `tensorboard`"),
    ],
)
def test_what_cannot_be_is_named(settings, said):
    with pytest.raises(RecipeError, match=said):
        check_training(Training(**settings))


def test_a_logger_that_is_not_installed_is_an_error_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", list)
    with pytest.raises(InputError, match="not installed") as caught:
        check_logging(["wandb"])
    assert caught.value.hint == "pip install wandb"
