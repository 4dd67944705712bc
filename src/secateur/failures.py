"""What the command line says and returns when something ends it: one line, a hint, and an exit code of its own."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import typer

from secateur.core.errors import RecipeError, ResourceError, SecateurError, did_you_mean
from secateur.printing import printable
from secateur.stopping import Stopped

BROKEN_PIPE = 141
_RESOURCE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EMFILE,
    errno.ENFILE,
}

# a newer typer carries click inside, an older one beside itself: the class is taken from where both show it
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def exit_code(error: BaseException, *, debug: bool) -> int:
    """Say on stderr what went wrong and return the exit code for it."""
    if isinstance(error, typer.Exit):
        sys.stdout.flush()
        return int(error.exit_code)
    # rich turns a closed stdout into an exit with code 1
    if isinstance(error.__context__ if isinstance(error, SystemExit) else error, BrokenPipeError):
        return silence()
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1 if error.code else 0
    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, _UsageError):
        return _usage(error)
    if isinstance(error, SecateurError):
        _say(str(error), error.hint)
        return error.exit_code
    if isinstance(error, Stopped):
        _say(str(error), "--resume goes on with an unfinished run")
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        _say("interrupted")
        return 130
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        _say("out of memory", "lower --batch-tokens or --samples, or use --offload disk")
        return ResourceError.exit_code
    if isinstance(error, OSError) and error.errno in _RESOURCE_ERRORS:
        _say(f"{error.strerror}: `{error.filename}`" if error.filename else str(error))
        return ResourceError.exit_code
    _say(
        f"unexpected {type(error).__name__}: {str(error) or 'no message'}",
        "this is a bug, please report it; --debug shows where it happened",
        first_line_only=True,
    )
    return 1


def _usage(error: Any) -> int:
    """Show a mistake on the command line."""
    context = getattr(error, "ctx", None)
    message = str(error.format_message()).rstrip(".")
    if not getattr(error, "possibilities", None) and (word := getattr(error, "option_name", None)) and context:
        known = [option for parameter in context.command.params for option in parameter.opts]
        message = f"No such option `{word}`{did_you_mean(word, known)}" if word not in known else message
    path = context.command_path if context else "secateur"
    _say(message[:1].lower() + message[1:], f"see `{path} --help`")
    return RecipeError.exit_code


def _say(message: str, hint: str | None = None, *, first_line_only: bool = False) -> None:
    """Write an error and its hint to stderr; control characters of foreign texts are shown, not sent."""
    lines = [line for line in message.splitlines() if line.strip()] or ["unknown"]
    for line in lines[:1] if first_line_only else lines:
        sys.stderr.write(f"error: {printable(line)}\n")
    if hint:
        sys.stderr.write(f"hint: {printable(hint)}\n")
    sys.stderr.flush()


def silence() -> int:
    """Send what is left in stdout nowhere, so that the interpreter's end does not fail on it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, stream.fileno())
            os.close(devnull)
    return BROKEN_PIPE
