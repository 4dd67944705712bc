from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import RecipeError
from secateur.recipe.settings import change, parse_setting


def changed(data, *settings):
    return change(data, [parse_setting(setting) for setting in settings])


def test_a_path_leads_through_mappings_and_lists():
    data = {"stages": [{"prune": {"samples": 1}}]}
    assert changed(data, "stages.0.prune.samples=64") == {"stages": [{"prune": {"samples": 64}}]}
    assert data == {"stages": [{"prune": {"samples": 1}}]}


def test_a_method_given_by_name_becomes_a_mapping_when_a_field_is_set():
    assert changed({"tuner": "ebft"}, "tuner.epochs=10") == {"tuner": {"name": "ebft", "epochs": 10}}
    assert changed({"method": "dsnot"}, "method.base=wanda", "method.base.x=1") == {
        "method": {"name": "dsnot", "base": {"name": "wanda", "x": 1}}
    }


def test_another_method_does_not_inherit_the_fields_of_the_one_before():
    assert changed({"method": {"name": "sparsegpt", "damping": 1}}, "method=wanda") == {"method": {"name": "wanda"}}


def test_missing_mappings_are_made_and_null_is_one():
    assert changed({"prune": None}, "prune.method.damping=0.1") == {"prune": {"method": {"damping": 0.1}}}


def test_a_segment_in_quotes_may_hold_dots():
    assert changed({}, 'overrides."*.down_proj"=2:4') == {"overrides": {"*.down_proj": "2:4"}}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("samples", "has no `=`"),
        ("=3", "not a path"),
        ("a..b=3", "not a path"),
        ("a.=3", "not a path"),
        ('"a=3', "not a path"),
        ("stages.1.prune=3", "not one of the 1 items"),
        ("stages.x=3", "not one of the 1 items"),
        ("seed.x=3", "`seed` has no parts"),
        (".".join("a" * 40) + "=3", "not a path"),
        ("a={b: 1", "not valid YAML"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(setting, words):
    with pytest.raises(RecipeError, match=words):
        changed({"stages": [{}], "seed": 0}, setting)


names = st.text(st.characters(categories=("L",)), min_size=1, max_size=5)


@settings(max_examples=40)
@given(st.lists(names, min_size=1, max_size=5), st.integers())
def test_a_set_value_is_found_at_its_path(path, value):
    found = changed({}, f"{'.'.join(path)}={value}")
    for name in path:
        found = found[name]
    assert found == value


@settings(max_examples=40)
@given(st.text(max_size=40))
def test_any_text_is_a_setting_or_a_recipe_error(text):
    try:
        place, _ = parse_setting(text)
    except RecipeError:
        return
    assert place
