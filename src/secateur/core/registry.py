"""The table of methods: data only, nothing is imported until a method is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from secateur.core.errors import RecipeError, did_you_mean

Kind = Literal["pruner", "block tuner", "planner", "adapter", "surgery", "optimizer"]


@dataclass(frozen=True)
class Entry:
    """One line of the shelf.

    Attributes:
        name: the word users type.
        kind: what contract it fulfils.
        target: `module:Class`, imported on first use.
        paper: authors, venue and arXiv number.
        patterns: the patterns it can give, in words.
        needs: the calibration statistics it reads, in words.
        summary: what it does, in one line.
    """

    name: str
    kind: Kind
    target: str
    paper: str
    patterns: str
    needs: tuple[str, ...]
    summary: str

    def load(self) -> type[Any]:
        """Import and return the class."""
        module, _, name = self.target.partition(":")
        loaded: type[Any] = getattr(import_module(module), name)
        return loaded


class Registry:
    """Methods by name; iterates in the order of the table."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries: dict[str, Entry] = {}
        for entry in entries:
            if entry.name in self._entries:
                raise ValueError(f"the method name `{entry.name}` is taken twice in the registry")
            self._entries[entry.name] = entry

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def find(self, name: str, kind: Kind | None = None) -> Entry:
        """Return the entry called `name`.

        Raises:
            RecipeError: if there is none, or it is of another kind than asked for.
        """
        entry = self._entries.get(name)
        if entry is None:
            known = [e.name for e in self if kind is None or e.kind == kind]
            raise RecipeError(
                f"no {kind or 'method'} is called `{name}`{did_you_mean(name, known)}",
                hint=f"known: {', '.join(known)}",
            )
        if kind is not None and entry.kind != kind:
            known = [e.name for e in self if e.kind == kind]
            raise RecipeError(f"`{name}` is a {entry.kind}, not a {kind}", hint=f"known: {', '.join(known)}")
        return entry

    def entry_of(self, method: object) -> Entry | None:
        """Return the entry whose class `method` is an instance of, or None for a method that is not on the shelf."""
        cls = type(method)
        target = f"{cls.__module__}:{cls.__qualname__}"
        return next((entry for entry in self if entry.target == target), None)
