"""Change one value deep inside plain data: `stages.0.prune.pattern=2:4`, what `--set` does."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

from secateur.core.errors import RecipeError
from secateur.recipe.yaml_loader import MAX_DEPTH, Place, parse_value

_SEGMENT = re.compile(r'"([^"]+)"|([^".]+)')
NAMED = (
    "method",
    "plan",
    "tuner",
    "base",
    "adapter",
    "around",
)  # values that are a method: its name, or a mapping with a `name`


def parse_setting(setting: str, inside: Place = ()) -> tuple[Place, Any]:
    """Return the path and the value of `a.b=value`; a path segment with dots in it stands in double quotes.

    Args:
        setting: what follows `--set`.
        inside: the path that the setting's own path continues.

    Raises:
        RecipeError: if there is no `=`, or the path is malformed.
    """
    path, equals, value = setting.partition("=")
    hint = "write `--set tuner.epochs=10`"
    if not equals:
        raise RecipeError(f"`--set {setting}` has no `=`", hint=hint)
    place: list[str | int] = []
    rest = path.strip()
    while match := _SEGMENT.match(rest):
        word = match[1] or match[2]
        place.append(int(word) if match[1] is None and word.isascii() and word.isdigit() and len(word) < 9 else word)
        rest = rest[match.end() :]
        if not rest:
            break
        if not rest.startswith("."):
            break
        rest = rest[1:] or "."  # a dot at the end is not a path
    if rest or not place or len(place) > MAX_DEPTH:
        raise RecipeError(f"`{path}` in `--set {setting}` is not a path of names joined by dots", hint=hint)
    return (*inside, *place), parse_value(value.strip())


def change(data: Any, settings: Iterable[tuple[Place, Any]]) -> Any:
    """Return a copy of `data` with every value of `settings` put at its path; missing mappings on the way are made.

    A method given by its name alone becomes `{name: ...}` when a field of it is set.

    Raises:
        RecipeError: if a path leads through a value that has no parts, or to a list item that is not there.
    """
    result = copy.deepcopy(data)
    for place, value in settings:
        _put(result, place, value)
    return result


def _put(data: Any, place: Place, value: Any) -> None:
    shown = ".".join(map(str, place))
    here = data
    for depth, segment in enumerate(place):
        last = depth == len(place) - 1
        if isinstance(here, list):
            if not isinstance(segment, int) or segment >= len(here):
                raise RecipeError(
                    f"`--set {shown}`: `{segment}` is not one of the {len(here)} items there", hint="items count from 0"
                )
            slot: Any = segment
        elif isinstance(here, dict):
            slot = str(segment)
        else:
            raise RecipeError(f"`--set {shown}`: `{'.'.join(map(str, place[:depth]))}` has no parts to set")
        if last:
            if slot in NAMED and isinstance(here, dict) and isinstance(here.get(slot), dict) and isinstance(value, str):
                value = {"name": value}  # another method: the fields of the one before do not carry over
            here[slot] = value
            return
        inner = here[slot] if isinstance(here, list) else here.get(slot)
        if inner is None:
            inner = here[slot] = {}
        elif isinstance(inner, str) and slot in NAMED:
            inner = here[slot] = {"name": inner}
        here = inner
