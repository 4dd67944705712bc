"""What every adapter can be told, and how PEFT comes to know it.

PEFT keeps its methods in mappings by name and its own registration refuses names outside its enum, so `register`
writes into the mappings, under names of our own (`secateur_spp`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn

from secateur.core.errors import InputError, RecipeError, did_you_mean
from secateur.train.peft_parts import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PeftConfig,
    get_pattern_key,
)

if TYPE_CHECKING:
    from secateur.train.adapter_model import AdapterModel

FORMAT = 1  # of what is stored in `adapter_config.json`


class MethodName(str):
    """The name of a method in PEFT's mappings and files: a string that also answers as PEFT's enum does."""

    @property
    def value(self) -> str:
        """The plain string."""
        return str(self)


def register(config: type[AdapterConfig], tuner: type[AdapterModel]) -> None:
    """Make a method known to PEFT: its configuration, its tuner, and the prefix of its tensors.

    Doing it twice is harmless.

    Raises:
        ValueError: another method has the name or the prefix already.
    """
    name = method_name(config)
    if tuner.prefix != f"{name}_":
        raise ValueError(f"the prefix of `{tuner.__name__}` must be `{name}_`, got `{tuner.prefix}`")
    for mapping, mine in (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, tuner.prefix),
    ):
        if mapping.get(name, mine) != mine:
            raise ValueError(f"PEFT knows another method called `{name}`")
        mapping[name] = mine


def method_name(config: type[AdapterConfig]) -> MethodName:
    """Return the name under which PEFT knows the method of a configuration: `secateur_` and its short name."""
    return MethodName(f"secateur_{config.method}")


@dataclass
class AdapterConfig(PeftConfig):  # type: ignore[misc]
    """What every adapter can be told, and what it remembers of the model it was made for.

    Attributes:
        target_modules: names or name endings of the linears to adapt, a regular expression, or "all-linear"; None: every
            prunable linear of the blocks.
        exclude_modules: names, name endings or a regular expression of what to leave out of those.
        modules_to_save: modules to train and save whole beside the adapter, such as a new head.
        layers_to_transform: numbers of the blocks to adapt; None: all.
        layers_pattern: name of the list of blocks, for `layers_to_transform` in models that PEFT does not know.
        target_parameters: not supported, experts are unpacked first; here because PEFT asks for it.
        trainable_token_indices: token embeddings to train beside the adapter, for added tokens.
        init_weights: start as the base model; False draws every tensor at random, for tests.
        seed: of the random start; each linear draws from its own stream, so the order of modules does not matter.
        check_base: refuse a model other than the one that the adapter was made for.
        base_weights: `{linear: shape, dtype, digest of its zeros, digest of its values}`, filled in by the tuner.
        format_version: of this record.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_weights: bool = True
    seed: int = 0
    check_base: bool = True
    base_weights: dict[str, str] | None = None
    format_version: int = FORMAT

    method: ClassVar[str]
    suggested_rate: ClassVar[float] = 2e-4  # the learning rate to begin with
    records: ClassVar[frozenset[str]] = frozenset(
        {"target_parameters", "base_weights", "format_version"}
    )  # not settings

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = method_name(type(self))
        if self.format_version > FORMAT:
            raise InputError(
                f"the adapter has format version {self.format_version}, this version of secateur reads up to {FORMAT}",
                hint="pip install --upgrade secateur",
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise RecipeError(f"`{name}` needs `target_modules` as a list of names, not a regular expression")

    def callbacks(self) -> list[Any]:
        """Return what transformers' Trainer must call while the adapter is trained."""
        return []

    def prepared(self, model: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> Self:
        """Return the settings with what is to be known of `model` before its adapter is created; the default is itself.

        Args:
            model: that is to be tuned, left as it is.
            batches: gives token ids `(batch, tokens)` of the training data.
        """
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data; sets become sorted lists, so that equal adapters have equal files."""
        plain = {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}
        return plain | {"peft_type": str(self.peft_type)}


def rank_of(config: Any, name: str) -> int:
    """Return the `r` of the linear `name`: that of the first key of `rank_pattern` that fits, or `config.r`."""
    patterns = config.rank_pattern or {}
    return int(patterns.get(get_pattern_key(patterns.keys(), name), config.r))


def check_pattern_keys(config: Any, names: Sequence[str]) -> None:
    """Raise RecipeError unless every key of `rank_pattern` and `alpha_pattern` fits a linear, as PEFT matches them.

    Args:
        config: of any LoRA-like method.
        names: of the linears that are adapted.
    """
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field, None) or {}:
            if not any(get_pattern_key([key], name) == key for name in names):
                endings = {".".join(name.split(".")[-size:]) for name in names for size in (1, 2, key.count(".") + 1)}
                raise RecipeError(
                    f"`{field}` has the key `{key}`, which fits no linear that is adapted{did_you_mean(key, endings)}",
                    hint="a key is a linear's name or the end of it, such as `down_proj`, or a regular expression for that",
                )


def check_expressions(field: str, patterns: Mapping[str, object] | None) -> None:
    """Raise RecipeError unless PEFT can match all keys of the field `field`: names, endings of names, or expressions."""
    for key in patterns or {}:
        try:
            get_pattern_key([key], "")
        except re.error as error:
            raise RecipeError(f"`{field}` has the key {key!r}, which is not a regular expression: {error}") from error


def check_rank(r: object, rank_pattern: object = None, name: str = "r") -> None:
    """Raise RecipeError unless the field `name`, and every value of `rank_pattern`, is a whole number from 1."""
    if rank_pattern is not None and not isinstance(rank_pattern, dict):
        raise RecipeError(f"`rank_pattern` must be a mapping of linears to ranks, got {rank_pattern!r}")
    check_expressions("rank_pattern", rank_pattern)
    for field, value in [
        (name, r),
        *((f"rank_pattern[{key!r}]", value) for key, value in (rank_pattern or {}).items()),
    ]:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RecipeError(f"`{field}` must be a whole number from 1, got {value!r}")


def check_rate(name: str, value: object) -> None:
    """Raise RecipeError unless the field `name` is a probability below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise RecipeError(f"`{name}` must be at least 0 and below 1, got {value!r}")


def check_finite(name: str, value: object) -> None:
    """Raise RecipeError unless the field `name` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecipeError(f"`{name}` must be a finite number, got {value!r}")
