"""The kinds of values that a recipe holds: names, patterns, sizes, methods; each with its own sentence of refusal."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, Strict
from pydantic_core import PydanticCustomError

from secateur.core.errors import RecipeError, SecateurError
from secateur.core.pattern import parse_pattern
from secateur.core.registry import Kind
from secateur.methods.registry import REGISTRY

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def _pattern(value: Any) -> str:
    """Return the canonical text of a pattern."""
    try:
        return str(parse_pattern(value))
    except SecateurError as error:
        raise PydanticCustomError("pattern", "{message}", {"message": str(error), "hint": error.hint}) from None


def _override(value: Any) -> str:
    """Return the canonical text of a pattern, or `dense` for a linear that is left alone."""
    return "dense" if value is None or value == "dense" else _pattern(value)


def some(value: Any) -> Any:
    """Refuse an empty list."""
    if isinstance(value, list | tuple) and not value:
        raise PydanticCustomError("empty", "should name at least one stage")
    return value


def _none(value: Any) -> Any:
    """Return None for the word `none`."""
    return None if value == "none" else value


def _bytes(value: Any) -> int:
    """Return bytes from `6GB`, `512MiB` or a number."""
    match = re.fullmatch(r"([0-9.]+)\s*([kmgt]?i?)b?", str(value).strip().lower())
    try:
        amount = float(match[1]) * _UNITS[match[2]] if match and not isinstance(value, bool) else 0.0
    except (ValueError, KeyError):
        amount = 0.0
    if not 0 < amount < 2**63:
        raise PydanticCustomError("bytes", "should be a size such as `6GB` or `512MiB`")
    return int(amount)


def as_list(value: Any) -> Any:
    """Return `[value]` for a single text."""
    return [value] if isinstance(value, str) else value


def _named(kind: Kind, default: str | None = None) -> BeforeValidator:
    """Return the check of a method: a known name of `kind`, or a mapping with one; without one it means `default`."""

    def check(value: Any) -> Any:
        if value is None:
            return None
        spec = {"name": default, **value} if isinstance(value, Mapping) else value
        name = spec["name"] if isinstance(spec, dict) else spec
        if isinstance(spec, dict) and name is None:
            hint = f"write `{{name: ..., field: value}}` with the name of a {kind}"
            raise PydanticCustomError("method", "needs a `name`", {"hint": hint})
        if not isinstance(name, str):
            raise PydanticCustomError("method", f"should be the name of a {kind}, or a mapping with a `name`")
        try:
            REGISTRY.find(name, kind)
        except RecipeError as error:
            raise PydanticCustomError("method", "{message}", {"message": str(error), "hint": error.hint}) from None
        return spec

    return BeforeValidator(check)


Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]
Name = Annotated[str, Strict(), Field(min_length=1, max_length=120, pattern=r"^[\w .,:;%+()\[\]=-]+$")]
Revision = Annotated[str, Strict(), Field(max_length=200, pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")]
Device = Annotated[str, Strict(), Field(pattern=r"^(cpu|mps|cuda(:[0-9]{1,3})?)$")]
Texts = Annotated[tuple[Text, ...], BeforeValidator(as_list)]
PatternText = Annotated[str, BeforeValidator(_pattern)]
Override = Annotated[str, BeforeValidator(_override)]
Bytes = Annotated[int, BeforeValidator(_bytes)]
PrunerSpec = Annotated[str | dict[str, Any], _named("pruner", "sparsegpt")]
PlanSpec = Annotated[str | dict[str, Any], _named("planner")]
TunerSpec = Annotated[str | dict[str, Any], _named("block tuner")]
AdapterSpec = Annotated[str | dict[str, Any] | None, _named("adapter", "spp"), BeforeValidator(_none)]
AroundSpec = Annotated[str | dict[str, Any] | None, _named("optimizer"), BeforeValidator(_none)]
TuningSpec = Annotated[str | dict[str, Any], _named("block tuner", "ebft")]

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Offload = Literal["ram", "disk"]
Nonfinite = Literal["error", "zero", "skip-batch"]
Fallback = Literal["error", "diag"]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Samples = Annotated[int, Strict(), Field(ge=1, le=10_000_000)]
Count = Annotated[int, Strict(), Field(ge=0)]
Length = Annotated[int, Strict(), Field(ge=2, le=10_000_000)]
Rate = Annotated[float, Field(gt=0)]
Part = Annotated[float, Field(ge=0)]
Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
Schedule = Literal["linear", "cosine", "constant"]


# the words of other libraries and of published code
SYNONYMS = {
    "dataset": "calibration",
    "nsamples": "samples",
    "num_calibration_samples": "samples",
    "seqlen": "length",
    "max_seq_length": "length",
    "max_length": "length",
    "sparsity": "pattern",
    "train_dataset": "data",
    "eval_dataset": "evaluation",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "max_grad_norm": "clip",
    "optim": "optimizer",
    "completion_only_loss": "completion_only",
    "eval_steps": "evaluate_every",
    "logging_steps": "log_every",
    "save_steps": "save_every",
    "report_to": "log_to",
}


def also(name: str) -> AliasChoices:
    """Return `name` and every synonym of it."""
    return AliasChoices(name, *(word for word, meaning in SYNONYMS.items() if meaning == name))
