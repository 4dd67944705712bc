"""A recipe for so many minutes: the best that fits by measured cost, with its reasons, and one that runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.core.errors import InputError, PatternError, RecipeError, StateError
from secateur.engine.probe import Costs, PlanCost
from secateur.methods.registry import REGISTRY
from secateur.recipe import suggest as suggesting
from secateur.recipe.choice import expected_seconds
from secateur.recipe.expected import BY_COST, ORDER, Option
from secateur.recipe.schema import Recipe
from secateur.recipe.suggest import RESERVE, suggest

ROOT = Path(__file__).parents[2]
TEXT = {"calibration": "builtin:tiny-calibration"}


def costs(**changes) -> Costs:
    """Return round numbers: a millisecond a token, a second to solve a block with the cheapest method, two with the next."""
    names = dict.fromkeys(option.method + (" with refit" if option.refit else "") for option in ORDER)
    solvers = {name: 1.0 + BY_COST.index(name.split()[0]) for name in names}
    found = {"forward": 1e-3, "statistics": {"diag": 1e-4, "gram": 1e-3}, "solvers": solvers, "tuners": {"ebft": 4e-3}}
    found["planners"] = {"loss-curves": PlanCost(outside=2e-3, token=3e-3, block=1.0)}
    return Costs(4, 10**6, tokens=1024, **{**found, **changes})


@pytest.fixture
def measured(monkeypatch):
    """Replaces measuring by known costs; returns a function that sets them."""

    def use(found: Costs) -> None:
        monkeypatch.setattr(suggesting, "probe", lambda *args, **kwargs: found)

    use(costs())
    return use


def test_the_recipe_is_a_file_that_runs(trained_folder, tmp_path):
    target = tmp_path / "recipes" / "mine.yaml"
    found = suggest(trained_folder, pattern="60%", minutes=0.5, output=target, seed=3, **TEXT)
    recipe = Recipe.load(target)
    assert recipe.resolved() == Recipe.from_dict(found["recipe"]).resolved()
    assert json.loads(json.dumps(found))["output"] == str(target)
    assert recipe.seed == 3
    assert [line[2:] for line in target.read_text().splitlines() if line.startswith("# ")] == found["reason"]
    assert found["expected_seconds"] <= 30
    recipe = recipe.override(["stages.0.prune.calibration.samples=2", "stages.0.prune.calibration.length=16"])
    report = recipe.run(tmp_path / "run")
    assert report["stages"][0]["sparsity"] == pytest.approx(0.6, abs=0.01)


def test_measuring_leaves_a_live_model_as_it_was_and_measures_every_part(trained_folder):
    model = AutoModelForCausalLM.from_pretrained(trained_folder).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = suggest(model, AutoTokenizer.from_pretrained(trained_folder), pattern="2:4", minutes=20, **TEXT)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    seen = found["costs"]
    assert seen["forward"] > 0
    assert seen["tuners"]["ebft"] > seen["forward"]
    assert {"magnitude", "wanda", "sparsegpt", "sparsegpt with refit"} <= seen["solvers"].keys()
    assert seen["planners"] == {}  # of N:M patterns
    assert seen["failed"] == {}


def choice(minutes, model, **settings):
    return suggest(model, pattern="60%", minutes=minutes, **TEXT, **settings)


def test_more_minutes_buy_a_better_option_then_more_text_then_more_epochs(trained_folder, measured):
    seen = []
    for minutes in (0.4, 0.6, 4, 10, 30, 200):
        prune = choice(minutes, trained_folder)["recipe"]["stages"][0]["prune"]
        words = prune["calibration"]
        tuner = prune.get("tuner", {})
        place = next(k for k, o in enumerate(ORDER) if (o.method, o.tuner) == (prune["method"], tuner.get("name")))
        seen.append((-place, words["samples"] * words["length"], tuner.get("epochs", 0)))
    assert len({place for place, _, _ in seen}) >= 3
    assert seen == sorted(seen)
    assert seen[-1] == (0, 128 * 256, 10)  # the model takes 256 positions


def test_what_is_expected_adds_up_and_fits_with_a_reserve(trained_folder, measured):
    found = choice(30, trained_folder)
    prune = found["recipe"]["stages"][0]["prune"]
    tokens = prune["calibration"]["samples"] * prune["calibration"]["length"]
    each_token = 1e-3 + 1e-3 + 3 * 1e-3 + prune["tuner"]["epochs"] * 4e-3
    first = next(option for option in ORDER if option.plan is None)
    assert first.tuner == prune["tuner"]["name"]
    assert expected_seconds(first, costs(), tokens, prune["tuner"]["epochs"]) == pytest.approx(
        4 * (tokens * each_token + costs().solvers[first.method])
    )
    assert found["expected_seconds"] <= RESERVE * 30 * 60
    assert all(line["fits"] == (line["why"] == "") for line in found["choices"])


def test_an_option_that_could_not_be_measured_is_passed_over_with_its_reason(trained_folder, measured):
    measured(costs(tuners={}, failed={"ebft": "there was no time left to measure it"}))
    found = choice(30, trained_folder)
    assert "tuner" not in found["recipe"]["stages"][0]["prune"]
    assert any("would be tried before: ebft: there was no time left" in line for line in found["reason"])


PLANNED = next(option for option in ORDER if option.plan is not None)


@pytest.fixture
def plans_first(monkeypatch):
    """Lets the options with a plan be the best."""
    monkeypatch.setattr(suggesting, "ORDER", sorted(ORDER, key=lambda option: option.plan is None))


def test_a_plan_is_part_of_the_recipe_and_of_its_time(trained_folder, measured, plans_first):
    found = choice(30, trained_folder)
    prune = found["recipe"]["stages"][0]["prune"]
    assert prune["plan"] == PLANNED.plan
    assert any("the plan takes about" in line for line in found["reason"])
    tokens = prune["calibration"]["samples"] * prune["calibration"]["length"]
    without = dataclasses.replace(PLANNED, plan=None)
    more = expected_seconds(PLANNED, costs(), tokens, 3) - expected_seconds(without, costs(), tokens, 3)
    assert more == pytest.approx(tokens * (2e-3 + 4 * 3e-3) + 4 * 1.0)


def test_a_plan_that_memory_is_too_small_for_is_passed_over(trained_folder, measured, plans_first, monkeypatch):
    monkeypatch.setattr(suggesting, "available_memory", lambda: 10**6)
    found = choice(30, trained_folder)
    assert "plan" not in found["recipe"]["stages"][0]["prune"]
    assert any("would be tried before: planning needs" in line for line in found["reason"])


@pytest.mark.parametrize("pattern", ["2:4", "60% model"])
def test_no_plan_divides_what_is_divided_already_or_mixes_patterns(trained_folder, measured, plans_first, pattern):
    found = suggest(trained_folder, pattern=pattern, minutes=30, **TEXT)
    assert all(line["plan"] is None for line in found["choices"])


def test_methods_that_are_not_on_the_shelf_are_passed_over(trained_folder, measured, monkeypatch):
    unknown = Option("not-yet-written", None, False, None, "papers", "a claim")
    monkeypatch.setattr(suggesting, "ORDER", (unknown, *ORDER))
    assert "not-yet-written" not in {line["method"] for line in choice(30, trained_folder)["choices"]}


def test_a_budget_over_the_whole_model_is_given_to_methods_that_rank_weights(trained_folder, measured):
    found = suggest(trained_folder, pattern="60% model", minutes=30, **TEXT)
    assert found["recipe"]["stages"][0]["prune"]["pattern"] == "60% model"
    assert all(hasattr(REGISTRY.find(line["method"]).load(), "score") for line in found["choices"])


def test_an_evaluation_is_part_of_the_recipe_and_of_its_time(trained_folder, measured):
    plain = choice(30, trained_folder)
    found = choice(30, trained_folder, perplexity="builtin:tiny-evaluation")
    assert found["recipe"]["stages"][1]["evaluate"] == {
        "perplexity": "builtin:tiny-evaluation",
        "length": 256,
        "limit": 20,
    }
    assert len(plain["recipe"]["stages"]) == 1


def test_a_model_too_large_for_main_memory_waits_on_disk(trained_folder, measured, monkeypatch):
    assert "offload" not in choice(30, trained_folder)["recipe"]
    monkeypatch.setattr(suggesting, "available_memory", lambda: 10**6)
    assert choice(30, trained_folder)["recipe"]["offload"] == "disk"


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"minutes": 0.001}, RecipeError, "nothing fits in 0.001 minutes.*needs about"),
        ({"minutes": 0}, RecipeError, "must be a positive number"),
        ({"minutes": float("nan")}, RecipeError, "must be a positive number"),
        ({"pattern": "2:5"}, PatternError, "divisible by 5"),
        ({"calibration": "nowhere.txt"}, InputError, "nowhere"),
    ],
)
def test_what_cannot_be_suggested_is_an_error_and_writes_nothing(
    trained_folder, measured, tmp_path, settings, kind, words
):
    with pytest.raises(kind, match=words):
        suggest(trained_folder, output=tmp_path / "r.yaml", **{"pattern": "60%", "minutes": 5, **TEXT, **settings})
    assert not list(tmp_path.iterdir())


def test_a_text_too_short_for_any_calibration_is_refused(trained_folder, measured, tmp_path):
    (tmp_path / "short.txt").write_text("a few words " * 20)
    with pytest.raises(InputError, match="least calibration is 16 samples of 256"):
        suggest(trained_folder, pattern="60%", minutes=5, calibration=tmp_path / "short.txt")


def test_a_file_that_is_there_is_replaced_only_if_asked(trained_folder, measured, tmp_path):
    (tmp_path / "r.yaml").write_text("mine")
    with pytest.raises(StateError, match="exists"):
        choice(5, trained_folder, output=tmp_path / "r.yaml")
    assert (tmp_path / "r.yaml").read_text() == "mine"
    choice(5, trained_folder, output=tmp_path / "r.yaml", overwrite=True)
    Recipe.load(tmp_path / "r.yaml")


def results(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "benchmarks/results" / name).read_text().splitlines()]


def test_the_order_agrees_with_the_results_that_it_cites():
    lines = [
        {**line, "method": line["case"].partition(":")[0], "pattern": pattern, "plan": "uniform"}
        | {"tuner": (line["tuner"] or {}).get("name", "none")}
        for line in results("quality-smollm2.jsonl")
        for pattern in ("70%", "2:4")
        if line["case"].startswith(f"{line['case'].partition(':')[0]}:{pattern}")
    ] + [
        {**line, "perplexity": next(iter(line["perplexity"].values()))} for line in results("compare-own-smollm2.jsonl")
    ]
    measured = [option for option in ORDER if option.source == "measured"]
    assert len(measured) >= 4
    for pattern in ("70%", "2:4"):
        found = []
        for option in measured:
            wanted = (option.method, pattern, option.plan or "uniform", option.tuner or "none")
            values = [
                line["perplexity"]
                for line in lines
                if (line["method"], line["pattern"], line["plan"], line["tuner"]) == wanted
            ]
            found += [min(values)] if values else []
        assert len(found) >= 4
        assert found == sorted(found), pattern


def test_every_option_has_a_place_among_the_costs():
    assert {option.method for option in ORDER} <= set(BY_COST)
    assert len({(o.method, o.tuner, o.refit, o.plan) for o in ORDER}) == len(ORDER)
