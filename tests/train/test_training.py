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
