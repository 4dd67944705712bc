"""Turn everything that one validation pass found into one error that names each place and what is allowed there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from secateur.core.errors import PatternError, RecipeError, did_you_mean
from secateur.recipe.yaml_loader import Place, Positions

MAX_SHOWN = 20
_WORDS = dict.fromkeys(("model_type", "dict_type", "model_attributes_type"), "should be a mapping")
_WORDS |= dict.fromkeys(("list_type", "tuple_type"), "should be a list")
# their text says it all, the value would only repeat it
_WHOLE = {"pattern", "method", "twice", "stage", "targets", "empty"}


@dataclass(frozen=True)
class Complaint:
    """One mistake.

    Attributes:
        where: file, line and column, or empty.
        message: one sentence with field, value and what is allowed.
        hint: what to do.
        pattern: whether the mistake is in a sparsity pattern.
    """

    where: str
    message: str
    hint: str | None = None
    pattern: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


def collect(complaints: Iterable[Complaint]) -> RecipeError:
    """Return one error with a line for each complaint, at most 20, in the order given."""
    every = list(complaints)
    lines = list(dict.fromkeys(str(complaint) for complaint in every))
    if len(lines) > MAX_SHOWN:
        lines[MAX_SHOWN:] = [f"and {len(lines) - MAX_SHOWN} more mistakes"]
    hints = dict.fromkeys(complaint.hint for complaint in every if complaint.hint)
    kind = PatternError if all(complaint.pattern for complaint in every) else RecipeError
    return kind("\n".join(lines), hint="; ".join(islice(hints, 3)) or None)


def complain(
    item: Mapping[str, Any], positions: Positions, known: Iterable[str], synonyms: Mapping[str, str] | None = None
) -> Complaint:
    """Return the complaint for one entry of pydantic's list of errors.

    Args:
        item: `loc`, `type`, `msg`, `input` and `ctx` of the entry.
        positions: where the keys stand.
        known: the keys that are allowed where the entry's last key stands.
        synonyms: other words for some of them.
    """
    place: Place = tuple(item["loc"])
    kind, context = item["type"], item.get("ctx") or {}
    name = positions.shown(place)
    where = positions.of(place)
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        allowed, word = list(known), str(place[-1])
        meaning = (synonyms or {}).get(word)
        if meaning in allowed:
            return Complaint(where, f"`{name}` is another word for `{meaning}`, which is given as well")
        nearest = did_you_mean(word, allowed)
        hint = f"known here: {', '.join(allowed)}" if allowed and not nearest else None
        return Complaint(where, f"`{name}` is not a known key{nearest}", hint)
    if kind == "missing":
        return Complaint(where, f"`{name}` is missing")
    text = _WORDS.get(kind) or re.sub(r"^(Input|String|Value) should", "should", str(item["msg"]))
    if kind in _WHOLE:
        join = ": " if kind in ("pattern", "method") else " "
        return Complaint(where, f"`{name}`{join}{text}", context.get("hint"), pattern=kind == "pattern")
    return Complaint(where, f"`{name}` {text}, got {shorten(item['input'])}", context.get("hint"))


def shorten(value: Any) -> str:
    """Return at most 80 characters that show `value` on one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
