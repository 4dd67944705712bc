"""`secateur merge` and `secateur adapters`: options reach the functions, results are told, mistakes are refused."""

from __future__ import annotations

import json

import pytest

from secateur import cli
from secateur.recipe import adapter_list, adapters
from secateur.recipe.job import Result

ADAPTER = {"name": "a", "method": "s2ft", "fingerprint": "f", "path": "a", "bytes": 7000, "linears": 4}
MERGED = {
    "stage": "merge",
    "model": "base",
    "output": "o",
    "adapter": ADAPTER,
    "sparsity_before": 0.5,
    "sparsity": 0.5,
    "zero_pattern": {"identical": True, "filled": 0, "vanished": 0, "linears": 15, "identical_linears": 15},
    "dtype": "float32",
    "bytes": 90_000,
    "layers": [],
    "seconds": 1.0,
    "warnings": ["something to know"],
}
LINE = {
    "name": "a",
    "path": "a",
    "method": "spp",
    "base": "base",
    "rank": 4,
    "lines": None,
    "linears": 14,
    "parameters": 2560,
    "bytes": 10240,
    "fits": False,
    "why": "under another mask",
}
LISTED = {"stage": "adapters", "model": "base", "adapters": [LINE, {"name": "b", "path": "b", "error": "it is broken"}]}
WRITTEN = {"stage": "fuse", "output": "o", "method": "s2ft", "rank": None, "lines": 57, "parameters": 9, "bytes": 36}


@pytest.fixture
def call(monkeypatch):
    """Replaces the functions by ones that note how they were called."""
    noted = {}

    def replace(module, name, answer):
        def stage(*args, **kwargs):
            print("a library chatters on stdout")
            kwargs.pop("progress", None)
            assert not args
            noted[name] = kwargs
            return answer

        monkeypatch.setattr(module, name, stage)

    replace(adapters, "merge", Result(None, MERGED))
    replace(adapters, "switch", Result(None, {**MERGED, "stage": "switch", "adapter": None, "taken_out": ADAPTER}))
    replace(adapters, "fuse", {**WRITTEN, "adapters": [{"name": "a", "weight": 0.7}, {"name": "b", "weight": 0.3}]})
    replace(adapters, "export_lora_adapter", {**WRITTEN, "lines": None, "rank": 16, "adapter": ADAPTER})
    replace(adapter_list, "list_adapters", LISTED)
    return noted


def given(kwargs):
    """Return the arguments that say something."""
    return {name: value for name, value in kwargs.items() if value is not False}


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (
            "merge a --model b --output o --overwrite --dtype bfloat16 --keep-mask --revision r",
            "merge",
            {"adapter": "a", "model": "b", "output": "o", "overwrite": True, "dtype": "bfloat16", "keep_mask": True,
             "revision": "r"},
        ),
        ("merge a --fill_zeros", "merge", {"adapter": "a", "fill_zeros": True}),
        ("adapters list a b --model m", "list_adapters", {"paths": ("a", "b"), "model": "m"}),
        (
            "adapters fuse a=0.7 x/b=-3e-1 -o o",
            "fuse",
            {"adapters": {"a": 0.7, "x/b": -0.3}, "output": "o"},
        ),
        ("adapters switch m --to a", "switch", {"model": "m", "to": "a"}),
        ("adapters switch m --to none --output_dir o", "switch", {"model": "m", "to": "none", "output": "o"}),
        ("adapters export a --format lora -o o --model b", "export_lora_adapter", {"adapter": "a", "output": "o", "model": "b"}),
    ],
)  # fmt: skip
def test_options_reach_the_function_and_json_is_one_object(words, name, expected, call, capsys):
    assert cli.main(words.split()) == 0
    kwargs = given(call[name])
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()} == expected
    out, err = capsys.readouterr()
    assert "chatters" not in out
    assert "a library chatters" in err
    assert cli.main([*words.split(), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert isinstance(json.loads(out), dict)


def test_people_see_what_became_of_the_zeros(call, capsys):
    assert cli.main(["merge", "a", "-o", "o"]) == 0
    out, err = capsys.readouterr()
    for words in ("50.0 % before, 50.0 % after", "identical in 15 of 15 linears, to the last bit", "a (s2ft, 7 kB)"):
        assert words in out
    assert "warning: something to know" in err
    assert cli.main(["adapters", "list", "a", "--model", "base"]) == 0
    out = capsys.readouterr().out
    for words in ("spp", "r=4", "2,560", "under another mask", "it is broken"):
        assert words in out
    assert cli.main(["adapters", "fuse", "a=1", "-o", "o"]) == 0
    assert "0.7 a + 0.3 b" in capsys.readouterr().out
    assert cli.main(["adapters", "switch", "m", "--to", "none"]) == 0
    assert "taken out     a" in capsys.readouterr().out
    assert cli.main(["adapters", "export", "a", "-o", "o"]) == 0
    assert "rank 16 at most" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("merge", "missing argument"),
        ("merge a b", "extra"),
        ("adapters fuse a=0.7", "`--output` is missing"),
        ("adapters fuse a -o o", "`a` has no weight"),
        ("adapters fuse a=x -o o", "weight of `a` must be a finite number, got 'x'"),
        ("adapters fuse a=1 a=2 -o o", "`a` is named twice"),
        ("adapters switch m", "`--to` is missing"),
        ("adapters export a", "`--output` is missing"),
        ("adapters export a -o o --format gguf", "format `gguf` must be `lora`"),
        ("adapters lits", "lits"),
    ],
)
def test_a_wrong_command_line_exits_with_2(words, message, call, capsys):
    assert cli.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert call == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("merge nowhere", "there is no adapter folder `nowhere`"),
        ("adapters list nowhere", "there is no folder `nowhere`"),
        ("adapters switch nowhere --to none", "there is no model folder `nowhere`"),
        ("adapters fuse nowhere=1 -o o", "there is no adapter folder `nowhere`"),
        ("adapters export nowhere -o o", "there is no adapter folder `nowhere`"),
    ],
)
def test_what_is_not_there_exits_with_3_and_a_hint(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words.split()) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == f"error: {message}"
    assert err.splitlines()[1].startswith("hint: ")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_not_finite_is_refused(capsys):
    assert cli.main(["adapters", "fuse", "a=nan", "b=1", "-o", "o"]) == 2
    assert "weight of `a` must be a finite number, got nan" in capsys.readouterr().err
