"""What makes a class a method: its fields are its hyper-parameters, checked and frozen."""

from __future__ import annotations

from typing import TypeVar, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

C = TypeVar("C")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def method(cls: type[C]) -> type[C]:
    """Return `cls` as a frozen, validated dataclass that refuses unknown fields.

    Its instances compare, hash and print by their hyper-parameters: `DSnoT(base=Wanda(), cycles=20)`.
    """
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    checked: type[C] = dataclass(frozen=True, kw_only=True, config=config)(cls)  # type: ignore[assignment]
    return checked
