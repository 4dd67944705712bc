"""JSON from files that strangers wrote: bounded in size, no key twice, no deep nesting, only typed errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.core.errors import InputError

MEGABYTE = 1_000_000
MAX_DEPTH = 32

Pairs = list[tuple[str, Any]]


def parse(data: bytes, where: str, hook: Callable[[Pairs], Any] | None = None) -> Any:
    """Return the value of a JSON document.

    Args:
        data: the document, UTF-8.
        where: the file, for messages.
        hook: what to build from the pairs of an object, a dict by default; it sees every object, inner ones first.

    Raises:
        InputError: it is not UTF-8 or not JSON, repeats a key, or nests too deeply.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=hook or (lambda pairs: unique(pairs, where)))
    except UnicodeDecodeError as error:
        raise InputError(f"`{where}` is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise InputError(f"`{where}` nests too deeply") from error
    except ValueError as error:
        raise InputError(f"`{where}` is not valid JSON: {error}") from error


def unique(pairs: Pairs, where: str) -> dict[str, Any]:
    """Return the pairs as a dict.

    Raises:
        InputError: a key is there twice, so that readers would disagree about its value.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InputError(f"`{where}` has the key `{double[:80]}` twice")
    return found


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """Return the JSON object in a file of at most `limit` bytes.

    Raises:
        InputError: the file is larger, or not one JSON object.
    """
    size = path.stat().st_size
    if size > limit:
        raise InputError(f"`{path}` has {size:,} bytes, at most {limit:,} are allowed")
    found = parse(path.read_bytes(), str(path))
    if not isinstance(found, dict):
        raise InputError(f"`{path}` must hold a JSON object, not {_kind(found)}")
    level: list[Any] = [found]
    for _ in range(MAX_DEPTH):
        level = [item for value in level for item in _items(value)]
        if not level:
            return found
    raise InputError(f"`{path}` nests deeper than {MAX_DEPTH} levels")


def _items(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in inner if isinstance(item, dict | list)]


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
