"""What must not import torch, and that everything public is there when it is asked for; each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "safetensors", "datasets", "lm_eval", "matplotlib", "peft")

CODE = """
import json, sys
status = None
{code}
print(json.dumps([m for m in {heavy} if m in sys.modules]))
"""


def heavy_after(code: str) -> list[str]:
    """Return which heavy packages a fresh interpreter has imported after `code`."""
    run = subprocess.run(
        [sys.executable, "-c", CODE.format(code=code, heavy=HEAVY)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def command(*words: str) -> str:
    return f"from secateur.cli import main; status = main({list(words)!r})"


@pytest.mark.parametrize(
    "code",
    [
        "import secateur; dir(secateur); secateur.__version__; secateur.methods()",
        "import secateur; secateur.NM(2, 4); secateur.Unstructured(0.7, 'row'); secateur.Recipe",
        command("--help") + "; " + command("prune", "--help") + "; " + command("--version"),
        command("methods") + "; assert status == 0; " + command("methods", "--json") + "; assert status == 0",
        command("prune", "m", "--pattern", "150%", "--output", "x") + "; assert status == 2",
        command("prune", "m", "--method", "nothing", "--output", "x") + "; assert status == 2",
        command("prune", "m", "--set", "tunr.epochs=1", "--output", "x") + "; assert status == 2",
        command("compare", "--help")
        + "; "
        + command("compare", "m", "--methods", "nothing", "--perplexity", "t", "-o", "x"),
        command("merge", "--help")
        + "; "
        + command("adapters", "--help")
        + "; "
        + command("adapters", "list", "--help"),
        command("adapters", "list", "nowhere") + "; assert status == 3",
        command("run", "missing.yaml", "--output", "x") + "; assert status == 2",
    ],
    ids=[
        "package",
        "names",
        "help",
        "methods",
        "pattern",
        "method",
        "setting",
        "compare",
        "adapters",
        "list",
        "recipe",
    ],
)
def test_torch_is_not_imported(code):
    assert heavy_after(code) == []


def test_rooms_that_share_a_name_with_a_function_are_callable_before_and_after_their_modules_are_imported():
    code = """
import inspect, secateur
from secateur import evaluate, export
import secateur.evaluate.perplexity, secateur.export.summary
from secateur.recipe import stages
assert secateur.evaluate is evaluate and callable(evaluate) and callable(export)
assert inspect.signature(secateur.evaluate) == inspect.signature(stages.evaluate)
assert secateur.evaluate.perplexity.perplexity
assert secateur.methods()[0]["name"] == "magnitude"
assert set(secateur.__all__) <= set(dir(secateur))
assert all(getattr(secateur, name) is not None for name in secateur.__all__)
"""
    assert "torch" in heavy_after(code)


def test_an_unknown_name_is_an_attribute_error():
    import secateur

    with pytest.raises(AttributeError, match="no attribute `prun`"):
        secateur.prun  # noqa: B018


BARE_HELP = """
import typer
from typer.testing import CliRunner

app = typer.Typer(rich_markup_mode="markdown")
for name in ("first", "second"):
    app.command(name)(lambda number: None)
CliRunner().invoke(app, ["--help"])
bare = set(sys.modules)
"""


def test_help_imports_nothing_beyond_what_typer_itself_imports_for_help_but_a_few_files_of_ours():
    code = (
        BARE_HELP
        + command("--help")
        + """
assert status == 0
new = set(sys.modules) - bare
foreign = {name.partition(".")[0] for name in new} - {"secateur"} - sys.stdlib_module_names
assert not foreign, foreign
assert len([name for name in new if name.startswith("secateur")]) <= 16, new
"""
    )
    assert heavy_after(code) == []
