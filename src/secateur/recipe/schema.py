"""What a recipe may say: a model, and stages that each are one function of `recipe/stages.py`.

Everything but the fields of methods is checked here, without torch; method fields are checked where methods are built.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator
from pydantic import ValidationError as PydanticError
from pydantic_core import PydanticCustomError

from secateur.core.errors import RecipeError, ResourceError
from secateur.core.progress import Progress
from secateur.core.registry import Kind
from secateur.recipe.complaints import Complaint, collect, complain
from secateur.recipe.fields import (
    SYNONYMS,
    AdapterSpec,
    AroundSpec,
    Betas,
    Bytes,
    Count,
    Device,
    Dtype,
    Fallback,
    Flag,
    Length,
    Name,
    Nonfinite,
    Offload,
    Override,
    Part,
    PatternText,
    PlanSpec,
    PrunerSpec,
    Rate,
    Revision,
    Samples,
    Schedule,
    Seed,
    Text,
    Texts,
    TunerSpec,
    TuningSpec,
    also,
    as_list,
    some,
)
from secateur.recipe.settings import change, parse_setting
from secateur.recipe.yaml_loader import Place, Positions, load_yaml
from secateur.recipe.yaml_writer import to_yaml


class _Model(BaseModel):
    """Frozen, refuses unknown keys."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Calibrated(_Model):
    """What every stage has that looks at calibration text."""

    calibration: Text | None = Field(None, validation_alias=also("calibration"))
    samples: Samples = Field(128, validation_alias=also("samples"))
    length: Length = Field(2048, validation_alias=also("length"))
    field: Name = "text"
    skip_bad: Count = 0
    batch_tokens: Samples = 8192
    seed: Seed | None = None
    device: Device | None = None
    dtype: Dtype | None = None
    offload: Offload | None = None
    nonfinite: Nonfinite = "error"

    @model_validator(mode="before")
    @classmethod
    def _flatten(cls, data: Any) -> Any:
        """Accept `calibration: {text, samples, length, field}` in place of the four keys side by side."""
        if not isinstance(data, Mapping) or not isinstance(data.get("calibration"), Mapping):
            return data
        flat = {key: value for key, value in data.items() if key != "calibration"}
        for key, value in data["calibration"].items():
            name = "calibration" if key == "text" else key
            if name in flat:
                raise PydanticCustomError("twice", "has `{key}` twice, in `calibration` and beside it", {"key": key})
            flat[name] = value
        return flat


class Prune(Calibrated):
    """Prune every linear of every block, and tune each block if there is a tuner."""

    method: PrunerSpec = "sparsegpt"
    pattern: PatternText = Field("50%", validation_alias=also("pattern"))
    plan: PlanSpec | None = None
    tuner: TunerSpec | None = None
    refit: Flag = False
    sequential: Flag = True
    error_correction: Flag = False
    guard: Flag = True
    freeze_zeros: Flag = False
    ignore: Texts = ()
    include: Texts = ()
    overrides: dict[str, Override] | None = None
    fallback: Fallback = "error"

    @model_validator(mode="before")
    @classmethod
    def _targets(cls, data: Any) -> Any:
        """Accept the `targets: Linear` of other tools, which is what happens anyway."""
        if not isinstance(data, Mapping) or "targets" not in data:
            return data
        if as_list(data["targets"]) != ["Linear"]:
            hint = "leave linears out with `ignore`, or give them another pattern with `overrides`"
            raise PydanticCustomError("targets", "has `targets` other than `Linear`", {"hint": hint})
        return {key: value for key, value in data.items() if key != "targets"}


class Tune(Calibrated):
    """Tune the blocks of a model that is already sparse; its zeros stay."""

    method: TuningSpec = "ebft"
    teacher: Text | None = None
    ignore: Texts = ()


class Finetune(_Model):
    """Train an adapter, or all kept weights, on instructions or text; zeros stay zero."""

    data: Text | None = Field(None, validation_alias=also("data"))
    adapter: AdapterSpec = "spp"
    evaluation: Text | None = Field(None, validation_alias=also("evaluation"))
    instruction_field: Name | None = None
    response_field: Name | None = None
    field: Name = "text"
    skip_bad: Count = 0
    steps: Samples | None = Field(None, validation_alias=also("steps"))
    epochs: Rate | None = Field(None, validation_alias=also("epochs"))
    length: Length = Field(1024, validation_alias=also("length"))
    batch_size: Samples = Field(8, validation_alias=also("batch_size"))
    accumulation: Samples = Field(1, validation_alias=also("accumulation"))
    learning_rate: Rate | None = Field(None, validation_alias=also("learning_rate"))
    schedule: Schedule = Field("linear", validation_alias=also("schedule"))
    warmup: Part = Field(0.03, validation_alias=also("warmup"))
    weight_decay: Part = 0.0
    betas: Betas = (0.9, 0.999)
    clip: Part = Field(1.0, validation_alias=also("clip"))
    optimizer: Name = Field("adamw_torch", validation_alias=also("optimizer"))
    around: AroundSpec = None
    completion_only: Flag = Field(True, validation_alias=also("completion_only"))
    packing: Flag = False
    gradient_checkpointing: Flag = False
    bf16: Flag | None = None
    keep_zeros: Flag = True
    compact_state: Flag = False
    evaluate_every: Samples | None = Field(None, validation_alias=also("evaluate_every"))
    log_every: Samples = Field(10, validation_alias=also("log_every"))
    save_every: Samples = Field(100, validation_alias=also("save_every"))
    log_to: Texts = Field((), validation_alias=also("log_to"))
    merge: Flag = False
    seed: Seed | None = None
    device: Device | None = None
    dtype: Dtype | None = None


class Evaluate(_Model):
    """Measure the model as the stage before left it."""

    perplexity: Texts = ()
    length: Length = Field(1024, validation_alias=also("length"))
    limit: Samples | None = None
    tasks: Texts = ()
    task_limit: Samples | None = None
    lines: Flag = False
    label: Name | None = None
    field: Name = "text"
    skip_bad: Count = 0
    batch_size: Samples | None = None
    device: Device | None = None
    dtype: Dtype | None = None


class Export(_Model):
    """Write the model as files."""

    format: Literal["checkpoint", "bitmask"] = "checkpoint"


class Stage(_Model):
    """One stage: exactly one of these keys."""

    prune: Prune | None = None
    tune: Tune | None = None
    finetune: Finetune | None = None
    evaluate: Evaluate | None = None
    export: Export | None = None

    @model_validator(mode="before")
    @classmethod
    def _one(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if len(data) != 1:
            shown = ", ".join(f"`{key}`" for key in data) or "none"
            raise PydanticCustomError(
                "stage",
                "{message}",
                {"message": f"should have exactly one stage, has {shown}", "hint": "begin every stage with `- `"},
            )
        return {kind: {} if arguments is None else arguments for kind, arguments in data.items()}

    @property
    def kind(self) -> str:
        """Name of the stage function."""
        return next(iter(self.model_fields_set))

    @property
    def body(self) -> _Model:
        """Arguments of the stage."""
        body: _Model = getattr(self, self.kind)
        return body


STAGES: dict[str, type[_Model]] = {
    "prune": Prune,
    "tune": Tune,
    "finetune": Finetune,
    "evaluate": Evaluate,
    "export": Export,
}
# which arguments of a stage are methods, and of which kind
METHODS: dict[str, dict[str, Kind]] = {
    "prune": {"method": "pruner", "plan": "planner", "tuner": "block tuner"},
    "tune": {"method": "block tuner"},
    "finetune": {"adapter": "adapter", "around": "optimizer"},
    "evaluate": {},
    "export": {},
}
# which arguments of a stage the recipe gives where the stage does not
SHARED: dict[str, tuple[str, ...]] = {
    "prune": ("seed", "device", "dtype", "offload", "memory_limit", "strict"),
    "tune": ("seed", "device", "dtype", "offload", "memory_limit", "strict"),
    "finetune": ("seed", "device", "dtype", "strict"),
    "evaluate": ("device", "dtype"),
    "export": (),
}


@dataclass(frozen=True)
class Step:
    """One stage, ready to run: `stages.<kind>(model, tokenizer, **arguments)` plus what the caller decides (output).

    Attributes:
        kind: `prune`, `tune`, `finetune`, `evaluate` or `export`.
        arguments: keyword arguments, with what the recipe says for all stages filled in.
    """

    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)


class Recipe(_Model):
    """A model and the stages it goes through.

    Attributes:
        model: folder, Hub id, `.gguf` file or `builtin:` name.
        title: heading of the report.
        seed: decides every random choice; a stage may have its own.
        stages: in order.
    """

    model: Text
    title: Name | None = None
    revision: Revision | None = None
    seed: Seed = 0
    device: Device | None = None
    dtype: Dtype | None = None
    offload: Offload = "ram"
    memory_limit: Bytes | None = None
    strict: Flag = False
    allow_pickle: Flag = False
    trust_remote_code: Flag = False
    stages: Annotated[tuple[Stage, ...], BeforeValidator(some)]

    _raw: dict[str, Any] = PrivateAttr(default_factory=dict)
    _positions: Positions = PrivateAttr(default_factory=lambda: Positions("recipe"))

    @classmethod
    def load(cls, path: Path | str, settings: Iterable[str] = ()) -> Self:
        """Return the recipe in a YAML file.

        Args:
            path: the file.
            settings: changes on top of it, such as `stages.0.prune.pattern=2:4`.

        Raises:
            RecipeError: naming file, line and column of every mistake, at most 20.
        """
        data, positions = load_yaml(path)
        if not isinstance(data, dict):
            raise RecipeError("a recipe is a mapping with the keys `model` and `stages`", where=str(path))
        return cls._checked(data, positions, settings)

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], *, settings: Iterable[str] = (), positions: Positions | None = None
    ) -> Self:
        """Return the recipe that `data` describes.

        Args:
            data: what the YAML file would hold.
            settings: changes on top of it.
            positions: how messages name the places.

        Raises:
            RecipeError: naming every mistake, at most 20.
        """
        return cls._checked(dict(data), positions or Positions("recipe"), settings)

    def override(self, settings: Iterable[str]) -> Self:
        """Return the recipe with `settings` such as `stages.0.prune.pattern=2:4` on top.

        Raises:
            RecipeError: if a path does not lead anywhere, or the value is not allowed there.
        """
        return self._checked(self._raw, self._positions, settings)

    @classmethod
    def _checked(cls, data: dict[str, Any], positions: Positions, settings: Iterable[str]) -> Self:
        texts = list(settings)
        changes = [parse_setting(setting, positions.hidden) for setting in texts]
        data = change(data, changes)
        shown = {place: f"--set {text}" for (place, _), text in zip(changes, texts, strict=True)}
        nested = {
            (*key[:3], key[4]): spot
            for key, spot in positions.keys.items()
            if len(key) == 5 and key[3] == "calibration"
        }
        positions = replace(positions, keys=nested | positions.keys, settings=positions.settings | shown)
        try:
            recipe = cls.model_validate(data)
        except PydanticError as error:
            items = error.errors(include_url=False)
            raise collect(complain(item, positions, _known(item["loc"]), SYNONYMS) for item in items) from None
        recipe._raw, recipe._positions = data, positions
        return recipe

    def check(self) -> None:
        """Build every method of the recipe, so that a wrong hyper-parameter is found before anything starts.

        Raises:
            RecipeError: naming every method that cannot be built.
        """
        from secateur.recipe.build import build_method

        complaints: list[Complaint] = []
        for index, stage in enumerate(self.stages):
            for name, wanted in METHODS[stage.kind].items():
                try:
                    if (spec := getattr(stage.body, name)) is not None:
                        build_method(spec, wanted, where=name)
                except RecipeError as error:
                    where = self._positions.of(("stages", index, stage.kind, name))
                    complaints += [Complaint(where, line, error.hint) for line in str(error).splitlines()]
        if complaints:
            raise collect(complaints)

    def loading(self) -> dict[str, Any]:
        """Return how `model` is to be opened: keyword arguments of `stages.load` and of every stage given a name."""
        return {name: getattr(self, name) for name in ("allow_pickle", "trust_remote_code", "revision")}

    def steps(self) -> list[Step]:
        """Return the stages with what the recipe says for all of them filled in; methods stay names or mappings."""
        result = []
        for stage in self.stages:
            arguments = stage.body.model_dump()
            for name in SHARED[stage.kind]:
                if arguments.get(name) is None:
                    arguments[name] = getattr(self, name)
            result.append(Step(stage.kind, arguments))
        return result

    def resolved(self) -> dict[str, Any]:
        """Return the recipe as plain data with every default written out, those of the methods too."""
        from secateur.recipe.build import build_method, describe

        stages = []
        for step in self.steps():
            body = {name: step.arguments[name] for name in STAGES[step.kind].model_fields}
            for name, wanted in METHODS[step.kind].items():
                if body[name] is not None:
                    body[name] = describe(build_method(body[name], wanted, where=name))
            stages.append({step.kind: body})
        plain: dict[str, Any] = json.loads(json.dumps({**self.model_dump(exclude={"stages"}), "stages": stages}))
        return plain

    def digest(self) -> str:
        """Return the sha256 of what the recipe does: recipes that differ in spelling or title alone are equal."""
        meaning = {key: value for key, value in self.resolved().items() if key != "title"}
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path | str) -> None:
        """Write the resolved recipe as YAML that `load` reads, in one step."""
        target = Path(path)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(to_yaml(self.resolved()), encoding="utf-8")
            temporary.replace(target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ResourceError(f"cannot write `{path}`: {error.strerror}") from None

    def run(
        self, output: Path | str, resume: bool = False, *, overwrite: bool = False, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Run every stage and return the report of the run; see `secateur.recipe.run.run`."""
        from secateur.recipe.run import run

        return run(self, Path(output), resume=resume, overwrite=overwrite, progress=progress)


def _known(place: Place) -> list[str]:
    """Return the keys that are allowed beside the last key of `place`, aliases left out."""
    if len(place) == 1:
        return list(Recipe.model_fields)
    if len(place) == 3:
        return list(STAGES)
    if len(place) == 4 and place[2] in STAGES:
        return list(STAGES[str(place[2])].model_fields)
    return []
