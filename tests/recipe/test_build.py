from __future__ import annotations

import json

import pytest
import torch

import secateur
from secateur.core.contracts import Plan
from secateur.core.errors import RecipeError, StateError
from secateur.core.pattern import Unstructured
from secateur.methods.registry import REGISTRY
from secateur.recipe.build import build_method, describe, fields_of

ENTRIES = [entry for entry in REGISTRY if entry.kind in ("pruner", "block tuner", "planner")]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_method_is_built_by_name_and_described_back(entry):
    built = build_method(entry.name, entry.kind)
    words = describe(built)
    assert words["name"] == entry.name
    assert json.loads(json.dumps(words)) == words
    assert build_method(words, entry.kind) == built
    assert set(fields_of(entry)) == set(words) - {"name"}


def test_a_nested_method_is_a_name_a_mapping_or_fields_of_the_default():
    assert describe(build_method({"name": "dsnot", "base": "magnitude"}, "pruner"))["base"]["name"] == "magnitude"
    base = describe(build_method({"name": "dsnot", "base": {"name": "sparsegpt", "percdamp": 0.3}}, "pruner"))["base"]
    assert base["damping"] == 0.3
    default = describe(build_method("dsnot", "pruner"))["base"]
    assert describe(build_method({"name": "dsnot", "base": {}}, "pruner"))["base"] == default


@pytest.mark.parametrize("word", ["percdamp", "dampening_frac"])
def test_words_of_other_libraries_are_understood(word):
    assert build_method({"name": "sparsegpt", word: 0.2}, "pruner").damping == 0.2
    with pytest.raises(RecipeError, match="twice"):
        build_method({"name": "sparsegpt", word: 0.2, "damping": 0.1}, "pruner")


@pytest.mark.parametrize("settings", [{"r": 4, "rank": 4}, {"rank": 4, "r": 4}, {"rank": 4, "r": 8}])
def test_a_setting_under_two_words_is_refused_by_both_whichever_comes_first(settings):
    assert build_method({"name": "masked_lora", "rank": 4, "alpha": 3}, "adapter").lora_alpha == 3
    one, two = settings
    with pytest.raises(RecipeError, match=f"`r` of masked_lora twice, as `{one}` and as `{two}`"):
        build_method({"name": "masked_lora", **settings}, "adapter")


def test_an_object_passes_through():
    built = build_method("wanda", "pruner")
    assert build_method(built, "pruner") is built


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("wandaa", "no pruner is called `wandaa` (did you mean `wanda`?)"),
        ("ebft", "`ebft` is a block tuner, not a pruner"),
        ({"damping": 1}, "`method` needs a `name`"),
        ({"name": "sparsegpt", "dampng": 1}, "`method.dampng` is not a known key (did you mean `damping`?)"),
        ({"name": "sparsegpt", "damping": "x"}, "`method.damping` should be a valid number"),
        ({"name": "dsnot", "base": "ebft"}, "`ebft` is a block tuner, not a pruner"),
        ({"name": "dsnot", "base": {"name": "sparsegpt", "dampng": 1}}, "`method.base.dampng`"),
        (None, "`method` should be a pruner, got NoneType"),
        (3, "`method` should be a pruner, got int"),
    ],
)
def test_a_method_that_cannot_be_built_is_named(spec, words):
    with pytest.raises(RecipeError) as caught:
        build_method(spec, "pruner")
    assert words in str(caught.value)


def test_an_object_of_another_kind_is_refused():
    with pytest.raises(RecipeError, match="`tuner` is `wanda`, a pruner"):
        build_method(build_method("wanda", "pruner"), "block tuner", where="tuner")


def test_a_method_that_is_not_on_the_shelf_works_and_is_described_by_its_class(pruner):
    assert build_method(pruner, "pruner") is pruner
    assert describe(pruner)["name"].endswith("GramScaled")


class Own:
    """A planner of somebody's own, which is no dataclass."""

    copies, backward = 0, False

    def __init__(self, **state):
        vars(self).update(state)

    def plan(self, task):
        """Give every second linear a little less."""
        names = [linear.name for linear in task.budget.linears]
        return Plan({name: Unstructured(self.low if place % 2 else 0.5) for place, name in enumerate(names)})


def test_methods_of_ones_own_are_told_apart_by_what_they_hold():
    long = torch.zeros(5000)
    other = long.clone()
    other[2500] = 1e-3
    half, alike = long.bfloat16(), long.to(torch.float16)
    module = torch.nn.Linear(2, 2)
    states = [0.1, 0.3, None, [long], [other], {"a": half}, {"a": alike}, long.numpy(), other.numpy(), module]
    words = [describe(Own(state=state)) for state in states]
    assert all(one != two for place, one in enumerate(words) for two in words[:place])
    before = describe(Own(state=module))
    with torch.no_grad():
        module.weight[0, 0] += 1.0
    assert describe(Own(state=module)) != before
    assert describe(Own(state=[other.clone()])) == words[4]
    assert json.loads(json.dumps(words)) == words


def test_a_method_that_lacks_what_is_read_of_it_is_refused_by_name():
    class Bare:
        def plan(self, task):
            """Say nothing of memory."""

    with pytest.raises(RecipeError, match="`plan` is a Bare without `copies`") as caught:
        build_method(Bare(), "planner", where="plan")
    assert "`backward`" in caught.value.hint


@pytest.mark.parametrize("statistics", ["own", "shared"])
def test_two_planners_of_ones_own_do_not_share_a_plan(statistics, trained_folder, tmp_path):
    settings = {"methods": "magnitude", "calibration": "builtin:tiny", "samples": 2, "length": 16, "window": 16}
    settings |= {"perplexity": "builtin:tiny", "limit": 1, "statistics": statistics, "output": tmp_path / "table"}
    both = secateur.compare(str(trained_folder), plan=[Own(low=0.1), Own(low=0.4)], **settings)["rows"]
    assert [row["error"] for row in both] == [None] * 3
    assert both[1]["sparsity"] < both[2]["sparsity"]
    with pytest.raises(StateError):
        secateur.compare(str(trained_folder), plan=[Own(low=0.1), Own(low=0.2)], resume=True, **settings)


def test_plans_are_not_shared_between_dtypes(trained_folder, tmp_path):
    settings = {"method": "magnitude", "calibration": "builtin:tiny", "samples": 2, "length": 16}
    for dtype in ("float32", "bfloat16", "float32"):
        secateur.prune(str(trained_folder), plan=Own(low=0.1), plans=tmp_path, dtype=dtype, **settings)
    assert len(list(tmp_path.iterdir())) == 2
