"""The command line: it parses, calls the functions of the API, and prints what they return.

Results go to stdout, everything else to stderr. Every failure is one line and a hint, and an exit code that says which
kind it was (`core/errors.py`).
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur import options as o
from secateur.core.errors import RecipeError
from secateur.core.processes import is_first, leave
from secateur.failures import exit_code, silence
from secateur.printing import printable, printable_lines, show
from secateur.stopping import stoppable

if TYPE_CHECKING:
    from secateur.core.progress import Progress

# options that other tools and published code call so; underscores may stand for dashes anywhere
_WORDS = {
    "output-dir": "output",
    "dataset": "calibration",
    "nsamples": "samples",
    "num-calibration-samples": "samples",
    "seqlen": "length",
    "max-seq-length": "length",
    "sparsity": "pattern",
    "lr": "learning-rate",
    "max-steps": "steps",
    "num-train-epochs": "epochs",
    "per-device-train-batch-size": "batch-size",
    "gradient-accumulation-steps": "accumulation",
    "train-dataset": "data",
    "report-to": "log-to",
    "save-steps": "save-every",
    "eval-steps": "evaluate-every",
    "logging-steps": "log-every",
}

app = typer.Typer(
    name="secateur",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda word: _WORDS.get(word.replace("_", "-"), word.replace("_", "-")),
    },
)
adapters = typer.Typer(help="List, fuse, switch and export adapters.", no_args_is_help=True)
app.add_typer(adapters, name="adapters")

# how the command line calls the arguments that a recipe has once for all stages
_SHARED = (
    "seed",
    "device",
    "dtype",
    "offload",
    "memory_limit",
    "strict",
    "allow_pickle",
    "trust_remote_code",
    "revision",
)
ROWS_FAILED = 7  # exit code of a comparison that is complete, with rows that hold an error
_CALL = ("output", "resume", "overwrite", "max_minutes", "dry_run")


@dataclass
class Session:
    """What one call of the program remembers for its end."""

    debug: bool = False


@app.callback(invoke_without_command=True)
def secateur(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Prune language models and win the quality back.

    MODEL is a folder, a Hub id, a .gguf file or builtin:smollm2-135m; TEXT is a file, a Hub data set or builtin:NAME.
    """
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"secateur {installed('secateur')}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
@o.takes(
    {"method": o.Method, "pattern": o.Pattern, "plan": o.Plan, "tuner": o.Tuner, "set": o.Set},
    o.PRUNING,
    o.CALIBRATION,
    o.SWEEPING,
    {"memory_limit": o.MemoryLimit},
    o.STOPPING,
    o.RESUMABLE,
    o.SHOWING,
    o.OPENING,
)
def prune(context: typer.Context, model: o.Model, **options: Any) -> None:
    """Prune MODEL, block by block, and tune each block if there is a tuner."""
    _stage("prune", context)


@app.command()
@o.takes(
    {"method": o.TuneMethod, "teacher": o.Teacher, "set": o.Set, "ignore": o.Ignore},
    o.CALIBRATION,
    o.MACHINE_AND_SEED,
    {"offload": o.Offload, "nonfinite": o.Nonfinite, "memory_limit": o.MemoryLimit},
    o.STOPPING,
    o.RESUMABLE,
    o.SHOWING,
    o.OPENING,
)
def tune(context: typer.Context, model: o.Model, **options: Any) -> None:
    """Tune the blocks of a sparse MODEL towards the dense one; zeros stay zero."""
    _stage("tune", context)


@app.command()
@o.takes(
    o.LEARNING,
    o.TRAINING,
    o.MACHINE_AND_SEED,
    o.STOPPING,
    {"merge": o.Merge, "log_to": o.LogTo},
    o.RESUMABLE,
    o.SHOWING,
    o.OPENING,
)
def finetune(context: typer.Context, model: o.Model, **options: Any) -> None:
    """Train an adapter of MODEL, or all its kept weights, on instructions or text; zeros stay zero."""
    _stage("finetune", context)


@app.command()
@o.takes(
    {"perplexity": o.Perplexity, "length": o.WindowLength, "limit": o.Limit},
    {"tasks": o.Tasks, "task_limit": o.TaskLimit, "lines": o.TextLines, "label": o.Label},
    o.TEXT,
    {"batch_size": o.BatchSize, "set": o.Set},
    o.MACHINE,
    o.SHOWING,
    o.OPENING,
)
def evaluate(context: typer.Context, model: o.Model, **options: Any) -> None:
    """Measure perplexity on texts, accuracy on tasks, and sparsity."""
    _stage("evaluate", context)


@app.command()
@o.takes(o.SHOWING, o.OPENING)
def inspect(context: typer.Context, model: o.Model, **options: Any) -> None:
    """Show sparsity and pattern of every linear, dtype, size, and what a format could save."""
    given = _begin(context)
    loading = {name: given[name] for name in o.OPENING if name in given}
    with redirect_stdout(sys.stderr):
        from secateur.recipe import stages

        found = stages.inspect(model, **loading)
    _show("inspect", found, options["json"])


@app.command()
@o.takes({"format": o.Format, "dtype": o.Dtype}, o.OUTPUT, o.SHOWING, o.OPENING)
def export(context: typer.Context, model: o.Model, **options: Any) -> None:
    """Write MODEL as a plain checkpoint or packed to one bit per weight and the kept values."""
    _stage("export", context)


@app.command()
@o.takes({"set": o.Set, "dry_run": o.DryRun}, o.RESUMABLE, o.SHOWING)
def run(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.", show_default=False)],
    **options: Any,
) -> None:
    """Run every stage of a recipe; the folder then holds the models, the report and the resolved recipe."""
    given = _begin(context)
    from secateur.recipe.schema import Recipe

    loaded = Recipe.load(recipe, given.get("set", ()))
    if options["dry_run"]:
        with redirect_stdout(sys.stderr):
            loaded.check()
        found: dict[str, Any] = {"dry_run": True, "recipe": loaded.resolved(), "digest": loaded.digest()}
    else:
        output = _needed(given, "output", "name a folder for the run with --output DIR")
        with _working() as progress:
            loaded.check()
            found = loaded.run(output, options["resume"], overwrite=options["overwrite"], progress=progress)
    _show("run", found, options["json"])


@app.command()
@o.takes(
    {"methods": o.Methods, "pattern": o.Patterns, "tuner": o.Tuners, "plan": o.Plans, "set": o.SetMethod},
    o.PRUNING,
    o.CALIBRATION,
    {"statistics": o.Statistics, "perplexity": o.Perplexity, "window": o.Window},
    {"limit": o.Limit, "lines": o.TextLines, "batch_size": o.BatchSize},
    o.SWEEPING,
    {"memory_limit": o.MemoryLimit, "strict": o.Strict},
    o.RESUMABLE,
    {"keep_models": o.KeepModels, "title": o.Title},
    o.SHOWING,
    o.OPENING,
)
def compare(context: typer.Context, model: o.Model, **options: Any) -> None:
    """Prune and measure MODEL in every way that is named, and show one table.

    Rows appear as they are finished; --resume goes on. Exit code 7: some rows failed and hold their error.
    """
    given = _begin(context)
    _needed(given, "methods", "for example --methods magnitude,wanda,sparsegpt")
    _needed(given, "perplexity", "for example --perplexity wikitext2")
    _needed(given, "output", "name a folder for the table with --output DIR")
    call, settings = _take_call(given)
    for name in ("methods", "pattern", "tuner", "plan"):
        if name in given:
            given[name] = [part for text in given[name] for part in text.split(",") if part]
    from secateur.recipe.comparison import Comparison

    asked = Comparison.from_dict(given, settings=settings)
    with _working() as progress:
        from secateur.recipe import compare as comparing

        found = comparing.compare(asked.model, progress=progress, **asked.arguments(), **call)
    _warn(found)
    _show("compare", found, options["json"])
    if found["failed"]:
        raise typer.Exit(ROWS_FAILED)


@app.command()
@o.takes(
    {"pattern": o.Pattern, "minutes": o.Minutes, "calibration": o.SuggestedText, "perplexity": o.OnePerplexity},
    o.TEXT,
    o.MACHINE_AND_SEED,
    {"output": o.RecipeFile, "overwrite": o.Overwrite, "run": o.RunFolder},
    o.SHOWING,
    o.OPENING,
)
def suggest(context: typer.Context, model: o.Model, **options: Any) -> None:
    """Choose method, tuner and calibration for so many minutes on this machine, as a recipe to keep."""
    given = _begin(context)
    _needed(given, "minutes", "say how long pruning may take, such as --minutes 5")
    pattern = _needed(given, "pattern", "say what to prune to, such as --sparsity 60% or --pattern 2:4")
    folder = given.pop("run", None)
    from secateur.core.pattern import parse_pattern

    parse_pattern(pattern)
    with _working() as progress:
        from secateur.recipe import suggest as suggesting

        found = suggesting.suggest(given.pop("model"), progress=progress, **given)
    _warn(found)
    if folder is None:
        _show("suggest", found, options["json"])
        return
    sys.stderr.write(f"{printable_lines(found['yaml'])}\n")
    from secateur.recipe.schema import Recipe

    with _working() as progress:
        report = Recipe.from_dict(found["recipe"]).run(folder, overwrite=options["overwrite"], progress=progress)
    _show("run", {**report, "suggestion": found} if options["json"] else report, options["json"])


@app.command()
@o.takes(o.SHOWING)
def methods(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show its hyper-parameters.")] = None,
    **options: Any,
) -> None:
    """List the methods: name, kind, paper, patterns, and the statistics they need."""
    _begin(context)
    from secateur.methods.registry import REGISTRY
    from secateur.methods.registry import methods as shelf

    if name is None:
        _show("methods", {"methods": shelf()}, options["json"])
        return
    entry = REGISTRY.find(name)
    from secateur.recipe.build import fields_of

    line = next(line for line in shelf() if line["name"] == name)
    _show("method", {**line, "fields": fields_of(entry)}, options["json"])


@app.command()
@o.takes(
    {"model": o.BaseModel, "fill_zeros": o.FillZeros, "keep_mask": o.KeepMask, "dtype": o.Dtype},
    o.OUTPUT,
    o.SHOWING,
    o.OPENING,
)
def merge(context: typer.Context, adapter: o.AdapterPath, **options: Any) -> None:
    """Merge ADAPTER into its base model and keep every zero; without --output nothing is written, only reported."""
    _adapter_command("merge", context)


@adapters.command("list")
@o.takes({"model": o.CheckedModel}, o.SHOWING, o.OPENING)
def adapters_list(context: typer.Context, paths: o.AdapterPaths, **options: Any) -> None:
    """List adapters with method, base and size; --model says which of them fit a model."""
    given = _begin(context)
    with redirect_stdout(sys.stderr):
        from secateur.recipe.adapter_list import list_adapters

        found = list_adapters(**given)
    _warn(found)
    _show("adapters", found, options["json"])


@adapters.command("fuse")
@o.takes({"model": o.BaseModel}, o.OUTPUT, o.SHOWING, o.OPENING)
def adapters_fuse(context: typer.Context, adapters: o.WeightedAdapters, **options: Any) -> None:
    """Write the weighted sum of S2FT or LoRA adapters as one adapter, exactly."""
    _adapter_command("fuse", context)


@adapters.command("switch")
@o.takes({"to": o.SwitchTo, "fill_zeros": o.FillZeros}, o.OUTPUT, o.SHOWING)
def adapters_switch(context: typer.Context, model: o.MergedModel, **options: Any) -> None:
    """Take the merged S2FT adapter out of MODEL and put another in, without the base; MODEL itself without --output."""
    _adapter_command("switch", context)


@adapters.command("export")
@o.takes({"format": o.AdapterFormat, "model": o.BaseModel}, o.OUTPUT, o.SHOWING, o.OPENING)
def adapters_export(context: typer.Context, adapter: o.AdapterPath, **options: Any) -> None:
    """Write an S2FT ADAPTER as a LoRA adapter with the same outputs, for PEFT and LoRA servers."""
    _adapter_command("export", context)


@app.command()
@o.takes({"output": o.DemoFolder, "quick": o.Quick}, o.SHOWING)
def demo(context: typer.Context, **options: Any) -> None:
    """Prune a real model to 70 %, win it back, and show what came of it."""
    given = _begin(context)
    with _working() as progress:
        from secateur import demo as shown

        found = shown.run(Path(given.get("output", "demo")), quick=options["quick"], progress=progress)
    _show("run", found, options["json"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code.

    Args:
        arguments: what follows the program's name; those of this process if None.
    """
    session = Session()
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        try:
            with stoppable():
                return _invoke(words, session)
        except BaseException as error:
            return exit_code(error, debug=session.debug)
    except BrokenPipeError:  # stderr is closed too
        return silence()


def _invoke(words: list[str], session: Session) -> int:
    """Parse and run; all exceptions come through as they are."""
    command: Any = typer.main.get_command(app)
    with command.make_context("secateur", words, obj=session) as context:
        command.invoke(context)
    leave()
    sys.stdout.flush()
    return 0


def _begin(context: typer.Context) -> dict[str, Any]:
    """Return the given options but those of `o.SHOWING`, and remember what the end of the program needs."""
    session = context.find_object(Session)
    if session is not None:
        session.debug = bool(context.params.get("debug"))
    return {
        name: value
        for name, value in context.params.items()
        if name not in o.SHOWING and value is not None and value != [] and value != ()
    }


def _needed(given: dict[str, Any], name: str, hint: str) -> Any:
    """Return an option that a command cannot do without."""
    if name not in given:
        raise RecipeError(f"`--{name}` is missing", hint=hint)
    return given[name]


@contextmanager
def _working() -> Iterator[Progress]:
    """Show progress on stderr, where everything else that is printed goes too; results alone go to stdout."""
    from secateur.terminal import progress

    with redirect_stdout(sys.stderr), progress(sys.stderr if is_first() else io.StringIO()) as shown:
        yield shown


def _take_call(given: dict[str, Any]) -> tuple[dict[str, Any], Sequence[str]]:
    """Take what a recipe has no keys for out of `given`: the arguments of the call, and what `--set` sets."""
    call, settings = {name: given.pop(name) for name in _CALL if name in given}, given.pop("set", ())
    _arrange(given)
    return call, settings


def _stage(kind: str, context: typer.Context) -> None:
    """Run one stage as a recipe of one stage, so that options and recipes are checked alike."""
    given = _begin(context)
    if kind != "evaluate" and not given.get("dry_run"):
        _needed(given, "output", "name the folder to write with --output DIR")
    call, settings = _take_call(given)

    from secateur.recipe.schema import Recipe
    from secateur.recipe.yaml_loader import Positions

    top = {name: given.pop(name) for name in _SHARED if name in given}
    data = {"model": given.pop("model"), **top, "stages": [{kind: given}]}
    recipe = Recipe.from_dict(data, settings=settings, positions=Positions("", hidden=("stages", 0, kind)))
    arguments = {**recipe.steps()[0].arguments, **recipe.loading(), **call}
    if kind == "export" and recipe.dtype is not None:
        arguments["dtype"] = recipe.dtype
    with _working() as progress:
        recipe.check()
        from secateur.recipe import stages

        if kind != "export":
            arguments["progress"] = progress
        result = getattr(stages, kind)(recipe.model, **arguments)
    found = result if isinstance(result, dict) else result.report
    if call.get("dry_run"):
        found = {**found, "arguments": recipe.resolved()["stages"][0][kind]}
    if is_first():
        _warn(found)
        _show(kind, found, context.params["json"])


def _adapter_command(kind: str, context: typer.Context) -> None:
    """Run one of the functions on adapters, whose arguments are called as the options are."""
    given = _begin(context)
    if kind in ("fuse", "export"):
        _needed(given, "output", "name the adapter folder to write with --output DIR")
    if kind == "switch":
        _needed(given, "to", "--to ADAPTER puts that one in, --to none gives the base back")
    if kind == "export" and (format := given.pop("format", "lora")) != "lora":
        raise RecipeError(f"format `{format}` must be `lora`")
    if kind == "fuse":
        given["adapters"] = _weighted(given["adapters"])
    with _working() as progress:
        from secateur.recipe import adapters as acting

        name = "export_lora_adapter" if kind == "export" else kind
        result = getattr(acting, name)(progress=progress, **given)
    found = result if isinstance(result, dict) else result.report
    _warn(found)
    _show({"export": "adapter"}.get(kind, kind), found, context.params["json"])


def _weighted(texts: Sequence[str]) -> dict[str, float]:
    """Return the adapters of `A=0.7 B=0.3` and their weights.

    Raises:
        RecipeError: a weight is missing or no number, or an adapter is named twice.
    """
    found: dict[str, float] = {}
    for text in texts:
        path, equals, weight = text.rpartition("=")
        if not equals or not path:
            raise RecipeError(f"`{text}` has no weight", hint="write the adapters as A=0.7 B=0.3")
        if path in found:
            raise RecipeError(f"the adapter `{path}` is named twice", hint="add its weights up and name it once")
        try:
            found[path] = float(weight)
        except ValueError as error:
            raise RecipeError(f"the weight of `{path}` must be a finite number, got {weight!r}") from error
    return found


def _arrange(given: dict[str, Any]) -> None:
    """Turn options into the keys of a recipe, in place."""
    for switch, name in (("one_pass", "sequential"), ("no_guard", "guard"), ("whole_loss", "completion_only")):
        if given.pop(switch, False):
            given[name] = False
    for name in ("perplexity", "tasks"):
        if name in given:
            given[name] = [part for text in given[name] for part in _split(text)]
    if "override" in given:
        given["overrides"] = dict(_override(text) for text in given.pop("override"))
    for name in ("ignore", "include", "log_to"):
        if name in given:
            given[name] = list(given[name])


def _warn(found: dict[str, Any]) -> None:
    """Show the warnings of a result on stderr."""
    for warning in found.get("warnings", ()):
        sys.stderr.write(f"warning: {printable(str(warning))}\n")


def _split(text: str) -> list[str]:
    """Return the texts joined by commas in `text`; an existing path may have a comma in its name."""
    return [text] if Path(text).exists() else [part for part in text.split(",") if part]


def _override(text: str) -> tuple[str, str]:
    name, equals, pattern = text.rpartition("=")
    if not equals or not name:
        raise RecipeError(f"`--override {text}` has no `=`", hint="write --override '*.down_proj=2:4'")
    return name, pattern


def _show(kind: str, found: dict[str, Any], as_json: bool) -> None:
    """Print a result on stdout, for people or for programs."""
    if as_json:
        sys.stdout.write(json.dumps(_finite(found), ensure_ascii=False, default=str) + "\n")
    else:
        show(kind, found, sys.stdout)
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    """Return `value` with NaN and infinities as None, which JSON can say."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


if __name__ == "__main__":
    sys.exit(main())
