from __future__ import annotations

import inspect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import PatternError, RecipeError, ResourceError
from secateur.recipe.schema import STAGES, Recipe


def one(kind, /, **arguments):
    return {"model": "m", "stages": [{kind: arguments}]}


def refusal(data) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(data)
    return str(caught.value)


def test_every_stage_argument_is_one_of_its_function_with_the_same_default():
    from secateur.recipe import stages

    for kind, model in STAGES.items():
        parameters = inspect.signature(getattr(stages, kind)).parameters
        for name, field in model.model_fields.items():
            assert name in parameters, f"{kind} has no `{name}`"
            if name not in ("offload", "seed"):  # None here takes the recipe's
                assert field.default == parameters[name].default, f"{kind}.{name}"


def test_a_minimal_recipe_has_every_default():
    step = Recipe.from_dict({"model": "m", "stages": [{"prune": None}]}).steps()[0]
    assert step.kind == "prune"
    assert step.arguments["method"] == "sparsegpt"
    assert step.arguments["pattern"] == "50%"
    assert (step.arguments["seed"], step.arguments["offload"]) == (0, "ram")


def test_what_the_recipe_says_for_all_stages_yields_to_a_stage():
    recipe = Recipe.from_dict(
        {"model": "m", "seed": 3, "device": "cpu", "stages": [{"prune": {}}, {"tune": {"seed": 5}}, {"evaluate": {}}]}
    )
    prune, tune, evaluate = (step.arguments for step in recipe.steps())
    assert (prune["seed"], tune["seed"]) == (3, 5)
    assert "seed" not in evaluate
    assert evaluate["device"] == "cpu"


@pytest.mark.parametrize(
    ("word", "value", "name", "meaning"),
    [
        ("nsamples", 7, "samples", 7),
        ("num_calibration_samples", 7, "samples", 7),
        ("seqlen", 64, "length", 64),
        ("max_seq_length", 64, "length", 64),
        ("dataset", "c4", "calibration", "c4"),
        ("sparsity", 0.7, "pattern", "70%"),
        ("sparsity", "50%", "pattern", "50%"),
    ],
)
def test_words_of_other_libraries_are_understood(word, value, name, meaning):
    assert Recipe.from_dict(one("prune", **{word: value})).steps()[0].arguments[name] == meaning


def test_a_synonym_beside_its_meaning_is_refused():
    assert "`stages.0.prune.nsamples` is another word for `samples`" in refusal(one("prune", samples=1, nsamples=2))


def test_calibration_may_be_a_mapping():
    nested = Recipe.from_dict(one("prune", calibration={"text": "c4", "nsamples": 8, "seqlen": 64, "field": "body"}))
    flat = Recipe.from_dict(one("prune", calibration="c4", samples=8, length=64, field="body"))
    assert nested.steps() == flat.steps()
    assert "has `samples` twice" in refusal(one("prune", samples=1, calibration={"samples": 2}))


def test_targets_of_other_libraries_are_accepted_only_where_they_mean_all_linears():
    assert Recipe.from_dict(one("prune", targets=["Linear"])).steps() == Recipe.from_dict(one("prune")).steps()
    assert "`targets` other than" in refusal(one("prune", targets=["re:.*mlp.*"]))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"stages": [{"prune": {}}]}, "`model` is missing"),
        ({"model": "m"}, "`stages` is missing"),
        ({"model": "m", "stages": []}, "at least one stage"),
        ({"model": "", "stages": [{"prune": {}}]}, "`model` should have at least 1 character"),
        ({"model": "m", "modle": 1, "stages": [{"prune": {}}]}, "`modle` is not a known key (did you mean `model`"),
        ({"model": "m", "stages": [{"distil": {}}]}, "`stages.0.distil` is not a known key"),
        ({"model": "m", "stages": [{"prune": {}, "tune": {}}]}, "exactly one stage, has `prune`, `tune`"),
        ({"model": "m", "stages": [{}]}, "exactly one stage, has none"),
        ({"model": "m", "stages": ["prune"]}, "`stages.0` should be a mapping, got 'prune'"),
        ({"model": "m", "stages": {"prune": {}}}, "`stages` should be a list"),
        ({"model": "m", "seed": -1, "stages": [{"prune": {}}]}, "`seed` should be greater than or equal to 0, got -1"),
        ({"model": "m", "seed": True, "stages": [{"prune": {}}]}, "`seed` should be a valid integer, got True"),
        ({"model": "m", "memory_limit": "lots", "stages": [{"prune": {}}]}, "size such as `6GB`"),
        ({"model": "m", "revision": "../x", "stages": [{"prune": {}}]}, "`revision` should match"),
        (one("prune", samples="8"), "`stages.0.prune.samples` should be a valid integer, got '8'"),
        (one("prune", samples=0), "greater than or equal to 1"),
        (one("prune", patern="2:4"), "did you mean `pattern`"),
        (one("prune", method="wandaa"), "no pruner is called `wandaa` (did you mean `wanda`?)"),
        (one("prune", method="ebft"), "`ebft` is a block tuner, not a pruner"),
        (one("prune", method="../../etc/passwd"), "no pruner is called"),
        (one("prune", method="os:system"), "no pruner is called"),
        (one("prune", tuner={"epochs": 3}), "`stages.0.prune.tuner`: needs a `name`"),
        (one("prune", ignore=[3]), "`stages.0.prune.ignore.0`"),
        (one("prune", dtype="int8"), "'float32', 'bfloat16', 'float16' or 'float64'"),
        (one("prune", device="gpu"), "`stages.0.prune.device` should match"),
        (one("prune", offload="tape"), "'ram' or 'disk'"),
        (one("evaluate", label="a/../b"), "`stages.0.evaluate.label` should match"),
        (one("export", format="zip"), "'checkpoint' or 'bitmask'"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(data, words):
    assert words in refusal(data)


@pytest.mark.parametrize("pattern", ["150%", "nan", -0.1, "4:2", "2:0", "70% column", "half", True, None, [2, 4]])
def test_a_wrong_pattern_is_a_pattern_error(pattern):
    with pytest.raises(PatternError, match="pattern"):
        Recipe.from_dict(one("prune", pattern=pattern))


def test_an_override_is_a_pattern_or_dense():
    overrides = Recipe.from_dict(one("prune", overrides={"a": None, "b": "dense", "c": 0.7})).steps()[0].arguments
    assert overrides["overrides"] == {"a": "dense", "b": "dense", "c": "70%"}
    with pytest.raises(PatternError, match=r"overrides\.a"):
        Recipe.from_dict(one("prune", overrides={"a": "150%"}))


def test_all_mistakes_of_a_file_come_together_each_with_its_place(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: m\nsede: 1\nstages:\n  - prune:\n      sampels: 3\n      calibration: {text: x, seqlen: 0}\n"
    )
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert f"{path}:2:1: `sede` is not a known key" in str(caught.value)
    assert f"{path}:5:7: `stages.0.prune.sampels` is not a known key (did you mean `samples`" in str(caught.value)
    assert f"{path}:6:30:" in str(caught.value)


def test_no_more_than_twenty_mistakes_are_shown():
    lines = refusal({"model": "m", "stages": [{"prune": {}}], **{f"key{k}": 1 for k in range(30)}}).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and 10 more mistakes"


@pytest.mark.parametrize("text", ["", "[]", "just words", "- a"])
def test_a_file_that_is_no_mapping_is_refused(text, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        Recipe.load(path)


def test_overrides_change_the_recipe_and_are_named_in_errors():
    recipe = Recipe.from_dict(one("prune", method="sparsegpt"))
    other = recipe.override(["stages.0.prune.pattern=2:4", "stages.0.prune.method.damping=0.5", "seed=7"])
    arguments = other.steps()[0].arguments
    assert (arguments["pattern"], arguments["seed"]) == ("2:4", 7)
    assert arguments["method"] == {"name": "sparsegpt", "damping": 0.5}
    assert recipe.steps()[0].arguments["pattern"] == "50%"
    with pytest.raises(RecipeError, match=r"--set stages\.0\.prune\.samples=0: .* got 0"):
        recipe.override(["stages.0.prune.samples=0"])


def test_environment_variables_are_taken_literally(monkeypatch):
    monkeypatch.setenv("HOME", "/elsewhere")
    assert Recipe.from_dict({"model": "$HOME/~/m", "stages": [{"prune": {}}]}).model == "$HOME/~/m"


def test_the_resolved_recipe_has_every_default_of_its_methods_and_resolves_to_itself():
    recipe = Recipe.from_dict(one("prune", method={"name": "dsnot", "base": "sparsegpt"}, tuner="ebft"))
    resolved = recipe.resolved()
    body = resolved["stages"][0]["prune"]
    assert body["method"]["base"]["damping"] == 0.01
    assert body["tuner"]["name"] == "ebft"
    assert "epochs" in body["tuner"]
    again = Recipe.from_dict(resolved)
    assert again.resolved() == resolved
    assert again.digest() == recipe.digest()


def test_the_digest_is_of_the_meaning_not_of_the_spelling():
    digest = Recipe.from_dict(one("prune", pattern="50%", method="sparsegpt")).digest()
    assert Recipe.from_dict({**one("prune", sparsity=0.5), "title": "x"}).digest() == digest
    assert Recipe.from_dict(one("prune", pattern="51%")).digest() != digest
    assert Recipe.from_dict(one("prune", method={"name": "sparsegpt", "percdamp": 0.02})).digest() != digest


def test_a_saved_recipe_loads_equal(tmp_path):
    recipe = Recipe.from_dict(one("prune", pattern="2:4", overrides={"*.q_proj": "dense", "re:.*": 0.3}))
    recipe.save(tmp_path / "saved.yaml")
    loaded = Recipe.load(tmp_path / "saved.yaml")
    assert loaded.resolved() == recipe.resolved()
    assert [path.name for path in tmp_path.iterdir()] == ["saved.yaml"]
    with pytest.raises(ResourceError):
        recipe.save(tmp_path / "missing" / "saved.yaml")


def test_check_names_the_line_of_a_wrong_hyper_parameter(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: m\nstages:\n  - prune:\n      method: {name: sparsegpt, dampng: 1, block_size: -1}\n"
        "  - tune:\n      method: {name: ebft, epochs: x}\n"
    )
    recipe = Recipe.load(path)
    with pytest.raises(RecipeError) as caught:
        recipe.check()
    found = str(caught.value)
    assert f"{path}:4:7: `method.dampng` is not a known key (did you mean `damping`" in found
    assert "`method.block_size`" in found
    assert f"{path}:6:7: `method.epochs`" in found


@pytest.mark.parametrize(
    ("words", "count"), [("6GB", 6 * 10**9), ("512MiB", 2**29), ("1.5 gb", 15 * 10**8), (4096, 4096)]
)
def test_memory_is_given_in_bytes_or_with_a_unit(words, count):
    assert Recipe.from_dict({"model": "m", "memory_limit": words, "stages": [{"prune": {}}]}).memory_limit == count


@settings(max_examples=30)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "method": st.sampled_from(["wanda", "magnitude", {"name": "sparsegpt", "damping": 0.1}]),
            "pattern": st.sampled_from(["2:4", "70%", 0.5, "30% row", "1:1"]),
            "samples": st.integers(1, 10**6),
            "length": st.integers(2, 10**6),
            "ignore": st.lists(st.sampled_from(["lm_head", "*.q_proj", "re:.*"]), max_size=3),
            "refit": st.booleans(),
            "seed": st.integers(0, 2**63 - 1),
        },
    )
)
def test_a_recipe_survives_the_round_trip_through_its_file(tmp_path_factory, arguments):
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    recipe = Recipe.from_dict(one("prune", **arguments))
    recipe.save(path)
    assert Recipe.load(path).digest() == recipe.digest()
