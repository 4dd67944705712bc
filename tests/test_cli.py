from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from secateur import cli, stopping
from secateur.core import errors
from secateur.recipe import stages
from secateur.recipe.schema import Evaluate, Export, Prune, Recipe, Tune

PRUNED = {
    "stage": "prune",
    "model": "m",
    "output": "out",
    "method": {"name": "sparsegpt", "damping": 0.01},
    "pattern": "2:4",
    "tuner": None,
    "sparsity": 0.5,
    "seconds": 61.0,
    "peak_memory_bytes": 1_500_000_000,
    "layers": [
        {
            "name": "a",
            "block": 0,
            "shape": [2, 4],
            "sparsity": 0.5,
            "pattern": "2:4",
            "loss_before": 0.2,
            "loss_after": 0.1,
        }
    ],
    "blocks": [],
    "warnings": ["something was not done"],
}
MEASURED = {
    "stage": "evaluate",
    "model": "m",
    "perplexity": {"text.txt": 12.5},
    "tokens": {"text.txt": 1000},
    "tasks": {"arc": {"acc": 0.5}},
    "sparsity": 0.5,
    "seconds": 1.0,
}


@pytest.fixture
def call(monkeypatch):
    """Replaces the stages by ones that note how they were called; `call["prune"]` is (args, kwargs)."""
    noted = {}

    def replace(name, answer):
        def stage(*args, **kwargs):
            noted[name] = (args, kwargs)
            print("a library chatters on stdout")
            return answer(kwargs) if callable(answer) else answer

        monkeypatch.setattr(stages, name, stage)

    replace("prune", stages.Result(None, PRUNED))
    replace("tune", stages.Result(None, {**PRUNED, "stage": "tune"}))
    replace("evaluate", MEASURED)
    replace("inspect", {"sparsity": 0.5, "dtype": "float32", "bytes": 100, "formats": {}, "linears": PRUNED["layers"]})
    replace(
        "export", {"format": "bitmask", "bytes": 10, "dense_bytes": 20, "ratio": 0.5, "sparsity": 0.5, "output": "o"}
    )
    return noted


def fails(monkeypatch, error):
    def stage(*args, **kwargs):
        raise error

    monkeypatch.setattr(stages, "evaluate", stage)
    return cli.main(["evaluate", "m", "--json"])


def test_options_reach_the_stage_by_the_names_of_the_recipe(call):
    words = "prune m --method wanda --pattern 2:4 --calibration c.txt --samples 8 --length 64 --tuner ebft --plan owl --seed 3"
    more = "--device cpu --dtype float32 --offload disk --resume --overwrite --output out --memory-limit 1GB --max-minutes 2"
    assert cli.main([*words.split(), *more.split(), "--set", "tuner.epochs=10", "--set", "plan.spread=0.05"]) == 0
    args, kwargs = call["prune"]
    assert args == ("m",)
    kwargs.pop("progress")
    expected = Recipe.from_dict({"model": "m", "stages": [{"prune": {}}]}).steps()[0].arguments | {
        "method": "wanda",
        "pattern": "2:4",
        "calibration": "c.txt",
        "samples": 8,
        "length": 64,
        "plan": {"name": "owl", "spread": 0.05},
        "tuner": {"name": "ebft", "epochs": 10},
        "seed": 3,
        "device": "cpu",
        "dtype": "float32",
        "offload": "disk",
        "memory_limit": 10**9,
        "allow_pickle": False,
        "trust_remote_code": False,
        "revision": None,
        "output": "out",
        "resume": True,
        "overwrite": True,
        "dry_run": False,
        "max_minutes": 2.0,
    }
    assert kwargs == expected


def test_switches_lists_and_overrides_reach_the_stage(call):
    words = [
        "--one-pass",
        "--no-guard",
        "--refit",
        "--ignore",
        "a,b",
        "--ignore",
        "re:c",
        "--override",
        "*.x=1:2",
        "-o",
        "o",
    ]
    assert cli.main(["prune", "m", *words, "--override", "y=dense", "--set", "method.damping=0.1"]) == 0
    kwargs = call["prune"][1]
    assert (kwargs["sequential"], kwargs["guard"], kwargs["refit"]) == (False, False, True)
    assert kwargs["ignore"] == ("a,b", "re:c")
    assert kwargs["overrides"] == {"*.x": "1:2", "y": "dense"}
    assert kwargs["method"] == {"name": "sparsegpt", "damping": 0.1}


def test_options_are_understood_in_the_words_of_other_tools(call):
    words = "prune m --output_dir o --nsamples 9 --seqlen 33 --sparsity 0.7 --dataset d --skip_bad 2"
    assert cli.main(words.split()) == 0
    kwargs = call["prune"][1]
    given = [kwargs[name] for name in ("output", "samples", "length", "pattern", "calibration", "skip_bad")]
    assert given == ["o", 9, 33, "70%", "d", 2]


def test_texts_and_tasks_are_repeated_or_joined_by_commas(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one,two.txt").write_text("x")
    words = ["--perplexity", "a.txt,b", "--perplexity", "one,two.txt", "--tasks", "arc_easy,piqa", "--limit", "60"]
    assert cli.main(["evaluate", "m", *words]) == 0
    kwargs = call["evaluate"][1]
    assert kwargs["perplexity"] == ("a.txt", "b", "one,two.txt")
    assert kwargs["tasks"] == ("arc_easy", "piqa")
    assert (kwargs["limit"], kwargs["length"]) == (60, 1024)


def test_tune_and_export_reach_their_stage(call):
    assert cli.main(["tune", "m", "--teacher", "dense", "--calibration", "c", "--output", "o"]) == 0
    assert (call["tune"][1]["teacher"], call["tune"][1]["method"]) == ("dense", "ebft")
    assert cli.main(["export", "m", "--format", "bitmask", "--dtype", "bfloat16", "--output", "o"]) == 0
    kwargs = call["export"][1]
    assert {name: kwargs[name] for name in ("format", "dtype", "output", "overwrite")} == {
        "format": "bitmask", "dtype": "bfloat16", "output": "o", "overwrite": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        ("prune m --output o", {"output", "sparsity", "seconds", "peak_memory_bytes", "layers"}),
        ("tune m --output o", {"output", "sparsity", "seconds", "peak_memory_bytes", "layers"}),
        ("evaluate m", {"perplexity", "tasks", "sparsity"}),
        ("inspect m", {"sparsity", "linears"}),
        ("export m --output o", {"format", "bytes", "ratio"}),
        ("methods", {"methods"}),
        ("methods dsnot", {"name", "kind", "paper", "patterns", "needs", "fields"}),
    ],
)
def test_json_is_one_object_on_stdout_and_all_else_on_stderr(words, keys, call, capsys):
    assert cli.main([*words.split(), "--json"]) == 0
    out, err = capsys.readouterr()
    assert keys <= json.loads(out).keys()
    assert out.count("\n") == 1
    assert "chatters" not in out
    assert words.startswith("methods") or "a library chatters" in err


def test_what_json_cannot_say_is_null(monkeypatch, capsys):
    monkeypatch.setattr(stages, "evaluate", lambda *a, **k: {**MEASURED, "perplexity": {"t": float("inf")}})
    assert cli.main(["evaluate", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] == {"t": None}


def test_people_get_lines_with_units_and_warnings_on_stderr(call, capsys):
    assert cli.main(["prune", "m", "--output", "o"]) == 0
    out, err = capsys.readouterr()
    for words in ("sparsegpt (damping=0.01)", "50.0 % of 1 linears", "1 min 01 s", "1.5 GB"):
        assert words in out
    assert "warning: something was not done" in err
    assert cli.main(["evaluate", "m"]) == 0
    assert "perplexity text.txt  12.500 (1,000 tokens)" in capsys.readouterr().out
    assert cli.main(["inspect", "m"]) == 0
    assert "2 x 4" in capsys.readouterr().out


def test_inspect_says_what_it_does_not_count(monkeypatch, capsys):
    found = {"sparsity": 0.5, "dtype": "float32", "formats": {}, "linears": [], "unknown": ["a.decay", "b.decay"]}
    monkeypatch.setattr(stages, "inspect", lambda *args, **kwargs: found)
    assert cli.main(["inspect", "m"]) == 0
    assert "a.decay and 1 more, of a kind that cannot be pruned" in capsys.readouterr().out


def test_a_dry_run_shows_the_resolved_arguments(monkeypatch, capsys):
    def stage(*args, **kwargs):
        assert kwargs["dry_run"]
        plan = {"block": 2_000_000}
        return stages.Result(
            None, {"dry_run": True, "planned_memory_bytes": 2_000_000, "memory_plan": plan, "linears": 7}
        )

    monkeypatch.setattr(stages, "prune", stage)
    assert cli.main(["prune", "m", "--dry-run", "--set", "method.damping=0.5"]) == 0
    out = capsys.readouterr().out
    assert "nothing was done" in out
    assert "2 MB" in out
    assert "damping: 0.5" in out


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (errors.RecipeError("a"), 2, ["error: a"]),
        (errors.RecipeError("a\nb", hint="h"), 2, ["error: a", "error: b", "hint: h"]),
        (errors.PatternError("a"), 2, ["error: a"]),
        (errors.InputError("a", where="f:1"), 3, ["error: f:1: a"]),
        (errors.NumericError("a"), 4, ["error: a"]),
        (errors.ResourceError("a"), 5, ["error: a"]),
        (errors.StateError("a"), 6, ["error: a"]),
        (errors.TimeLimitReached("a"), 75, ["error: a"]),
        (MemoryError(), 5, ["error: out of memory"]),
        (OSError(errno.ENOSPC, "No space left", "f"), 5, ["error: No space left: `f`"]),
        (KeyboardInterrupt(), 130, ["error: interrupted"]),
        (ZeroDivisionError("oh\nmore"), 1, ["error: unexpected ZeroDivisionError: oh"]),
        (OSError(errno.ENOENT, "gone"), 1, ["error: unexpected FileNotFoundError: [Errno 2] gone"]),
        (errors.InputError("\x1b[31mred\x07"), 3, ["error: \\x1b[31mred\\x07"]),
    ],
)
def test_every_failure_is_a_line_and_an_exit_code_of_its_own(error, code, lines, monkeypatch, capsys):
    assert fails(monkeypatch, error) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[: len(lines)] == lines
    assert "Traceback" not in err


def test_debug_shows_where_it_happened(monkeypatch, capsys):
    monkeypatch.setattr(stages, "evaluate", lambda *a, **k: 1 / 0)
    assert cli.main(["evaluate", "m", "--debug"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err.split("error: ")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("prune m", "`--output` is missing"),
        ("prune", "missing argument"),
        ("prune m --smaples 3 --output o", "--smaples"),
        ("prune m --samples x --output o", "--samples"),
        ("prune m --samples 0 --output o", "--samples"),
        ("prune m extra --output o", "extra"),
        ("prun m", "prun"),
        ("prune m --pattern 4:2 --output o", "`4:2` must keep N of M"),
        ("prune m --device gpu --output o", "`device` should match"),
        ("prune m --set tunr.epochs=1 --output o", "did you mean `tuner`"),
        ("prune m --set samples --output o", "has no `=`"),
        ("prune m --set method.dampng=1 --output o", "did you mean `damping`"),
        ("prune m --override x --output o", "has no `=`"),
        ("evaluate m --seed 1", "--seed"),
        ("export m --format zip --output o", "'checkpoint' or 'bitmask'"),
        ("methods wandaa", "did you mean `wanda`"),
        ("run nowhere.yaml --output o", "no file `nowhere.yaml`"),
    ],
)
def test_a_wrong_command_line_exits_with_2_before_any_stage_runs(words, message, call, capsys):
    assert cli.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert call == {}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: m\nstages:\n  - prune: {pattern: '2:4'}\n")
    return path


def test_run_hands_the_recipe_over_with_its_settings(recipe, tmp_path, monkeypatch, capsys):
    seen = {}

    def run(self, output, resume=False, **more):
        seen.update(recipe=self, output=output, resume=resume, **more)
        return {"stages": [MEASURED], "outputs": {"report": "r.html"}, "samples": [{"label": "dense", "text": "Once"}]}

    monkeypatch.setattr(Recipe, "run", run)
    words = ["run", str(recipe), "--set", "stages.0.prune.pattern=1:4", "--output", str(tmp_path / "o"), "--resume"]
    assert cli.main(words) == 0
    assert seen["recipe"].steps()[0].arguments["pattern"] == "1:4"
    assert seen["resume"] is True
    out = capsys.readouterr().out
    for words in ("12.50", "r.html", "Once"):
        assert words in out


def test_run_finds_every_mistake_before_it_starts(recipe, tmp_path, capsys):
    recipe.write_text("model: m\nstages:\n  - prune: {method: {name: sparsegpt, damping: -1}}\n")
    assert cli.main(["run", str(recipe), "--output", str(tmp_path / "o")]) == 2
    assert f"{recipe}:3:13: `method.damping`" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_dry_run_of_a_recipe_prints_it_resolved(recipe, capsys):
    assert cli.main(["run", str(recipe), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"]["stages"][0]["prune"]["method"]["damping"] == 0.01


def test_the_defaults_in_the_help_are_those_of_the_recipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    checked = set()
    for command, model in (("prune", Prune), ("tune", Tune), ("evaluate", Evaluate), ("export", Export)):
        assert cli.main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        for line in shown.splitlines():
            name = line.split("--")[-1].split()[0].replace("-", "_") if "│ --" in line else ""
            field = model.model_fields.get(name)
            if field is not None and isinstance(field.default, int | str) and not isinstance(field.default, bool):
                assert f"[{field.default}]" in line
                checked.add((command, name))
    assert {("prune", "samples"), ("tune", "method"), ("evaluate", "length"), ("export", "format")} <= checked


def process(code, **more):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **more
    )


def test_a_closed_stdout_ends_the_program_without_a_traceback():
    for words in (["--help"], ["methods", "--json"]):
        code = f"import sys; from secateur.cli import main; sys.stdin.read(); sys.exit(main({words!r}))"
        run = process(code, stdin=subprocess.PIPE)
        run.stdout.close()
        run.stdout = None
        _, err = run.communicate("", timeout=30)
        assert (run.returncode, err) == (141, "")


WAITS = """
import sys, time
from secateur import cli, stopping
stopping.GRACE_SECONDS = {grace}
def wait(*a):
    try:
        print("ready", flush=True)
        {body}
    finally:
        {cleanup}
cli._invoke = wait
sys.exit(cli.main(["methods"]))
"""


def stopped(body, cleanup, signals, grace=stopping.GRACE_SECONDS):
    """Return exit code, stderr and seconds from the first signal to the end."""
    run = process(WAITS.format(body=body, cleanup=cleanup, grace=grace))
    try:
        assert run.stdout.readline() == "ready\n"
        begun = time.monotonic()
        for number in signals:
            run.send_signal(number)
            time.sleep(0.3)
        _, err = run.communicate(timeout=30)
    finally:
        run.kill()
        run.communicate()
    return run.returncode, err, time.monotonic() - begun


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_cleanly_with_its_exit_code(number, code):
    found, err, _ = stopped("time.sleep(60)", "print('cleaned up', file=sys.stderr)", [number])
    assert found == code
    assert err.splitlines()[0] == "cleaned up"
    assert "--resume" in err
    assert "Traceback" not in err


def test_a_second_interrupt_stops_at_once():
    found, err, _ = stopped("time.sleep(60)", "time.sleep(60)", [signal.SIGINT, signal.SIGINT], grace=60.0)
    assert found == 130
    assert err == ""


def test_clean_up_that_takes_too_long_is_cut_off():
    assert stopping.GRACE_SECONDS < 5
    found, _, seconds = stopped("time.sleep(60)", "time.sleep(60)", [signal.SIGTERM], grace=0.5)
    assert found == 143
    assert seconds > 0.4


def test_work_that_never_comes_back_to_the_interpreter_is_cut_off():
    # minutes in one call that lets other threads run, as a matrix product does; signal handlers wait for its end
    body = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**8)"
    found, _, _ = stopped(body, "pass", [signal.SIGINT], grace=0.5)
    assert found == 130


COMPARED = {
    "rows": [
        {
            "method": "dense",
            "plan": None,
            "tuner": "none",
            "pattern": None,
            "sparsity": 0.0,
            "perplexity": {"t": 12.5},
            "seconds": 0.0,
            "peak_memory_bytes": 10**9,
            "error": None,
        }
    ],
    "failed": 0,
    "statistics": "own",
    "outputs": {"report": "o/report.html"},
}
FAILED = {**COMPARED["rows"][0], "method": "wanda", "perplexity": {}, "sparsity": None, "seconds": None, "error": "no"}


@pytest.fixture
def compared(monkeypatch):
    """Replaces `compare` by a function that notes how it was called and answers `compared["answer"]`."""
    from secateur.recipe import compare as comparing

    noted = {"answer": COMPARED}

    def stage(*args, **kwargs):
        print("a library chatters on stdout")
        noted["call"] = (args, kwargs)
        return noted["answer"]

    monkeypatch.setattr(comparing, "compare", stage)
    return noted


def test_lists_of_a_comparison_are_joined_by_commas_or_repeated(compared):
    words = "compare m --methods wanda,sparsegpt --methods dsnot --pattern 70% --pattern 2:4,4:8 --tuner none,ebft"
    more = "--set sparsegpt.damping=0.1 --calibration c --samples 8 --length 64 --perplexity a,b --window 32 --limit 3"
    rest = "--statistics shared --refit --seed 3 --memory-limit 1GB --keep-models --resume -o out --override *.x=dense"
    assert cli.main([*words.split(), *more.split(), *rest.split()]) == 0
    args, kwargs = compared["call"]
    assert args == ("m",)
    assert kwargs["methods"] == ("wanda", {"name": "sparsegpt", "damping": 0.1}, "dsnot")
    assert kwargs["pattern"] == ("70%", "2:4", "4:8")
    assert kwargs["tuner"] == (None, "ebft")
    assert kwargs["plan"] == (None,)
    assert (kwargs["samples"], kwargs["length"], kwargs["window"], kwargs["limit"]) == (8, 64, 32, 3)
    assert (kwargs["perplexity"], kwargs["statistics"]) == (("a", "b"), "shared")
    assert (kwargs["refit"], kwargs["seed"], kwargs["memory_limit"]) == (True, 3, 10**9)
    assert (kwargs["keep_models"], kwargs["resume"], kwargs["output"]) == (True, True, "out")
    assert kwargs["overrides"] == {"*.x": "dense"}


def test_the_defaults_of_a_comparison_are_those_of_its_function():
    import inspect

    from secateur.recipe.compare import compare
    from secateur.recipe.comparison import Comparison

    signature = inspect.signature(compare).parameters
    for name, field in Comparison.model_fields.items():
        assert name in signature or name == "model"
        default = field.default
        if name in ("pattern", "tuner", "plan"):
            (default,) = default
        if name not in ("model", "methods", "perplexity"):
            assert default == signature[name].default, name


def test_a_comparison_prints_one_object_and_rows_that_failed_have_an_exit_code(compared, capsys):
    asked = ["compare", "m", "--methods", "wanda", "--calibration", "c", "--perplexity", "t", "-o", "out"]
    assert cli.main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == COMPARED
    compared["answer"] = {**COMPARED, "rows": [*COMPARED["rows"], FAILED], "failed": 1, "statistics": "shared"}
    assert cli.main([*asked, "--json"]) == 7
    assert json.loads(capsys.readouterr().out)["failed"] == 1
    assert cli.main(asked) == 7
    shown = capsys.readouterr().out
    assert "wanda" in shown
    assert "not what `secateur prune` does" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--perplexity t -o o", "`--methods` is missing"),
        ("--methods wanda -o o", "`--perplexity` is missing"),
        ("--methods wanda --perplexity t", "`--output` is missing"),
        ("--methods wand --perplexity t -o o", "did you mean `wanda`"),
        ("--methods wanda --pattern 3:2 --perplexity t -o o", "3:2"),
        ("--methods wanda --tuner wanda --perplexity t -o o", "not a block tuner"),
        ("--methods wanda --statistics both --perplexity t -o o", "statistics"),
        ("--methods wanda --set alps.rho=1 --perplexity t -o o", "none of the methods"),
    ],
)
def test_mistakes_in_a_comparison_end_with_code_2(compared, capsys, words, message):
    assert cli.main(["compare", "m", *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert "call" not in compared


SUGGESTED = {
    "choices": [
        {
            "label": "wanda",
            "method": "wanda",
            "refit": False,
            "tuner": None,
            "samples": 8,
            "length": 64,
            "seconds": 3.0,
            "fits": True,
            "why": "",
        }
    ],
    "recipe": {"model": "m", "stages": [{"prune": {"method": "wanda"}}]},
    "yaml": "# because\nmodel: m\n",
    "output": "r.yaml",
}


@pytest.fixture
def suggested(monkeypatch):
    """Replaces `suggest` by a function that notes how it was called."""
    from secateur.recipe import suggest as suggesting

    noted = {}

    def stage(*args, **kwargs):
        noted["call"] = (args, kwargs)
        return SUGGESTED

    monkeypatch.setattr(suggesting, "suggest", stage)
    return noted


def test_a_suggestion_is_shown_with_its_reasons_or_as_one_object(suggested, capsys):
    asked = ["suggest", "m", "--sparsity", "60%", "--minutes", "5", "--output", "r.yaml", "--seed", "3"]
    assert cli.main(asked) == 0
    args, kwargs = suggested["call"]
    given = {name: value for name, value in kwargs.items() if value is not False and name != "progress"}
    assert (args, given) == (("m",), {"pattern": "60%", "minutes": 5.0, "output": "r.yaml", "seed": 3})
    shown = capsys.readouterr().out
    assert "# because" in shown
    assert "secateur run r.yaml" in shown
    assert cli.main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == SUGGESTED


def test_a_suggestion_is_shown_before_it_is_run(suggested, capsys, monkeypatch):
    from secateur.recipe import run as recipe_run

    def run(recipe, output, **settings):
        assert "# because" in capsys.readouterr().err
        return {"stages": [], "recipe": recipe.model, "output": str(output)}

    monkeypatch.setattr(recipe_run, "run", run)
    assert cli.main(["suggest", "m", "--pattern", "2:4", "--minutes", "5", "--run", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["suggestion"] == SUGGESTED


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pattern 2:4", "`--minutes` is missing"),
        ("--minutes 5", "`--pattern` is missing"),
        ("--minutes 5 --pattern 170%", "between 0 and 1"),
    ],
)
def test_mistakes_in_what_to_suggest_end_with_code_2(suggested, capsys, words, message):
    assert cli.main(["suggest", "m", *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert "call" not in suggested
