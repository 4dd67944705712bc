"""Plans from the outside: command line, recipes, resume, files, overrides; and that they win quality."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.core.errors import PatternError, RecipeError, SecateurError, StateError
from secateur.methods.planners.owl import OWL
from secateur.models.linears import find_all_linears
from secateur.recipe.schema import Recipe

CALIBRATION = {"calibration": "builtin:tiny-calibration", "samples": 16, "length": 128}
TEXT = "builtin:tiny-evaluation"


@pytest.fixture(scope="module")
def words(trained_folder):
    return AutoTokenizer.from_pretrained(trained_folder)


@pytest.fixture
def model(trained_folder):
    return AutoModelForCausalLM.from_pretrained(trained_folder)


def zeros(model) -> dict[str, int]:
    return {linear.name: int((linear.read() == 0).sum()) for linear in find_all_linears(model)}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def perplexity(model, words) -> float:
    return secateur.evaluate(model, words, perplexity=TEXT, length=128, limit=24)["perplexity"][TEXT]


@pytest.mark.parametrize("plan", ["owl", {"name": "owl", "spread": 0.02}, OWL(spread=0.02)], ids=str)
def test_a_plan_is_a_name_a_mapping_or_an_object(plan, model, words):
    report = secateur.prune(model, words, method="sparsegpt", pattern="70%", plan=plan, **CALIBRATION).report
    assert report["plan"]["name"] == "owl"
    assert report["planned"]["pruned"] == report["planned"]["budget"] == int(0.7 * report["planned"]["size"])
    assert report["sparsity"] == pytest.approx(0.7, abs=1e-5)
    assert report["planned"]["linears"] == {layer["name"]: layer["pattern"] for layer in report["layers"]}
    assert len({layer["sparsity"] for layer in report["layers"]}) > 2
    assert json.loads(json.dumps(report)) == report


def test_plans_win_quality_at_the_same_sparsity(model, words):
    found = {}
    for plan in (None, "owl", "mixed-sparsity", "loss-curves"):
        result = secateur.prune(model, words, method="sparsegpt", pattern="70%", plan=plan, **CALIBRATION)
        assert result.report["sparsity"] == pytest.approx(0.7, abs=2e-3)
        found[plan] = perplexity(result.model, words)
    assert found["loss-curves"] < found["mixed-sparsity"] < found["owl"] < found[None]


def test_a_mixture_of_nm_patterns_wins_at_the_same_sparsity(model, words):
    plain = secateur.prune(model, words, method="wanda", pattern="2:4", **CALIBRATION)
    mixed = secateur.prune(model, words, method="wanda", pattern="2:4", plan="loss-curves", **CALIBRATION)
    assert sum(zeros(mixed.model).values()) == sum(zeros(plain.model).values())
    assert {layer["pattern"] for layer in mixed.report["layers"]} >= {"1:4", "3:4"}
    assert perplexity(mixed.model, words) < perplexity(plain.model, words)


def test_overrides_and_ignored_linears_keep_out_of_the_plan(model, words):
    result = secateur.prune(
        model,
        words,
        method="sparsegpt",
        pattern="60%",
        plan="owl",
        overrides={"*.down_proj": "2:4", "*.o_proj": "dense"},
        ignore=["*.0.self_attn.q_proj"],
        **CALIBRATION,
    )
    planned = result.report["planned"]
    counts = zeros(result.model)
    assert not any(word in name for name in planned["linears"] for word in ("down_proj", "o_proj", "0.self_attn.q"))
    assert sum(counts[name] for name in planned["linears"]) == planned["budget"]
    for linear in find_all_linears(result.model):
        if "down_proj" in linear.name:
            assert counts[linear.name] == linear.read().numel() // 2
        if "o_proj" in linear.name or "0.self_attn.q" in linear.name:
            assert counts[linear.name] == 0


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"pattern": "50% model"}, PatternError, "both divide"),
        ({"overrides": {"*.o_proj": "50% model"}}, PatternError, "both divide"),
        ({"plan": "wanda"}, RecipeError, "`wanda` is a pruner, not a planner"),
        ({"plan": "awl"}, RecipeError, "no planner is called `awl`"),
        ({"plan": {"name": "owl", "spred": 1}}, RecipeError, "`plan.spred` is not a known key"),
        ({"plan": {"name": "owl", "most": 0.4}}, PatternError, "between 0% and 40% fit"),
        ({"overrides": {"Linear": "50%"}}, RecipeError, "no linear is left to plan"),
        ({"method": "magnitude", "calibration": None}, RecipeError, "`calibration` is missing"),
    ],
)
def test_what_cannot_be_planned_is_refused(settings, kind, message, model, words):
    with pytest.raises(kind, match=message):
        secateur.prune(model, words, **{"pattern": "70%", "plan": "owl", **CALIBRATION, **settings})


def test_a_dry_run_plans_nothing_and_tells_the_memory(model, words):
    plain = secateur.prune(model, words, dry_run=True, **CALIBRATION).report
    planned = secateur.prune(model, words, dry_run=True, plan="mixed-sparsity", **CALIBRATION).report
    assert "planned" not in planned
    assert planned["plan"]["name"] == "mixed-sparsity"
    assert planned["planned_memory_bytes"] > plain["planned_memory_bytes"]


def command(folder: Path, output: Path, *extra: str) -> list[str]:
    return [
        sys.executable, "-m", "secateur", "prune", str(folder), "--method", "wanda", "--pattern", "60%", "--plan",
        "loss-curves", "--set", "plan.points=3", "--calibration", "builtin:tiny-calibration", "--samples", "8",
        "--length", "64", "--output", str(output), "--json", *extra,
    ]  # fmt: skip


SETTINGS = {
    "method": "wanda",
    "pattern": "60%",
    "plan": {"name": "loss-curves", "points": 3},
    "calibration": "builtin:tiny-calibration",
    "samples": 8,
    "length": 64,
}


@pytest.fixture(scope="module")
def whole(trained_folder, tmp_path_factory) -> Path:
    """The output of the run of `command`, never interrupted."""
    output = tmp_path_factory.mktemp("whole") / "model"
    secateur.prune(trained_folder, output=output, **SETTINGS)
    return output


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("place", ["plan.rename:1", "sweep.block:2"])
def test_a_killed_run_goes_on_with_the_same_plan(place, whole, trained_folder, tmp_path, monkeypatch):
    output = tmp_path / "killed"
    environment = {**os.environ, "SECATEUR_FAULT": f"{place}:kill"}
    killed = subprocess.run(command(trained_folder, output), env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    if place.startswith("sweep"):  # the stored plan is used: a planner that is asked again would be found out

        def ask(*_):
            raise AssertionError("the plan was made again")

        monkeypatch.setattr("secateur.methods.planners.loss_curves.LossCurves.plan", ask)
    secateur.prune(trained_folder, output=output, resume=True, **SETTINGS)
    assert files(output) == files(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["killed"]


def test_runs_that_plan_alike_share_a_kept_plan(model, words, tmp_path):
    def run(**changes):
        settings = {"pattern": "60%", "plan": "owl", "plans": tmp_path / "plans", **CALIBRATION, **changes}
        return secateur.prune(model, words, **settings).report["planned"]

    first, second, other = run(method="alps"), run(method="sparsegpt"), run(method="alps", pattern="50%")
    assert (first["again"], second["again"], other["again"]) == (False, True, False)
    assert first["seconds"] == second["seconds"] > 0
    assert first["linears"] == second["linears"] != other["linears"]
    assert len(list((tmp_path / "plans").iterdir())) == 2


def test_another_plan_cannot_resume_a_run(trained_folder, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(SecateurError, match="time limit"):
        secateur.prune(trained_folder, output=output, max_minutes=1e-9, **SETTINGS)
    for other in ("owl", {"name": "loss-curves", "points": 4}, None):
        with pytest.raises(StateError, match="plan:"):
            secateur.prune(trained_folder, output=output, resume=True, **{**SETTINGS, "plan": other})
    secateur.prune(trained_folder, output=output, resume=True, **SETTINGS)
    before = files(output)
    again = secateur.prune(trained_folder, output=output, resume=True, **SETTINGS).report
    assert files(output) == before
    assert again["planned"]["pruned"] <= again["planned"]["budget"]
    with pytest.raises(StateError, match="exists"):
        secateur.prune(trained_folder, output=output, resume=True, **{**SETTINGS, "plan": "owl"})


def test_a_recipe_names_a_plan_and_its_fields(trained_folder, tmp_path):
    body = {"prune": {**{k: v for k, v in SETTINGS.items() if k != "plan"}, "plan": {"name": "owl", "spread": 0.05}}}
    recipe = Recipe.from_dict({"model": str(trained_folder), "stages": [body]})
    assert recipe.override(["stages.0.prune.plan=loss-curves"]).resolved()["stages"][0]["prune"]["plan"]["points"] == 9
    changed = recipe.override(["stages.0.prune.plan.spread=0.07"])
    assert changed.resolved()["stages"][0]["prune"]["plan"]["spread"] == 0.07
    assert changed.digest() != recipe.digest()
    with pytest.raises(RecipeError, match="spred"):
        recipe.override(["stages.0.prune.plan.spred=0.07"]).check()
    report = recipe.run(tmp_path / "run")
    stage = report["stages"][0]
    assert stage["plan"]["spread"] == 0.05
    assert stage["planned"]["pruned"] <= stage["planned"]["budget"]
    assert "owl" in (tmp_path / "run" / "report.html").read_text()


def test_a_plan_in_half_precision_is_met_too(trained_folder, words):
    model = AutoModelForCausalLM.from_pretrained(trained_folder, dtype=torch.bfloat16)
    report = secateur.prune(model, words, pattern="60%", plan="loss-curves", **CALIBRATION).report
    assert report["planned"]["pruned"] == report["planned"]["budget"]
