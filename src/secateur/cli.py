"""The command line: it parses, calls the functions of the API, and prints what they return.

Results go to stdout, everything else to stderr. Every failure is one line and a hint, and an exit code that says which
kind it was (`core/errors.py`).
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur import options as o
from secateur.core.errors import RecipeError
from secateur.failures import exit_code, silence
from secateur.printing import printable, printable_lines, show
from secateur.stopping import stoppable

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
def prune(
    context: typer.Context,
    model: o.Model,
    method: o.Method = None,
    pattern: o.Pattern = None,
    plan: o.Plan = None,
    tuner: o.Tuner = None,
    set: o.Set = None,
    refit: o.Refit = None,
    one_pass: o.OnePass = None,
    error_correction: o.ErrorCorrection = None,
    no_guard: o.NoGuard = None,
    freeze_zeros: o.FreezeZeros = None,
    ignore: o.Ignore = None,
    include: o.Include = None,
    override: o.Override = None,
    calibration: o.Calibration = None,
    samples: o.Samples = None,
    length: o.Length = None,
    field: o.Field = None,
    skip_bad: o.SkipBad = None,
    batch_tokens: o.BatchTokens = None,
    seed: o.Seed = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    offload: o.Offload = None,
    nonfinite: o.Nonfinite = None,
    fallback: o.Fallback = None,
    memory_limit: o.MemoryLimit = None,
    max_minutes: o.MaxMinutes = None,
    strict: o.Strict = False,
    dry_run: o.DryRun = False,
    output: o.Output = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
    revision: o.Revision = None,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Prune MODEL, block by block, and tune each block if there is a tuner."""
    _stage("prune", context)


@app.command()
def tune(
    context: typer.Context,
    model: o.Model,
    method: o.TuneMethod = None,
    teacher: o.Teacher = None,
    set: o.Set = None,
    ignore: o.Ignore = None,
    calibration: o.Calibration = None,
    samples: o.Samples = None,
    length: o.Length = None,
    field: o.Field = None,
    skip_bad: o.SkipBad = None,
    batch_tokens: o.BatchTokens = None,
    seed: o.Seed = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    offload: o.Offload = None,
    nonfinite: o.Nonfinite = None,
    memory_limit: o.MemoryLimit = None,
    max_minutes: o.MaxMinutes = None,
    strict: o.Strict = False,
    dry_run: o.DryRun = False,
    output: o.Output = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
    revision: o.Revision = None,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Tune the blocks of a sparse MODEL towards the dense one; zeros stay zero."""
    _stage("tune", context)


@app.command()
def finetune(
    context: typer.Context,
    model: o.Model,
    data: o.Data = None,
    evaluation: o.Evaluation = None,
    instruction_field: o.InstructionField = None,
    response_field: o.ResponseField = None,
    field: o.DataField = None,
    skip_bad: o.SkipRecords = None,
    length: o.SequenceLength = None,
    packing: o.Packing = None,
    whole_loss: o.WholeLoss = None,
    adapter: o.Adapter = None,
    set: o.Set = None,
    steps: o.Steps = None,
    epochs: o.Epochs = None,
    batch_size: o.TrainBatch = None,
    accumulation: o.Accumulation = None,
    learning_rate: o.LearningRate = None,
    schedule: o.ScheduleOption = None,
    warmup: o.Warmup = None,
    optimizer: o.OptimizerOption = None,
    around: o.Around = None,
    gradient_checkpointing: o.GradientCheckpointing = None,
    bf16: o.Bf16 = None,
    compact_state: o.CompactState = None,
    evaluate_every: o.EvaluateEvery = None,
    log_every: o.LogEvery = None,
    save_every: o.SaveEvery = None,
    seed: o.Seed = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    max_minutes: o.MaxMinutes = None,
    strict: o.Strict = False,
    dry_run: o.DryRun = False,
    merge: o.Merge = None,
    log_to: o.LogTo = None,
    output: o.Output = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
    revision: o.Revision = None,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Train an adapter of MODEL, or all its kept weights, on instructions or text; zeros stay zero."""
    _stage("finetune", context)


@app.command()
def evaluate(
    context: typer.Context,
    model: o.Model,
    perplexity: o.Perplexity = None,
    length: o.WindowLength = None,
    limit: o.Limit = None,
    tasks: o.Tasks = None,
    task_limit: o.TaskLimit = None,
    lines: o.TextLines = None,
    label: o.Label = None,
    field: o.Field = None,
    skip_bad: o.SkipBad = None,
    batch_size: o.BatchSize = None,
    set: o.Set = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    json: o.Json = False,
    debug: o.Debug = False,
    revision: o.Revision = None,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Measure perplexity on texts, accuracy on tasks, and sparsity."""
    _stage("evaluate", context)


@app.command()
def inspect(
    context: typer.Context,
    model: o.Model,
    json: o.Json = False,
    debug: o.Debug = False,
    revision: o.Revision = None,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Show sparsity and pattern of every linear, dtype, size, and what a format could save."""
    _begin(context)
    loading = {"revision": revision, "allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    with redirect_stdout(sys.stderr):
        from secateur.recipe import stages

        found = stages.inspect(model, **loading)
    _show("inspect", found, json)


@app.command()
def export(
    context: typer.Context,
    model: o.Model,
    format: o.Format = None,
    dtype: o.Dtype = None,
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
    revision: o.Revision = None,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Write MODEL as a plain checkpoint or packed to one bit per weight and the kept values."""
    _stage("export", context)


@app.command()
def run(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.", show_default=False)],
    set: o.Set = None,
    dry_run: o.DryRun = False,
    output: o.Output = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Run every stage of a recipe; the folder then holds the models, the report and the resolved recipe."""
    _begin(context)
    from secateur.recipe.schema import Recipe

    loaded = Recipe.load(recipe, set or ())
    if output is None and not dry_run:
        raise RecipeError("`--output` is missing", hint="name a folder for the run with --output DIR")
    with redirect_stdout(sys.stderr):
        loaded.check()
        if dry_run:
            found: dict[str, Any] = {"dry_run": True, "recipe": loaded.resolved(), "digest": loaded.digest()}
        else:
            from secateur.terminal import progress

            with progress(sys.stderr) as show:
                found = loaded.run(str(output), resume, overwrite=overwrite, progress=show)
    _show("run", found, json)


@app.command()
def compare(
    context: typer.Context,
    model: o.Model,
    methods: o.Methods = None,
    pattern: o.Patterns = None,
    tuner: o.Tuners = None,
    plan: o.Plans = None,
    set: o.SetMethod = None,
    refit: o.Refit = None,
    one_pass: o.OnePass = None,
    error_correction: o.ErrorCorrection = None,
    no_guard: o.NoGuard = None,
    freeze_zeros: o.FreezeZeros = None,
    ignore: o.Ignore = None,
    include: o.Include = None,
    override: o.Override = None,
    calibration: o.Calibration = None,
    samples: o.Samples = None,
    length: o.Length = None,
    statistics: o.Statistics = None,
    field: o.Field = None,
    skip_bad: o.SkipBad = None,
    batch_tokens: o.BatchTokens = None,
    perplexity: o.Perplexity = None,
    window: o.Window = None,
    limit: o.Limit = None,
    lines: o.TextLines = None,
    batch_size: o.BatchSize = None,
    seed: o.Seed = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    offload: o.Offload = None,
    nonfinite: o.Nonfinite = None,
    fallback: o.Fallback = None,
    memory_limit: o.MemoryLimit = None,
    strict: o.Strict = False,
    output: o.Output = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    keep_models: o.KeepModels = False,
    title: o.Title = None,
    json: o.Json = False,
    debug: o.Debug = False,
    revision: o.Revision = None,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Prune and measure MODEL in every way that is named, and show one table.

    Rows appear as they are finished; --resume goes on. Exit code 7: some rows failed and hold their error.
    """
    given = _begin(context)
    call = {name: given.pop(name) for name in _CALL if name in given}
    settings = given.pop("set", ())
    for name in ("debug", "json"):
        given.pop(name, None)
    _arrange(given)
    for name in ("methods", "pattern", "tuner", "plan"):
        if name in given:
            given[name] = [part for text in given[name] for part in text.split(",") if part]
    for name, example in (("methods", "magnitude,wanda,sparsegpt"), ("perplexity", "wikitext2")):
        if name not in given:
            raise RecipeError(f"`--{name}` is missing", hint=f"for example --{name} {example}")
    if "output" not in call:
        raise RecipeError("`--output` is missing", hint="name a folder for the table with --output DIR")
    from secateur.recipe.comparison import Comparison

    asked = Comparison.from_dict(given, settings=settings)
    with redirect_stdout(sys.stderr):
        from secateur.recipe import compare as comparing
        from secateur.terminal import progress

        with progress(sys.stderr) as show:
            found = comparing.compare(asked.model, progress=show, **asked.arguments(), **call)
    _warn(found)
    _show("compare", found, json)
    if found["failed"]:
        raise typer.Exit(ROWS_FAILED)


@app.command()
def suggest(
    context: typer.Context,
    model: o.Model,
    pattern: o.Pattern = None,
    minutes: o.Minutes = None,
    calibration: o.SuggestedText = None,
    perplexity: o.OnePerplexity = None,
    field: o.Field = None,
    skip_bad: o.SkipBad = None,
    seed: o.Seed = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    output: o.RecipeFile = None,
    overwrite: o.Overwrite = False,
    run: o.RunFolder = None,
    json: o.Json = False,
    debug: o.Debug = False,
    revision: o.Revision = None,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Choose method, tuner and calibration for so many minutes on this machine, as a recipe to keep."""
    given = _begin(context)
    for name in ("debug", "json", "run", "model"):
        given.pop(name, None)
    if minutes is None:
        raise RecipeError("`--minutes` is missing", hint="say how long pruning may take, such as --minutes 5")
    if pattern is None:
        raise RecipeError(
            "`--pattern` is missing", hint="say what to prune to, such as --sparsity 60% or --pattern 2:4"
        )
    from secateur.core.pattern import parse_pattern

    parse_pattern(pattern)
    with redirect_stdout(sys.stderr):
        from secateur.recipe import suggest as suggesting
        from secateur.terminal import progress

        with progress(sys.stderr) as show:
            found = suggesting.suggest(model, progress=show, **given)
    _warn(found)
    if run is None:
        _show("suggest", found, json)
        return
    sys.stderr.write(f"{printable_lines(found['yaml'])}\n")
    from secateur.recipe.schema import Recipe

    with redirect_stdout(sys.stderr), progress(sys.stderr) as show:
        report = Recipe.from_dict(found["recipe"]).run(run, overwrite=overwrite, progress=show)
    _show("run", {**report, "suggestion": found} if json else report, json)


@app.command()
def methods(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show its hyper-parameters.")] = None,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """List the methods: name, kind, paper, patterns, and the statistics they need."""
    _begin(context)
    from secateur.methods.registry import REGISTRY
    from secateur.methods.registry import methods as shelf

    if name is None:
        _show("methods", {"methods": shelf()}, json)
        return
    entry = REGISTRY.find(name)
    from secateur.recipe.build import fields_of

    line = next(line for line in shelf() if line["name"] == name)
    _show("method", {**line, "fields": fields_of(entry)}, json)


@app.command()
def merge(
    context: typer.Context,
    adapter: o.AdapterPath,
    model: o.BaseModel = None,
    fill_zeros: o.FillZeros = False,
    keep_mask: o.KeepMask = False,
    dtype: o.Dtype = None,
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
    revision: o.Revision = None,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Merge ADAPTER into its base model and keep every zero; without --output nothing is written, only reported."""
    _adapter_command("merge", context)


@adapters.command("list")
def adapters_list(
    context: typer.Context,
    paths: o.AdapterPaths,
    model: o.CheckedModel = None,
    json: o.Json = False,
    debug: o.Debug = False,
    revision: o.Revision = None,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """List adapters with method, base and size; --model says which of them fit a model."""
    _adapter_command("list", context)


@adapters.command("fuse")
def adapters_fuse(
    context: typer.Context,
    adapters: o.WeightedAdapters,
    model: o.BaseModel = None,
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
    revision: o.Revision = None,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Write the weighted sum of S2FT or LoRA adapters as one adapter, exactly."""
    _adapter_command("fuse", context)


@adapters.command("switch")
def adapters_switch(
    context: typer.Context,
    model: o.MergedModel,
    to: o.SwitchTo = None,
    fill_zeros: o.FillZeros = False,
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Take the merged S2FT adapter out of MODEL and put another in, without the base; MODEL itself without --output."""
    _adapter_command("switch", context)


@adapters.command("export")
def adapters_export(
    context: typer.Context,
    adapter: o.AdapterPath,
    format: o.AdapterFormat = "lora",
    model: o.BaseModel = None,
    output: o.Output = None,
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    debug: o.Debug = False,
    revision: o.Revision = None,
    allow_pickle: o.AllowPickle = False,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Write an S2FT ADAPTER as a LoRA adapter with the same outputs, for PEFT and LoRA servers."""
    _adapter_command("export", context)


@app.command()
def demo(
    context: typer.Context,
    output: o.Output = "demo",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples and epochs: a minute, worse numbers.")] = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Prune a real model to 70 %, win it back, and show what came of it."""
    _begin(context)
    from secateur.terminal import progress

    with redirect_stdout(sys.stderr):
        from secateur import demo as shown

        with progress(sys.stderr) as show:
            found = shown.run(Path(output or "demo"), quick=quick, progress=show)
    _show("run", found, json)


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
    sys.stdout.flush()
    return 0


def _begin(context: typer.Context) -> dict[str, Any]:
    """Return the given options and remember what the end of the program needs."""
    session = context.find_object(Session)
    if session is not None:
        session.debug = bool(context.params.get("debug"))
    return {name: value for name, value in context.params.items() if value is not None and value != [] and value != ()}


def _stage(kind: str, context: typer.Context) -> None:
    """Run one stage as a recipe of one stage, so that options and recipes are checked alike."""
    given = _begin(context)
    given.pop("debug", None)
    as_json, settings = given.pop("json", False), given.pop("set", ())
    call = {name: given.pop(name) for name in _CALL if name in given}
    _arrange(given)
    if kind != "evaluate" and call.get("output") is None and not call.get("dry_run"):
        raise RecipeError("`--output` is missing", hint="name the folder to write with --output DIR")

    from secateur.recipe.schema import Recipe
    from secateur.recipe.yaml_loader import Positions

    top = {name: given.pop(name) for name in _SHARED if name in given}
    data = {"model": given.pop("model"), **top, "stages": [{kind: given}]}
    recipe = Recipe.from_dict(data, settings=settings, positions=Positions("", hidden=("stages", 0, kind)))
    arguments = {**recipe.steps()[0].arguments, **recipe.loading(), **call}
    if kind == "export" and recipe.dtype is not None:
        arguments["dtype"] = recipe.dtype
    with redirect_stdout(sys.stderr):
        recipe.check()
        from secateur.recipe import stages
        from secateur.terminal import progress

        if kind == "export":
            found = stages.export(recipe.model, **arguments)
        else:
            with progress(sys.stderr if _is_first() else io.StringIO()) as show:
                result = getattr(stages, kind)(recipe.model, progress=show, **arguments)
            found = result if isinstance(result, dict) else result.report
            if call.get("dry_run"):
                found = {**found, "arguments": recipe.resolved()["stages"][0][kind]}
    if _is_first():
        _warn(found)
        _show(kind, found, as_json)


def _is_first() -> bool:
    """Return whether this process is alone, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _adapter_command(kind: str, context: typer.Context) -> None:
    """Run one of the functions on adapters, whose arguments are called as the options are."""
    given = _begin(context)
    given.pop("debug", None)
    as_json = given.pop("json", False)
    if kind in ("fuse", "export") and "output" not in given:
        raise RecipeError("`--output` is missing", hint="name the adapter folder to write with --output DIR")
    if kind == "switch" and "to" not in given:
        raise RecipeError("`--to` is missing", hint="--to ADAPTER puts that one in, --to none gives the base back")
    if kind == "export" and given.pop("format") != "lora":
        raise RecipeError(f"format `{context.params['format']}` must be `lora`")
    if kind == "fuse":
        given["adapters"] = _weighted(given["adapters"])
    with redirect_stdout(sys.stderr):
        if kind == "list":
            from secateur.recipe.adapter_list import list_adapters

            found = list_adapters(**given)
        else:
            from secateur.recipe import adapters as acting
            from secateur.terminal import progress

            name = "export_lora_adapter" if kind == "export" else kind
            with progress(sys.stderr) as show:
                result = getattr(acting, name)(progress=show, **given)
            found = result if isinstance(result, dict) else result.report
    _warn(found)
    _show({"list": "adapters", "export": "adapter"}.get(kind, kind), found, as_json)


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
