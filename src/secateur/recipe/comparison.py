"""What a comparison is asked to do, checked before anything heavy is imported: the rows of its table, and their settings."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field
from pydantic import ValidationError as PydanticError

from secateur.core.errors import RecipeError, did_you_mean
from secateur.core.registry import Kind
from secateur.methods.registry import REGISTRY
from secateur.recipe.build import build_method, describe
from secateur.recipe.complaints import Complaint, collect, complain
from secateur.recipe.fields import (
    SYNONYMS,
    Bytes,
    Device,
    Dtype,
    Fallback,
    Flag,
    Length,
    Name,
    Offload,
    Override,
    PatternText,
    PrunerSpec,
    Revision,
    Samples,
    Seed,
    Text,
    Texts,
    TunerSpec,
    also,
    as_list,
)
from secateur.recipe.schema import Calibrated
from secateur.recipe.settings import change, parse_setting
from secateur.recipe.yaml_loader import Positions

Statistics = Literal["own", "shared"]
NO_TUNER = "none"
UNIFORM = "uniform"
DENSE = "dense"
ALL = "all"


def _unless(word: str) -> BeforeValidator:
    """Return the check that lets `word` stand for no method at all."""
    return BeforeValidator(lambda value: None if value == word else value)


Tuner = Annotated[TunerSpec | None, _unless(NO_TUNER)]
PlanSpec = Annotated[str | dict[str, Any] | None, _unless(UNIFORM)]


class Comparison(Calibrated):
    """The arguments of `compare`, as the command line gives them."""

    model: Text
    methods: Annotated[tuple[PrunerSpec, ...], BeforeValidator(as_list), Field(min_length=1)]
    pattern: Annotated[tuple[PatternText, ...], BeforeValidator(as_list), Field(min_length=1)] = Field(
        ("50%",), validation_alias=also("pattern")
    )
    tuner: Annotated[tuple[Tuner, ...], BeforeValidator(as_list), Field(min_length=1)] = (None,)
    plan: Annotated[tuple[PlanSpec, ...], BeforeValidator(as_list), Field(min_length=1)] = (None,)
    perplexity: Texts = ()
    window: Length = 1024
    limit: Samples | None = None
    lines: Flag = False
    batch_size: Samples | None = None
    statistics: Statistics = "own"
    refit: Flag = False
    sequential: Flag = True
    error_correction: Flag = False
    guard: Flag = True
    freeze_zeros: Flag = False
    ignore: Texts = ()
    include: Texts = ()
    overrides: dict[str, Override] | None = None
    fallback: Fallback = "error"
    keep_models: Flag = False
    title: Name | None = None
    # a comparison stands alone: what a recipe says for all its stages has its defaults here
    seed: Seed = 0
    device: Device | None = None
    dtype: Dtype | None = None
    offload: Offload = "ram"
    memory_limit: Bytes | None = None
    strict: Flag = False
    allow_pickle: Flag = False
    trust_remote_code: Flag = False
    revision: Revision | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, settings: Iterable[str] = ()) -> Self:
        """Return the comparison that `data` describes.

        Args:
            data: the arguments of `compare`, methods by name.
            settings: `METHOD.field=value`, a hyper-parameter of one of the methods, tuners or planners that are named.

        Raises:
            RecipeError: naming every mistake, at most 20.
        """
        positions = Positions("")
        try:
            named = {**data, "methods": spelled_out(data["methods"])} if "methods" in data else data
            asked = cls.model_validate(_set(named, list(settings)))
        except PydanticError as error:
            items = error.errors(include_url=False)
            raise collect(complain(item, positions, cls.model_fields, SYNONYMS) for item in items) from None
        asked.check()
        return asked

    def check(self) -> None:
        """Build every method, so that a wrong hyper-parameter is found before anything starts.

        Raises:
            RecipeError: naming every method that cannot be built.
        """
        complaints: list[Complaint] = []
        for argument, kind in KINDS.items():
            for spec in getattr(self, argument):
                try:
                    if spec is not None:
                        build_method(spec, kind, where=argument)
                except RecipeError as error:
                    complaints += [Complaint("", line, error.hint) for line in str(error).splitlines()]
        if complaints:
            raise collect(complaints)

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `compare`, the model left out."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "model"}


KINDS: dict[str, Kind] = {"methods": "pruner", "tuner": "block tuner", "plan": "planner"}


@dataclass(frozen=True)
class Row:
    """One line of the table: what is done to the dense model; nothing at all where `method` is None.

    Attributes:
        method: the pruner.
        plan: the planner; None gives every linear the same pattern.
        tuner: the block tuner; None tunes nothing.
        pattern: as text.
        names: what method, plan and tuner are called in the table.
    """

    method: Any = None
    plan: Any = None
    tuner: Any = None
    pattern: str | None = None
    names: tuple[str, str | None, str] = (DENSE, None, NO_TUNER)

    @property
    def label(self) -> str:
        """What progress and errors call this row."""
        if self.method is None:
            return DENSE
        method, plan, tuner = self.names
        words = [method, str(self.pattern)]
        words += [f"plan {plan}"] if self.plan is not None else []
        words += [f"tuner {tuner}"] if self.tuner is not None else []
        return ", ".join(words)

    def settings(self) -> dict[str, Any]:
        """Return what is done, every hyper-parameter written out, as plain data.

        It is that of the first time, also where a method of the user's own changes itself while it works.
        """
        return copy.deepcopy(self._described)

    @functools.cached_property
    def _described(self) -> dict[str, Any]:
        found = {"method": self.method, "plan": self.plan, "tuner": self.tuner}
        plain: dict[str, Any] = {name: None if made is None else describe(made) for name, made in found.items()}
        return {**plain, "pattern": self.pattern}


def spelled_out(methods: Any) -> list[Any]:
    """Return a list of methods in which `all` stands for every pruner of the shelf that is not named beside it."""
    given = list(methods) if isinstance(methods, list | tuple) else [methods]
    if not any(map(_is_all, given)):
        return given
    named = {_name(method) for method in given}
    others = [entry.name for entry in REGISTRY if entry.kind == "pruner" and entry.name not in named]
    place = next(index for index, method in enumerate(given) if _is_all(method))
    rest = [method for method in given[place:] if not _is_all(method)]
    return [*given[:place], *others, *rest]


def _is_all(method: Any) -> bool:
    return isinstance(method, str) and method == ALL


def _name(method: Any) -> str | None:
    """Return the name on the shelf of a method given as a name, a mapping or an object."""
    if isinstance(method, str):
        return method
    if isinstance(method, Mapping):
        return method.get("name")
    entry = REGISTRY.entry_of(method)
    return None if entry is None else entry.name


def rows(methods: Sequence[Any], plans: Sequence[Any], tuners: Sequence[Any], patterns: Sequence[str]) -> list[Row]:
    """Return the rows of a table in its order: the dense model, then pattern by pattern, all methods of each together.

    Args:
        methods: pruner objects.
        plans: planner objects, or None for equal patterns.
        tuners: block tuner objects, or None.
        patterns: texts.

    Raises:
        RecipeError: if two rows would be the same.
    """
    called = {
        id(made): name for group in (methods, plans, tuners) for made, name in zip(group, names(group), strict=True)
    }
    found = [Row()]
    for pattern, plan, tuner, method in itertools.product(patterns, plans, tuners, methods):
        words = (
            called[id(method)],
            UNIFORM if plan is None else called[id(plan)],
            NO_TUNER if tuner is None else called[id(tuner)],
        )
        found.append(Row(method, plan, tuner, pattern, words))
    seen: list[dict[str, Any]] = []
    for row in found:
        if row.settings() in seen:
            raise RecipeError(f"the row `{row.label}` is asked for twice", hint="name every method and pattern once")
        seen.append(row.settings())
    return found


def names(made: Sequence[Any]) -> list[str]:
    """Return a name for each method object: that of the shelf, with the fields in which objects of one name differ."""
    described = [{"name": NO_TUNER} if one is None else describe(one) for one in made]
    result = []
    for here in described:
        alike = [other for other in described if other["name"] == here["name"]]
        differing = [key for key in here if any(other.get(key) != here[key] for other in alike)]
        fields = ", ".join(f"{key}={_word(here[key])}" for key in differing)
        result.append(f"{here['name']} ({fields})" if fields else str(here["name"]))
    return result


def _word(value: Any) -> str:
    return str(value["name"]) if isinstance(value, Mapping) and "name" in value else str(value)


def _set(data: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return `data` with every `METHOD.field=value` put into the methods of that name."""
    result = dict(data)
    for argument in KINDS:
        if argument in result:
            result[argument] = list(as_list(result[argument]))
    for setting in settings:
        place, value = parse_setting(setting)
        named = [
            (argument, index)
            for argument in KINDS
            for index, spec in enumerate(result.get(argument, ()))
            if place[0] == (spec.get("name") if isinstance(spec, Mapping) else spec)
        ]
        if len(place) < 2 or not named:
            known = [str(spec) for argument in KINDS for spec in data.get(argument, ()) if isinstance(spec, str)]
            raise RecipeError(
                f"`--set {setting}` begins with none of the methods compared{did_you_mean(str(place[0]), known)}",
                hint="write `--set METHOD.field=value`, such as `--set sparsegpt.damping=0.1`",
            )
        for argument, index in named:
            wrapped = {"method": result[argument][index]}
            result[argument][index] = change(wrapped, [(("method", *place[1:]), value)])["method"]
    return result
