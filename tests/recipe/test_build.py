from __future__ import annotations

import json

import pytest

from secateur.core.errors import RecipeError
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
