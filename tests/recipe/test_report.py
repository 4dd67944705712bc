from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser

import pytest

from secateur.core.errors import ResourceError
from secateur.recipe.charts import Bar, Cell, Pair, bars, grid, levels, pairs
from secateur.recipe.headline import headline, measured
from secateur.recipe.report import write_report

EVIL = '"><script src="https://example.org/x.js"></script><img src=x onerror=alert(1)> | `a` *b* [c](d)'


def evaluated(label, value, **more):
    return {
        "stage": "evaluate",
        "model": "m",
        "label": label,
        "perplexity": {"text": value},
        "tokens": {"text": 100},
        "tasks": {},
        "sparsity": 0.0 if label == "dense" else 0.7,
        "seconds": 2.0,
        "peak_memory_bytes": 10**9,
        **more,
    }


def made(stage, blocks=2, tuned=True):
    layers = [
        {
            "name": f"model.layers.{block}.mlp.{name}",
            "block": block,
            "shape": [8, 4],
            "sparsity": 0.7 + 0.01 * block,
            "pattern": "70%",
            "loss_before": 0.2,
            "loss_after": 0.1 * (block + 1),
            "seconds": 0.5,
            "notes": [],
        }
        for block in range(blocks)
        for name in ("up_proj", "down_proj")
    ]
    errors = (
        {"error_before": 0.5, "error_after": 0.125, "scale": 2.0, "epochs": 3}
        if tuned
        else {
            "error_before": None,
            "error_after": None,
            "scale": None,
            "epochs": None,
        }
    )
    return {
        "stage": stage,
        "model": "m",
        "output": "out",
        "method": {"name": "sparsegpt" if stage == "prune" else "ebft"},
        "tuner": {"name": "ebft"} if tuned else None,
        "pattern": "70%",
        "sparsity": 0.7,
        "seconds": 60.0,
        "peak_memory_bytes": 2 * 10**9,
        "planned_memory_bytes": 10**9,
        "layers": layers,
        "blocks": [{"index": block, **errors, "seconds": 1.0, "notes": []} for block in range(blocks)],
        "warnings": [],
    }


@pytest.fixture
def report():
    return {
        "title": "A run",
        "created": "2026-11-20T12:34:56+00:00",
        "recipe": {"model": "m", "seed": 0, "stages": [{"prune": {"pattern": "2:4"}}]},
        "versions": {"secateur": "1.2.3"},
        "stages": [
            evaluated("dense", 20.0),
            made("prune", tuned=False),
            evaluated("pruned", 100.0),
            made("tune"),
            evaluated("tuned", 40.0),
        ],
        "samples": [{"label": "dense", "text": "Once upon\na time"}],
        "outputs": {"model": "out/4-tune"},
    }


class Tags(HTMLParser):
    """Collects every tag with its attributes and checks that they nest."""

    VOID = frozenset({"meta"})

    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def tags(page):
    parser = Tags()
    parser.feed(page)
    assert parser.open == []
    return parser.found


def test_the_page_loads_nothing_and_runs_nothing(report, tmp_path):
    write_report(report, tmp_path)
    page = (tmp_path / "report.html").read_text()
    found = tags(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in found}
    for _, attributes in found:
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page
    assert (
        "meta",
        {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"},
    ) in found


def test_hostile_texts_stay_texts(report, tmp_path):
    honest = write_and_read(report, tmp_path / "honest")
    hostile = copy.deepcopy(report)
    hostile["title"] = EVIL
    hostile["recipe"] = {"model": EVIL, "stages": [{EVIL: EVIL}]}
    hostile["versions"] = {EVIL: EVIL}
    hostile["samples"] = [{"label": EVIL, "text": EVIL}]
    hostile["outputs"] = {EVIL: EVIL}
    for stage in hostile["stages"]:
        stage["warnings"] = [EVIL]
        for key in ("label", "model", "pattern", "output"):
            if key in stage:
                stage[key] = EVIL
        if "perplexity" in stage:
            stage["perplexity"] = {EVIL: 20.0}
            stage["tasks"] = {EVIL: {EVIL: 0.5}}
        for key in ("method", "tuner"):
            if stage.get(key):
                stage[key] = {"name": EVIL}
        for layer in stage.get("layers", []):
            layer |= {"name": EVIL, "pattern": EVIL, "notes": [EVIL]}
        for block in stage.get("blocks", []):
            block["notes"] = [EVIL]
    page = write_and_read(hostile, tmp_path / "hostile")
    assert {tag for tag, _ in tags(page)} <= {tag for tag, _ in tags(honest)} | {"ul", "li"}
    assert "<script" not in page
    assert "<img" not in page
    markdown = (tmp_path / "hostile" / "report.md").read_text()
    assert not [line for line in markdown.splitlines() if "<" in line and not line.startswith("    ")]  # code is inert
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


def write_and_read(report, folder) -> str:
    write_report(report, folder)
    return (folder / "report.html").read_text()


def test_the_page_has_every_section(report, tmp_path):
    page = write_and_read(report, tmp_path)
    for heading in (
        "At a glance",
        "Perplexity",
        "linears",
        "error of each block",
        "Time and memory",
        "What the models write",
    ):
        assert heading in page
    assert "pattern: &#x27;2:4&#x27;" in page
    assert "secateur 1.2.3" in page
    assert page.count('class="d1"') == 3  # two blocks and the legend
    assert "75.0 %" in page  # of 100 - 20, 60 came back; and 0.5 to 0.125 of a block


def test_the_json_is_the_report_with_what_json_cannot_say_as_null(report, tmp_path):
    report["stages"][2]["perplexity"]["text"] = float("inf")
    report["stages"][3]["layers"][0]["loss_after"] = float("nan")
    page = write_and_read(report, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["stages"][2]["perplexity"]["text"] is None
    assert found["stages"][3]["layers"][0]["loss_after"] is None
    assert found["stages"][0] == report["stages"][0]
    assert headline(found)[1][1][2] == "-"
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).lower().split()


@pytest.mark.parametrize(
    "sparse",
    [
        {},
        {"stages": []},
        {"stages": [{"stage": "evaluate"}]},
        {"stages": [{"stage": "prune"}]},
        {"stages": [{"stage": "export", "format": "bitmask", "output": "x"}]},
        {"stages": [{"stage": "prune", "layers": [], "blocks": [], "method": None, "sparsity": None}], "recipe": None},
        {"samples": None, "versions": None, "outputs": None, "title": None},
    ],
)
def test_what_is_missing_is_left_out(sparse, tmp_path):
    tags(write_and_read(sparse, tmp_path))
    assert (tmp_path / "report.md").read_text().startswith("# ")


def test_a_report_that_cannot_be_written_leaves_the_old_one(report, tmp_path):
    write_report(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"report.json", "report.html", "report.md"}
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(ResourceError, match="cannot be written"):
        write_report(report, blocked)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path != blocked} == before


def test_the_headline_has_a_line_for_every_measured_model(report):
    head, rows = headline(report)
    assert head == ["model", "sparsity", "perplexity", "time", "peak memory"]
    assert rows == [
        ["dense", "0.0 %", "20.00", "-", "1 GB"],
        ["pruned", "70.0 %", "100.0", "1 min 00 s", "2 GB"],
        ["tuned", "70.0 %", "40.00", "2 min 00 s", "2 GB"],
    ]


def test_the_headline_shows_models_that_were_not_measured_and_tasks_that_were():
    stages = [
        made("prune"),
        made("tune"),
        evaluated("end", 9.0, tasks={"arc": {"acc,none": 0.25, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.1}}),
    ]
    rows = measured({"stages": stages})
    assert [row.label for row in rows] == ["pruned", "end"]
    assert rows[1].tasks == {"arc acc_norm": 0.5}
    assert headline({"stages": stages})[0][3] == "arc acc_norm"


def test_logarithmic_bars_are_as_long_as_the_loss():
    chart = bars(
        [Bar("a", 10.0, "10"), Bar("b", 100.0, "100"), Bar("c", float("inf"), "inf")], name="x", logarithmic=True
    )
    assert [float(share) for share in re.findall(r"\* ([\d.]+)\)", chart)] == [0.5, 1.0, 0.004]


def test_a_grid_has_one_cell_per_value_and_shades_by_rank():
    shades = levels([1.0, 10.0, 100.0, None, float("nan"), 0.0], logarithmic=True)
    assert shades == [0.0, 0.5, 1.0, None, None, None]
    cells = [Cell("row", column, shade, f"{column}") for column, shade in enumerate(shades)]
    chart = grid(cells, name="x", axis="block")
    assert re.findall(r'<rect class="(\w+)"', chart) == ["h0", "h5", "h9", "none", "none", "none"]


def test_dots_are_drawn_only_where_a_logarithm_exists():
    chart = pairs([Pair("0", 1.0, 0.1), Pair("1", 0.0, 0.01)], name="x", axis="block")
    assert chart.count("<circle") == 3
    assert pairs([Pair("0", 0.0, 0.0)], name="x", axis="block") == ""


def test_a_model_with_thousands_of_experts_gives_a_page_of_bounded_size(tmp_path):
    stage = made("prune")
    stage["layers"] = [
        stage["layers"][0]
        | {"name": f"model.layers.{block}.mlp.experts.{expert}.up_proj", "block": block, "loss_after": 0.1 + block}
        for block in range(24)
        for expert in range(256)
    ]
    page = write_and_read({"stages": [stage]}, tmp_path)
    assert page.count("mlp.experts.*.up_proj, block ") == 24
    assert "and 2144 more in" in page
    assert len(page) < 2_000_000
