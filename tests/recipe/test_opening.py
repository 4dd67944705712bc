"""What a call does to a live model that it only looks at: nothing, its modes included."""

from __future__ import annotations

import copy

import pytest
import torch

import secateur
from conftest import TINY_TRAINED
from secateur.core.errors import StateError

CALIBRATION = {"calibration": "builtin:tiny", "samples": 2, "length": 16}
TEXT = {"perplexity": "builtin:tiny", "limit": 1}
CALLS = {
    "compare": {"methods": "wanda", "plan": "owl", "window": 16, **CALIBRATION, **TEXT},
    "evaluate": {"length": 16, **TEXT},
    "suggest": {"minutes": 0.001, "calibration": "builtin:tiny"},
}


@pytest.mark.parametrize("call", CALLS)
def test_a_live_model_that_is_looked_at_keeps_its_modes_and_weights(call, tmp_path):
    model, words, _ = secateur.load(str(TINY_TRAINED))
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    settings = CALLS[call] | ({"output": tmp_path / "table"} if call == "compare" else {})
    if call == "suggest":
        with pytest.raises(secateur.core.errors.RecipeError, match="nothing fits"):
            secateur.suggest(model, words, **settings)
    else:
        getattr(secateur, call)(model, words, **settings)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_live_teacher_keeps_its_modes(tmp_path):
    teacher, words, _ = secateur.load(str(TINY_TRAINED))
    pruned = secateur.prune(teacher, words, method="magnitude").model
    teacher.train()
    secateur.tune(pruned, words, method={"name": "ebft", "epochs": 1}, teacher=teacher, **CALIBRATION)
    assert all(module.training for module in teacher.modules())


@pytest.mark.parametrize("place", ["folder", "file/recipe.yaml"])
def test_a_recipe_that_could_not_be_written_is_refused_before_anything_is_measured(place, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StateError, match="cannot be written"):
        secateur.suggest("no such model", minutes=1, output=tmp_path / place, overwrite=True)
