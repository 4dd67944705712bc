"""The options of the command line, each declared once; every long one is a key of a recipe with dashes.

None means "not given": defaults live in the recipe schema alone, and what stands in the help here is checked by a test.
What several commands take stands in a group at the end, and `takes` gives groups to a command.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, get_args

import typer

_METHOD, _TEXT, _RUN, _OUT, _OPEN = "Method", "Calibration text", "How it runs", "Output", "Opening the model"


def _option(
    *names: str, help: str, panel: str | None, metavar: str = " ", default: str = "", least: float | None = None
) -> Any:
    """Return an option with its default shown in its help; a blank metavar marks a switch."""
    shown = f"{help} [dim]\\[{default}][/dim]" if default else help
    return typer.Option(*names, help=shown, metavar=metavar, rich_help_panel=panel, show_default=False, min=least)


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a Hub id, a .gguf file or builtin:NAME.", show_default=False)
]

Method = Annotated[str | None, _option("--method", help="Pruner.", panel=_METHOD, metavar="NAME", default="sparsegpt")]
TuneMethod = Annotated[
    str | None, _option("--method", help="Block tuner.", panel=_METHOD, metavar="NAME", default="ebft")
]
Pattern = Annotated[
    str | None,
    _option(
        "--pattern",
        help="70%, 0.7, 2:4 (2 of 4 kept), 70% row|layer|model.",
        panel=_METHOD,
        metavar="PATTERN",
        default="50%",
    ),
]
Plan = Annotated[
    str | None,
    _option("--plan", help="Planner that divides the sparsity among the linears.", panel=_METHOD, metavar="NAME"),
]
Tuner = Annotated[
    str | None,
    _option("--tuner", help="Block tuner that repairs each block after pruning.", panel=_METHOD, metavar="NAME"),
]
Set = Annotated[
    list[str] | None,
    _option("--set", help="Any argument, such as tuner.epochs=10; repeatable.", panel=_METHOD, metavar="KEY=VALUE"),
]
Ignore = Annotated[
    list[str] | None,
    _option("--ignore", help="Leave linears dense: name, class, glob or re:REGEX.", panel=_METHOD, metavar="NAME"),
]
Override = Annotated[
    list[str] | None,
    _option("--override", help="Another pattern for some linears, or dense.", panel=_METHOD, metavar="NAME=PATTERN"),
]
Include = Annotated[
    list[str] | None,
    _option("--include", help="Prune linears outside the blocks too, such as lm_head.", panel=_METHOD, metavar="NAME"),
]
Refit = Annotated[bool | None, _option("--refit", help="Exact least squares on the final mask.", panel=_METHOD)]
OnePass = Annotated[
    bool | None, _option("--one-pass", help="Calibrate all linears of a block on its dense inputs.", panel=_METHOD)
]
ErrorCorrection = Annotated[
    bool | None, _option("--error-correction", help="Aim at the dense path's outputs.", panel=_METHOD)
]
NoGuard = Annotated[
    bool | None, _option("--no-guard", help="Keep weight updates that are worse than none.", panel=_METHOD)
]
FreezeZeros = Annotated[
    bool | None, _option("--freeze-zeros", help="Zeros that are there stay, and count.", panel=_METHOD)
]
Teacher = Annotated[
    str | None,
    _option("--teacher", help="The dense model.", panel=_METHOD, metavar="MODEL", default="what it was pruned from"),
]

_DATA, _TRAIN = "Data", "Training"
Adapter = Annotated[
    str | None,
    _option(
        "--adapter", help="Adapter to train, or none for all weights.", panel=_TRAIN, metavar="NAME", default="spp"
    ),
]
Data = Annotated[
    str | None,
    _option(
        "--data",
        help="Instructions or text: .jsonl, .parquet, .txt, a Hub data set or builtin:tiny-instructions.",
        panel=_DATA,
        metavar="DATA",
    ),
]
Evaluation = Annotated[
    str | None, _option("--evaluation", help="Data whose loss is measured.", panel=_DATA, metavar="DATA")
]
InstructionField = Annotated[
    str | None, _option("--instruction-field", help="Field of the question.", panel=_DATA, metavar="KEY")
]
ResponseField = Annotated[
    str | None, _option("--response-field", help="Field of the answer.", panel=_DATA, metavar="KEY")
]
DataField = Annotated[
    str | None, _option("--field", help="Field of plain text.", panel=_DATA, metavar="KEY", default="text")
]
SkipRecords = Annotated[
    int | None,
    _option("--skip-bad", help="Bad records to put up with.", panel=_DATA, metavar="N", default="0", least=0),
]
Packing = Annotated[bool | None, _option("--packing", help="Several examples in one sequence.", panel=_DATA)]
SequenceLength = Annotated[
    int | None, _option("--length", help="Tokens of a sequence.", panel=_DATA, metavar="N", default="1024", least=2)
]
WholeLoss = Annotated[bool | None, _option("--whole-loss", help="Learn prompts too, not answers alone.", panel=_DATA)]
Steps = Annotated[
    int | None, _option("--steps", help="Steps of the optimizer.", panel=_TRAIN, metavar="N", default="500", least=1)
]
Epochs = Annotated[
    float | None, _option("--epochs", help="Passes over the data, in place of steps.", panel=_TRAIN, metavar="X")
]
TrainBatch = Annotated[
    int | None,
    _option("--batch-size", help="Sequences of one forward.", panel=_TRAIN, metavar="N", default="8", least=1),
]
Accumulation = Annotated[
    int | None,
    _option("--accumulation", help="Forwards of one step.", panel=_TRAIN, metavar="N", default="1", least=1),
]
LearningRate = Annotated[
    float | None,
    _option("--learning-rate", help="At its highest.", panel=_TRAIN, metavar="X", default="what suits the adapter"),
]
ScheduleOption = Annotated[
    str | None,
    _option("--schedule", help="After the warm-up.", panel=_TRAIN, metavar="linear|cosine|constant", default="linear"),
]
Warmup = Annotated[
    float | None,
    _option("--warmup", help="Steps, or a fraction of all.", panel=_TRAIN, metavar="X", default="0.03", least=0),
]
OptimizerOption = Annotated[
    str | None,
    _option("--optimizer", help="As transformers calls it.", panel=_TRAIN, metavar="NAME", default="adamw_torch"),
]
Around = Annotated[
    str | None, _option("--around", help="Optimizer around it, such as cram.", panel=_TRAIN, metavar="NAME")
]
GradientCheckpointing = Annotated[
    bool | None, _option("--gradient-checkpointing", help="Compute activations twice, keep few.", panel=_TRAIN)
]
Bf16 = Annotated[
    bool | None,
    typer.Option(
        "--bf16/--no-bf16",
        help="Compute in bfloat16. [dim]\\[where a GPU can][/dim]",
        rich_help_panel=_TRAIN,
        show_default=False,
    ),
]
CompactState = Annotated[
    bool | None,
    _option("--compact-state", help="With all weights: optimizer state for kept ones alone.", panel=_TRAIN),
]
EvaluateEvery = Annotated[
    int | None, _option("--evaluate-every", help="Steps between evaluations.", panel=_TRAIN, metavar="N", least=1)
]
LogEvery = Annotated[
    int | None,
    _option("--log-every", help="Steps between lines of the curve.", panel=_TRAIN, metavar="N", default="10", least=1),
]
SaveEvery = Annotated[
    int | None,
    _option("--save-every", help="Steps between checkpoints.", panel=_TRAIN, metavar="N", default="100", least=1),
]
LogTo = Annotated[
    list[str] | None,
    _option("--log-to", help="tensorboard, trackio, ...; repeatable.", panel=_OUT, metavar="NAME"),
]
Merge = Annotated[bool | None, _option("--merge", help="Write the whole model, the adapter merged.", panel=_OUT)]

Calibration = Annotated[
    str | None,
    _option(
        "--calibration",
        help="A .txt, .jsonl or .parquet file, a Hub data set or builtin:NAME.",
        panel=_TEXT,
        metavar="TEXT",
    ),
]
Samples = Annotated[
    int | None,
    _option("--samples", help="Samples taken from the text.", panel=_TEXT, metavar="N", default="128", least=1),
]
Length = Annotated[
    int | None, _option("--length", help="Tokens of a sample.", panel=_TEXT, metavar="N", default="2048", least=2)
]
Field = Annotated[
    str | None, _option("--field", help="Field of a .jsonl or .parquet.", panel=_TEXT, metavar="KEY", default="text")
]
SkipBad = Annotated[
    int | None, _option("--skip-bad", help="Bad lines to put up with.", panel=_TEXT, metavar="N", default="0", least=0)
]
BatchTokens = Annotated[
    int | None,
    _option("--batch-tokens", help="Tokens of one batch.", panel=_TEXT, metavar="N", default="8192", least=1),
]

Methods = Annotated[
    list[str] | None,
    _option("--methods", help="Pruners, repeated or joined by commas, or all.", panel=_METHOD, metavar="NAMES"),
]
Patterns = Annotated[
    list[str] | None,
    _option("--pattern", help="A pattern, as in prune; repeatable.", panel=_METHOD, metavar="PATTERN", default="50%"),
]
Tuners = Annotated[
    list[str] | None,
    _option("--tuner", help="Block tuners, or none for none.", panel=_METHOD, metavar="NAMES", default="none"),
]
Plans = Annotated[
    list[str] | None,
    _option("--plan", help="Planners, or uniform for none.", panel=_METHOD, metavar="NAMES", default="uniform"),
]
SetMethod = Annotated[
    list[str] | None,
    _option(
        "--set",
        help="A hyper-parameter of one method, such as sparsegpt.damping=0.1; repeatable.",
        panel=_METHOD,
        metavar="METHOD.KEY=VALUE",
    ),
]
Statistics = Annotated[
    str | None,
    _option(
        "--statistics",
        help="own: each row calibrates on its own pruned path, as prune does. shared: one dense pass serves all rows; "
        "faster, and not equal to prune.",
        panel=_TEXT,
        metavar="own|shared",
        default="own",
    ),
]

_MEASURE = "What to measure"
Perplexity = Annotated[
    list[str] | None,
    _option("--perplexity", help="Texts, repeated or joined by commas.", panel=_MEASURE, metavar="TEXT"),
]
WindowLength = Annotated[
    int | None, _option("--length", help="Tokens of a window.", panel=_MEASURE, metavar="N", default="1024", least=2)
]
Window = Annotated[
    int | None,
    _option("--window", help="Tokens of an evaluation window.", panel=_MEASURE, metavar="N", default="1024", least=2),
]
Limit = Annotated[
    int | None, _option("--limit", help="Windows of each text at most.", panel=_MEASURE, metavar="N", least=1)
]
TextLines = Annotated[
    bool | None, _option("--lines", help="Join a text's lines by blank lines, as for raw WikiText-2.", panel=_MEASURE)
]
Tasks = Annotated[
    list[str] | None,
    _option("--tasks", help="lm-eval tasks or local JSONL, repeated or joined.", panel=_MEASURE, metavar="TASK"),
]
TaskLimit = Annotated[
    int | None, _option("--task-limit", help="Documents of each task at most.", panel=_MEASURE, metavar="N", least=1)
]
Label = Annotated[str | None, _option("--label", help="Name of the model in reports.", panel=_OUT, metavar="TEXT")]
BatchSize = Annotated[
    int | None, _option("--batch-size", help="Windows of one forward.", panel=_RUN, metavar="N", least=1)
]

Seed = Annotated[
    int | None, _option("--seed", help="Decides all randomness.", panel=_RUN, metavar="N", default="0", least=0)
]
Device = Annotated[
    str | None,
    _option("--device", help="cpu, cuda, cuda:1.", panel=_RUN, metavar="NAME", default="cuda if there is one"),
]
Dtype = Annotated[
    str | None,
    _option("--dtype", help="float32, bfloat16 or float16.", panel=_RUN, metavar="NAME", default="as stored"),
]
Offload = Annotated[
    str | None, _option("--offload", help="Where hidden states wait.", panel=_RUN, metavar="ram|disk", default="ram")
]
Nonfinite = Annotated[
    str | None,
    _option(
        "--nonfinite",
        help="What to do about NaN and infinity.",
        panel=_RUN,
        metavar="error|zero|skip-batch",
        default="error",
    ),
]
Fallback = Annotated[
    str | None,
    _option(
        "--fallback",
        help="Where no factorisation works: fail, or use the diagonal.",
        panel=_RUN,
        metavar="error|diag",
        default="error",
    ),
]
MemoryLimit = Annotated[
    str | None, _option("--memory-limit", help="Main memory to use, such as 6GB.", panel=_RUN, metavar="SIZE")
]
MaxMinutes = Annotated[
    float | None,
    _option("--max-minutes", help="Then stop at a block boundary; --resume goes on.", panel=_RUN, metavar="M", least=0),
]
Strict = Annotated[bool, _option("--strict", help="Make an error of every warning.", panel=_RUN)]
DryRun = Annotated[bool, _option("--dry-run", help="Show what would be done and what it needs.", panel=_RUN)]

Minutes = Annotated[
    float | None, _option("--minutes", help="Time that the recipe may take.", panel=_RUN, metavar="M", least=0)
]
SuggestedText = Annotated[
    str | None,
    _option(
        "--calibration",
        help="A .txt, .jsonl or .parquet file, a Hub data set or builtin:NAME.",
        panel=_TEXT,
        metavar="TEXT",
        default="builtin:wiki-calibration",
    ),
]
OnePerplexity = Annotated[
    str | None, _option("--perplexity", help="A text to measure the result on.", panel=_MEASURE, metavar="TEXT")
]
RecipeFile = Annotated[str | None, _option("--output", "-o", help="Recipe file to write.", panel=_OUT, metavar="FILE")]
RunFolder = Annotated[
    str | None, _option("--run", help="Show the recipe, then run it in this folder.", panel=_OUT, metavar="DIR")
]
Output = Annotated[str | None, _option("--output", "-o", help="Folder to write.", panel=_OUT, metavar="DIR")]
DemoFolder = Annotated[
    str | None, _option("--output", "-o", help="Folder to write.", panel=_OUT, metavar="DIR", default="demo")
]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer samples and epochs: a minute, worse numbers.")]
Format = Annotated[
    str | None,
    _option("--format", help="How to write it.", panel=_OUT, metavar="checkpoint|bitmask", default="checkpoint"),
]
Resume = Annotated[bool, _option("--resume", help="Go on with an unfinished run; starts if there is none.", panel=_OUT)]
KeepModels = Annotated[bool, _option("--keep-models", help="Keep the pruned model of every row.", panel=_OUT)]
Title = Annotated[str | None, _option("--title", help="Heading of the report.", panel=_OUT, metavar="TEXT")]
Overwrite = Annotated[bool, _option("--overwrite", help="Replace an earlier output.", panel=_OUT)]
Json = Annotated[bool, _option("--json", help="Print one JSON object on stdout.", panel=_OUT)]
Debug = Annotated[bool, _option("--debug", help="Show the traceback of an error.", panel=_OUT)]

AdapterPath = Annotated[str, typer.Argument(metavar="ADAPTER", help="A PEFT adapter folder.", show_default=False)]
AdapterPaths = Annotated[
    list[str],
    typer.Argument(metavar="PATH...", help="Adapter folders, or folders that hold some.", show_default=False),
]
WeightedAdapters = Annotated[
    list[str],
    typer.Argument(metavar="ADAPTER=WEIGHT...", help="What is added up, such as A=0.7 B=0.3.", show_default=False),
]
MergedModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder with a merged S2FT adapter.", show_default=False)
]
BaseModel = Annotated[
    str | None,
    _option("--model", help="The base model.", panel=_METHOD, metavar="BASE", default="what the adapter names"),
]
CheckedModel = Annotated[
    str | None, _option("--model", help="Say whether each fits this model.", panel=_METHOD, metavar="BASE")
]
SwitchTo = Annotated[
    str | None, _option("--to", help="The adapter to put in, or none.", panel=_METHOD, metavar="ADAPTER|none")
]
FillZeros = Annotated[bool, _option("--fill-zeros", help="Let the update fill zeros of the base.", panel=_METHOD)]
KeepMask = Annotated[
    bool, _option("--keep-mask", help="Set zeros that the update filled to zero again.", panel=_METHOD)
]
AdapterFormat = Annotated[
    str | None, _option("--format", help="How to write it.", panel=_OUT, metavar="lora", default="lora")
]

Revision = Annotated[
    str | None, _option("--revision", help="Commit, branch or tag of a Hub id.", panel=_OPEN, metavar="NAME")
]
AllowPickle = Annotated[bool, _option("--allow-pickle", help="Read .bin weights.", panel=_OPEN)]
TrustRemoteCode = Annotated[
    bool, _option("--trust-remote-code", help="Run code the model brings; needs --revision.", panel=_OPEN)
]

# groups, by the names that the arguments have in the API
PRUNING = {
    "refit": Refit,
    "one_pass": OnePass,
    "error_correction": ErrorCorrection,
    "no_guard": NoGuard,
    "freeze_zeros": FreezeZeros,
    "ignore": Ignore,
    "include": Include,
    "override": Override,
}
TEXT = {"field": Field, "skip_bad": SkipBad}
CALIBRATION = {"calibration": Calibration, "samples": Samples, "length": Length, **TEXT, "batch_tokens": BatchTokens}
LEARNING = {
    "data": Data,
    "evaluation": Evaluation,
    "instruction_field": InstructionField,
    "response_field": ResponseField,
    "field": DataField,
    "skip_bad": SkipRecords,
    "length": SequenceLength,
    "packing": Packing,
    "whole_loss": WholeLoss,
}
TRAINING = {
    "adapter": Adapter,
    "set": Set,
    "steps": Steps,
    "epochs": Epochs,
    "batch_size": TrainBatch,
    "accumulation": Accumulation,
    "learning_rate": LearningRate,
    "schedule": ScheduleOption,
    "warmup": Warmup,
    "optimizer": OptimizerOption,
    "around": Around,
    "gradient_checkpointing": GradientCheckpointing,
    "bf16": Bf16,
    "compact_state": CompactState,
    "evaluate_every": EvaluateEvery,
    "log_every": LogEvery,
    "save_every": SaveEvery,
}
MACHINE = {"device": Device, "dtype": Dtype}
MACHINE_AND_SEED = {"seed": Seed, **MACHINE}
SWEEPING = {**MACHINE_AND_SEED, "offload": Offload, "nonfinite": Nonfinite, "fallback": Fallback}
STOPPING = {"max_minutes": MaxMinutes, "strict": Strict, "dry_run": DryRun}
OUTPUT = {"output": Output, "overwrite": Overwrite}
RESUMABLE = {"output": Output, "resume": Resume, "overwrite": Overwrite}
SHOWING = {"json": Json, "debug": Debug}
OPENING = {"revision": Revision, "allow_pickle": AllowPickle, "trust_remote_code": TrustRemoteCode}

_Command = TypeVar("_Command", bound=Callable[..., None])


def takes(*groups: Mapping[str, Any]) -> Callable[[_Command], _Command]:
    """Give the options of `groups` to a command in place of its `**options`.

    A switch is False where it is not given, anything else None.
    """

    def declare(command: _Command) -> _Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [each for each in own if each.kind is not each.VAR_KEYWORD]
        for name, option in {key: value for group in groups for key, value in group.items()}.items():
            default = False if get_args(option)[0] is bool else None
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=option)
            )
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return declare
