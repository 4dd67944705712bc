"""One table: rows equal the stages, survive a kill, hold their errors, and share one traversal where that is asked for."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.core import faults
from secateur.core.errors import InputError, PatternError, RecipeError, StateError
from secateur.engine.statistics import LayerStats
from secateur.methods.planners.owl import OWL
from secateur.methods.registry import REGISTRY
from secateur.recipe.compare import compare
from secateur.recipe.comparison import Comparison, spelled_out

TEXT = "builtin:tiny-evaluation"
CALIBRATION = {"calibration": "builtin:tiny-calibration", "samples": 4, "length": 32}
MEASURE = {"perplexity": TEXT, "window": 64, "limit": 4}
KEYS = {"method", "plan", "tuner", "pattern", "sparsity", "perplexity", "seconds", "peak_memory_bytes"}
QUICK = {"name": "ebft", "epochs": 1}


def table(model, output, **settings):
    return compare(model, output=output, **{**CALIBRATION, **MEASURE, "methods": ["magnitude"], **settings})


def values(report):
    return {(r["method"], r["tuner"], r["pattern"]): r["perplexity"].get(TEXT) for r in report["rows"]}


@pytest.fixture(scope="module")
def small(trained_folder, tmp_path_factory):
    """The first two blocks of the trained model, as a folder of their own."""
    model, tokenizer, _ = secateur.load(trained_folder)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    folder = tmp_path_factory.mktemp("small") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own(small, tmp_path_factory):
    """A comparison of two methods, with and without tuning, at two patterns, one of which does not fit."""
    output = tmp_path_factory.mktemp("own") / "table"
    methods = ["wanda", {"name": "sparsegpt", "damping": 0.05}]
    return output, table(small, output, methods=methods, tuner=["none", QUICK], pattern=["60%", "2:5"])


def test_a_row_is_what_prune_and_evaluate_give(own, small, tmp_path):
    found = values(own[1])
    for method, tuner in (("wanda", None), ({"name": "sparsegpt", "damping": 0.05}, QUICK)):
        made = secateur.prune(
            small, method=method, tuner=tuner, pattern="60%", output=tmp_path / str(tuner), **CALIBRATION
        )
        measured = secateur.evaluate(tmp_path / str(tuner), perplexity=TEXT, length=64, limit=4)
        name = method if isinstance(method, str) else method["name"]
        row = next(
            r
            for r in own[1]["rows"]
            if (r["method"], r["tuner"], r["pattern"]) == (name, "none" if tuner is None else "ebft", "60%")
        )
        assert row["perplexity"] == measured["perplexity"]
        assert row["sparsity"] == measured["sparsity"] == pytest.approx(made.report["sparsity"], abs=1e-12)
        assert row["tokens"] == measured["tokens"]
    assert (
        found["dense", "none", None]
        == secateur.evaluate(small, perplexity=TEXT, length=64, limit=4)["perplexity"][TEXT]
    )


def test_the_json_has_the_promised_shape(own):
    report = own[1]
    assert json.loads(json.dumps(report)) == report
    assert json.loads((own[0] / "report.json").read_text()) == report
    assert all(row.keys() >= KEYS for row in report["rows"])
    assert [row["method"] for row in report["rows"]] == ["dense", *["wanda", "sparsegpt"] * 4]
    for row in report["rows"]:
        if row["error"] is None:
            assert row["perplexity"].keys() == {TEXT}
            assert row["seconds"] >= 0
            assert row["peak_memory_bytes"] > 1e6
    assert report["rows"][2]["settings"]["method"]["damping"] == 0.05


def test_a_row_that_fails_holds_its_error_and_the_others_go_on(own):
    rows = [row for row in own[1]["rows"] if row["pattern"] == "2:5"]
    assert len(rows) == own[1]["failed"] == 4
    for row in rows:
        assert row["error_kind"] == "PatternError"
        assert "divisible by 5" in row["error"]
        assert row["perplexity"] == {}


def test_csv_has_a_line_for_every_row(own):
    lines = list(csv.DictReader((own[0] / "rows.csv").read_text().splitlines()))
    assert len(lines) == len(own[1]["rows"])
    for line, row in zip(lines, own[1]["rows"], strict=True):
        assert line["method"] == row["method"]
        assert line[f"perplexity {TEXT}"] == ("" if row["error"] else str(row["perplexity"][TEXT]))
        assert ("divisible by 5" in line["error"]) == (row["pattern"] == "2:5")


class Page(HTMLParser):
    """Collects tags and attributes, and checks that they nest."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_shows_both_plots(own):
    text = (own[0] / "report.html").read_text()
    page = Page(text)
    assert not {tag for tag, _ in page.found} & {"script", "img", "link", "iframe"}
    assert not [a for _, attributes in page.found for a in attributes if a in ("src", "href") or a.startswith("on")]
    assert "://" not in text
    charts = [attributes["aria-label"] for tag, attributes in page.found if tag == "svg" and "aria-label" in attributes]
    assert any("against seconds at 60%" in name for name in charts)
    assert any("against sparsity" in name for name in charts)
    assert "Rows that failed" in text
    assert "Every row is what" in text
    assert (own[0] / "report.md").read_text().count("| wanda |") == 4


def test_nothing_but_the_table_stays(own):
    names = {path.name for path in own[0].iterdir()}
    assert names == {"compare.json", "lock", "report.html", "report.json", "report.md", "rows.csv", "rows.jsonl"}
    assert [path.name for path in own[0].parent.iterdir()] == ["table"]


KILLED = """
import sys
from secateur.cli import main
sys.exit(main(sys.argv[1:]))
"""


def words(model, output, *more):
    given = "--calibration builtin:tiny-calibration --samples 4 --length 32 --window 64 --limit 4 --pattern 50%"
    return ["compare", str(model), *given.split(), "--perplexity", TEXT, "--output", str(output), *more]


def test_a_killed_comparison_goes_on_and_gives_the_same_table(small, tmp_path):
    asked = words(small, tmp_path / "cut", "--methods", "magnitude,wanda")
    run = subprocess.run(
        [sys.executable, "-c", KILLED, *asked],
        env={**os.environ, "SECATEUR_FAULT": "sweep.block:4:kill"},  # the second block of the third row
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    stored = [json.loads(line) for line in (tmp_path / "cut" / "rows.jsonl").read_text().splitlines()]
    assert [row["method"] for row in stored] == ["dense", "magnitude"]
    assert len(list((tmp_path / "cut" / "state").rglob("block-*"))) == 1
    with (tmp_path / "cut" / "rows.jsonl").open("a") as file:
        file.write('{"torn')
    resumed = table(small, tmp_path / "cut", methods=["magnitude", "wanda"], resume=True)
    assert values(resumed) == values(table(small, tmp_path / "whole", methods=["magnitude", "wanda"]))
    assert resumed["rows"][1] == {key: value for key, value in stored[1].items() if key != "key"}
    assert not (tmp_path / "cut" / "state").exists()


@pytest.mark.parametrize("fault", ["shared.block:2:raise", "journal.append:2:raise", "compare.row:3:raise"])
def test_an_interrupted_comparison_on_shared_statistics_goes_on(small, tmp_path, monkeypatch, fault):
    settings = {"methods": ["magnitude", "wanda"], "statistics": "shared", "strict": True}
    faults.forget()
    monkeypatch.setenv("SECATEUR_FAULT", fault)
    with pytest.raises(faults.InjectedError):
        table(small, tmp_path / "cut", **settings)
    monkeypatch.delenv("SECATEUR_FAULT")
    seen = counting(monkeypatch)
    resumed = table(small, tmp_path / "cut", **{**settings, "resume": True})
    assert len(seen) == {"sha": 4, "jou": 8, "com": 0}[fault[:3]]  # four inputs in each block that is done again
    assert values(resumed) == values(table(small, tmp_path / "whole", **settings))


def test_resume_keeps_finished_rows_takes_more_methods_and_does_failed_rows_again(small, tmp_path, monkeypatch):
    first = table(small, tmp_path / "t", pattern=["50%", "2:5"])
    assert first["failed"] == 1
    made = []
    from secateur.recipe import stages

    original = stages.prune

    def counted(*args, **kwargs):
        made.append((kwargs["method"].__class__.__name__, kwargs["pattern"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(stages, "prune", counted)
    second = table(small, tmp_path / "t", methods=["magnitude", "wanda"], pattern=["50%", "2:5"], resume=True)
    assert made == [("Wanda", "50%"), ("Magnitude", "2:5"), ("Wanda", "2:5")]
    assert second["rows"][:2] == first["rows"][:2]
    assert len((tmp_path / "t" / "rows.jsonl").read_text().splitlines()) == 5


def test_resume_with_other_settings_is_refused(small, tmp_path):
    output = tmp_path / "t"
    before = table(small, output, methods=["wanda"])
    with pytest.raises(StateError, match=r"limit: 4 then, 5 now"):
        table(small, output, methods=["wanda"], limit=5, resume=True)
    with pytest.raises(StateError, match=r"calibration\.digest"):
        table(small, output, methods=["wanda"], seed=1, resume=True)
    with pytest.raises(StateError, match="row `wanda, uniform, none, 50%`, which is not asked for"):
        table(small, output, methods=["magnitude"], resume=True)
    with pytest.raises(StateError, match="holds an earlier comparison"):
        table(small, output, methods=["wanda"])
    assert json.loads((output / "report.json").read_text()) == before
    again = table(small, output, methods=["wanda"], limit=5, overwrite=True)
    assert values(again) != values(before)


def test_resume_with_another_hyper_parameter_names_it(small, tmp_path):
    table(small, tmp_path / "t", methods=["sparsegpt"])
    with pytest.raises(StateError, match=r"method.damping: 0.01 then, 0.1 now"):
        table(small, tmp_path / "t", methods=[{"name": "sparsegpt", "damping": 0.1}], resume=True)


def test_a_folder_that_holds_something_else_is_left_alone(small, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.txt").write_text("mine")
    for settings in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(StateError, match="holds no comparison"):
            table(small, tmp_path / "t", **settings)
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["thesis.txt"]


def test_strict_stops_at_the_first_row_that_fails(small, tmp_path):
    with pytest.raises(PatternError, match="divisible by 5"):
        table(small, tmp_path / "t", pattern=["2:5", "50%"], strict=True)
    assert len((tmp_path / "t" / "rows.jsonl").read_text().splitlines()) == 1  # the dense row


@pytest.mark.parametrize("statistics", ["own", "shared"])
def test_a_table_says_what_its_calibration_text_is_warned_of_and_strict_refuses_it(small, tmp_path, statistics):
    text = tmp_path / "text.txt"
    text.write_text("again " * 400)
    settings = {"methods": ["wanda"], "calibration": text, "samples": 2, "statistics": statistics}
    with pytest.raises(StateError, match="samples repeat another"):
        table(small, tmp_path / "t", strict=True, **settings)
    assert not (tmp_path / "t").exists()
    assert any("samples repeat another" in line for line in table(small, tmp_path / "t", **settings)["warnings"])


def test_kept_models_are_those_that_were_measured(small, tmp_path):
    for statistics in ("own", "shared"):
        report = table(small, tmp_path / statistics, methods=["wanda"], keep_models=True, statistics=statistics)
        row = report["rows"][1]
        again = secateur.evaluate(row["model"], perplexity=TEXT, length=64, limit=4)
        assert again["perplexity"] == row["perplexity"]
        AutoModelForCausalLM.from_pretrained(row["model"])
        assert (tmp_path / statistics / "models").is_dir()
        assert not (tmp_path / statistics / "state").exists()


@pytest.mark.parametrize("killed", ["publish.remove:1", "compare.row:2"])
def test_a_kept_model_whose_row_was_cut_off_keeps_what_is_known_of_it(small, tmp_path, monkeypatch, killed):
    settings = {"methods": ["wanda"], "keep_models": True, "strict": True}
    faults.forget()
    monkeypatch.setenv("SECATEUR_FAULT", f"{killed}:raise")
    with pytest.raises(faults.InjectedError):
        table(small, tmp_path / "cut", **settings)
    monkeypatch.delenv("SECATEUR_FAULT")
    resumed, whole = (table(small, tmp_path / name, resume=True, **settings)["rows"][1] for name in ("cut", "whole"))
    assert resumed["layer_loss"] == whole["layer_loss"]
    assert whole["layer_loss"] > 0
    assert resumed["warnings"] == whole["warnings"]
    assert resumed["perplexity"] == whole["perplexity"]
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def counting(monkeypatch):
    """Count the batches that go into statistics."""
    seen = []
    original = LayerStats.update

    def update(self, sparse_x, *args, **kwargs):
        seen.append(sparse_x.shape[:-1].numel())
        return original(self, sparse_x, *args, **kwargs)

    monkeypatch.setattr(LayerStats, "update", update)
    return seen


def test_shared_statistics_take_one_traversal_for_all_rows(small, tmp_path, monkeypatch):
    settings = {"methods": ["wanda", "sparsegpt", "dsnot"], "pattern": ["50%", "2:4"], "statistics": "shared"}
    seen = counting(monkeypatch)
    report = table(small, tmp_path / "t", **settings)
    blocks, inputs = 2, 4  # qkv; o; gate and up; down
    assert len(seen) == blocks * inputs  # one batch, each input counted once, whatever the number of rows
    assert report["failed"] == 0
    assert len(set(values(report).values())) == 7


def test_shared_statistics_equal_prune_where_no_data_is_looked_at_and_one_pass_in_the_first_block(small, tmp_path):
    shared = table(small, tmp_path / "t", methods=["magnitude", "wanda"], statistics="shared", keep_models=True)
    own = table(small, tmp_path / "own", methods=["magnitude", "wanda"])
    assert values(shared)["magnitude", "none", "50%"] == values(own)["magnitude", "none", "50%"]
    assert values(shared)["wanda", "none", "50%"] != values(own)["wanda", "none", "50%"]
    here = AutoModelForCausalLM.from_pretrained(shared["rows"][2]["model"])
    there = secateur.prune(small, method="wanda", sequential=False, **CALIBRATION).model
    for one, other in zip(here.model.layers[0].parameters(), there.model.layers[0].parameters(), strict=True):
        assert torch.equal(one, other)
    assert "is not what" in (tmp_path / "t" / "report.md").read_text()


def test_a_tuned_row_on_shared_statistics_is_tune_after_it(small, tmp_path):
    report = table(small, tmp_path / "t", methods=["wanda"], statistics="shared", tuner=[None, QUICK], keep_models=True)
    sparse = report["rows"][1]["model"]
    secateur.tune(sparse, method=QUICK, teacher=small, output=tmp_path / "tuned", **CALIBRATION)
    measured = secateur.evaluate(tmp_path / "tuned", perplexity=TEXT, length=64, limit=4)
    assert report["rows"][2]["perplexity"] == measured["perplexity"]


def test_a_budget_over_the_whole_model_works_on_shared_statistics(small, tmp_path):
    report = table(small, tmp_path / "t", methods=["magnitude", "wanda"], pattern="60% model", statistics="shared")
    assert report["failed"] == 0
    assert all(row["sparsity"] == pytest.approx(0.6, abs=1e-3) for row in report["rows"][1:])


def test_a_live_model_is_compared_and_left_as_it_was(small, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(small).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(small)
    found = {}
    for statistics in ("own", "shared"):
        report = compare(
            model,
            tokenizer,
            methods="magnitude",
            tuner=[None, QUICK],
            statistics=statistics,
            output=tmp_path / statistics,
            **CALIBRATION,
            **MEASURE,
        )
        assert report["failed"] == 0
        found[statistics] = values(report)
    assert found["own"]["magnitude", "none", "50%"] == found["shared"]["magnitude", "none", "50%"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_methods_of_one_name_are_told_apart(small, tmp_path):
    methods = [{"name": "sparsegpt", "damping": 0.01}, {"name": "sparsegpt", "damping": 0.1}]
    report = table(small, tmp_path / "t", methods=methods)
    assert [row["method"] for row in report["rows"][1:]] == ["sparsegpt (damping=0.01)", "sparsegpt (damping=0.1)"]


def test_a_method_that_breaks_is_a_row_too(small, tmp_path, pruner):
    class Broken(type(pruner)):
        def prune(self, problem):
            raise ZeroDivisionError("a bug")

    for statistics in ("own", "shared"):
        report = table(small, tmp_path / statistics, methods=[Broken(), "magnitude"], statistics=statistics)
        assert report["rows"][1]["error"] == "unexpected ZeroDivisionError: a bug"
        assert report["rows"][2]["error"] is None


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"methods": ["magnitud"]}, RecipeError, "did you mean `magnitude`"),
        ({"methods": ["ebft"]}, RecipeError, "not a pruner"),
        ({"methods": ["wanda"], "calibration": None}, RecipeError, "`calibration` is missing"),
        ({"perplexity": ()}, RecipeError, "`perplexity` is missing"),
        ({"pattern": ["50%", "0.5"]}, RecipeError, "asked for twice"),
        ({"pattern": "150%"}, PatternError, "between 0 and 1"),
        ({"statistics": "some"}, RecipeError, "`own` or `shared`"),
        ({"statistics": "shared", "error_correction": True}, RecipeError, "dense model alone"),
        ({"statistics": "shared", "include": ["lm_head"]}, RecipeError, "dense model alone"),
        ({"perplexity": "nowhere.txt"}, InputError, "nowhere"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(small, tmp_path, settings, kind, words):
    with pytest.raises(kind, match=words):
        table(small, tmp_path / "t", **settings)
    assert not (tmp_path / "t").exists()


def test_settings_of_one_method_reach_that_method_alone():
    asked = Comparison.from_dict(
        {"model": "m", "methods": ["wanda", "sparsegpt", "dsnot"], "tuner": ["none", "ebft"], "perplexity": ["t"]},
        settings=["sparsegpt.damping=0.1", "ebft.epochs=2", "dsnot.base=magnitude"],
    )
    assert asked.methods == ("wanda", {"name": "sparsegpt", "damping": 0.1}, {"name": "dsnot", "base": "magnitude"})
    assert asked.tuner == (None, {"name": "ebft", "epochs": 2})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["sparsgpt.damping=0.1"], "did you mean `sparsegpt`"),
        (["sparsegpt.dampin=0.1"], "did you mean `damping`"),
        (["wanda=1"], "none of the methods"),
    ],
)
def test_settings_of_no_method_are_refused(settings, words):
    with pytest.raises(RecipeError, match=words):
        Comparison.from_dict({"model": "m", "methods": ["wanda", "sparsegpt"], "perplexity": ["t"]}, settings=settings)


@pytest.mark.parametrize("statistics", ["own", "shared"])
def test_plans_are_rows_of_their_own(statistics, small, tmp_path):
    settings = {"methods": ["wanda", "sparsegpt"], "pattern": ["60%"], "statistics": statistics}
    report = table(small, tmp_path / "table", plan=["uniform", {"name": "owl", "spread": 0.05}], **settings)
    assert report["failed"] == 0
    rows = [row for row in report["rows"] if row["method"] != "dense"]
    assert [(row["method"], row["plan"]) for row in rows] == [
        (method, plan) for plan in ("uniform", "owl") for method in ("wanda", "sparsegpt")
    ]
    for uniform, planned in zip(rows[:2], rows[2:], strict=True):
        assert planned["sparsity"] == pytest.approx(uniform["sparsity"], abs=0.01)
        assert planned["perplexity"] != uniform["perplexity"]
    if statistics == "own":
        made = secateur.prune(small, method="wanda", pattern="60%", plan={"name": "owl", "spread": 0.05}, **CALIBRATION)
        assert made.report["sparsity"] == rows[2]["sparsity"]


@pytest.mark.parametrize("statistics", ["own", "shared"])
def test_rows_that_are_planned_alike_share_one_plan_and_each_counts_its_time(statistics, small, tmp_path, monkeypatch):
    made = []

    def plan(self, task, original=OWL.plan):
        made.append(task.budget.scope)
        time.sleep(0.5)
        return original(self, task)

    monkeypatch.setattr(OWL, "plan", plan)
    settings = {"methods": ["sparsegpt", "alps"], "tuner": ["none", {"name": "ebft", "epochs": 1}]}
    report = table(small, tmp_path / "table", plan="owl", pattern=["60%"], statistics=statistics, **settings)
    rows = [row for row in report["rows"] if row["method"] != "dense"]
    assert [row["error"] for row in rows] == [None] * 4
    assert made == ["layer"]
    assert all(row["seconds"] > 0.5 for row in rows)
    assert not list((tmp_path / "table").glob("state"))


def test_all_stands_for_every_pruner_that_is_not_named_beside_it():
    shelf = [entry.name for entry in REGISTRY if entry.kind == "pruner"]
    assert spelled_out("all") == spelled_out(["all"]) == shelf
    assert spelled_out(["wanda", "sparsegpt"]) == ["wanda", "sparsegpt"]
    damped = {"name": "sparsegpt", "damping": 0.1}
    without = [name for name in shelf if name not in ("sparsegpt", "alps")]
    assert spelled_out([damped, "all", "alps"]) == [damped, *without, "alps"]
    asked = Comparison.from_dict(
        {"model": "m", "methods": ["all"], "perplexity": ["t"]}, settings=["alps.iterations=7"]
    )
    assert {"name": "alps", "iterations": 7} in asked.methods
    assert len(asked.methods) == len(shelf)
    with pytest.raises(RecipeError, match="alll"):
        Comparison.from_dict({"model": "m", "methods": ["alll"], "perplexity": ["t"]})
