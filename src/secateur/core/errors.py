"""The tree of errors: what went wrong, where, and what to do about it.

    SecateurError
    ├── RecipeError           exit 2   a recipe, a flag or an argument is wrong
    │   └── PatternError               a pattern does not fit a layer
    ├── InputError            exit 3   a model, tokenizer or data file is wrong or unsupported
    ├── NumericError          exit 4   NaN, infinity, or no usable factorisation
    ├── ResourceError         exit 5   memory, disk, permissions, limits
    ├── StateError            exit 6   resume state, lock or existing output conflicts
    └── TimeLimitReached      exit 75  stopped cleanly at a block boundary, resumable

The Python API raises these; the command line prints `str(error)`, then the hint, and leaves with `exit_code`.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class SecateurError(Exception):
    """Any failure that is not a bug.

    Args:
        message: one sentence with the field, the value and what is allowed.
        where: file, line, tensor or block, when the message does not say it already.
        hint: what to do next, in one short sentence.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.where = where
        self.hint = hint


class RecipeError(SecateurError):
    """A recipe, a flag or an argument is wrong."""

    exit_code = 2


class PatternError(RecipeError):
    """A sparsity pattern is malformed or does not fit a layer."""


class InputError(SecateurError):
    """A model, a tokenizer or a data file is wrong or not supported."""

    exit_code = 3


class NumericError(SecateurError):
    """A value is not finite, or a matrix has no usable factorisation."""

    exit_code = 4


class ResourceError(SecateurError):
    """Memory, disk, permissions or another limit does not suffice."""

    exit_code = 5


class StateError(SecateurError):
    """Resume state, a lock or an existing output conflicts with the request."""

    exit_code = 6


class TimeLimitReached(SecateurError):
    """The run stopped cleanly at a block boundary because its time was over; it can be resumed."""

    exit_code = 75


def missing_extra(package: str, extra: str, purpose: str) -> InputError:
    """Return the error for an optional `package` that is not installed; `purpose` completes "is needed to ..."."""
    return InputError(
        f"the package `{package}` is needed to {purpose} and is not installed",
        hint=f"pip install 'secateur[{extra}]'",
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `' (did you mean `x`?)'` for the nearest known words, or an empty string."""
    close = get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" (did you mean {', '.join(f'`{name}`' for name in close)}?)" if close else ""
