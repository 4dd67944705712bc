"""Modules read as text: what a source file says about its functions and classes, without importing it.

Importing a method imports torch; reading its source takes milliseconds and gives the same words on every machine.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "secateur"
WIDTH = 100  # characters of a signature on one line

_SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
_ITEM = re.compile(r"([*\w][\w, .*]*?(?:\.\.\.)?):\s+(.*)")
_PLAIN = {"int": "whole number", "float": "number", "bool": "`True` or `False`", "str": "text", "Pruner": "a pruner"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@cache
def text_of(module: str) -> str:
    """Return the source of a module."""
    return (SOURCE / f"{module}.py").read_text(encoding="utf-8")


@cache
def parsed(module: str) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse(text_of(module))


def located(module: str, name: str) -> tuple[ast.FunctionDef | ast.ClassDef, str]:
    """Return the function or class `name` of a module, and the module that defines it: imports are followed.

    Raises:
        LookupError: if the module neither defines nor imports it.
    """
    body = parsed(module).body
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node, module
    for node in body:
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if (alias.asname or alias.name) == name and isinstance(node, ast.ImportFrom) and node.module:
                return located(node.module.removeprefix("secateur.").replace(".", "/"), alias.name)
    raise LookupError(f"`{module}` neither defines nor imports `{name}`")


def public_names(tree: ast.Module) -> Iterator[str]:
    """Yield the functions and classes of a module that have a docstring and no underscore."""
    for node in tree.body:
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and ast.get_docstring(node)
        ):
            yield node.name


def spelled(node: ast.expr | None, module: str) -> str:
    """Return an expression as its source spells it, on one line."""
    if node is None:
        return ""
    # by hand: `ast.get_source_segment` splits the whole file again for every call
    lines = _lines(module)[node.lineno - 1 : node.end_lineno]
    lines[-1] = lines[-1][: node.end_col_offset]
    lines[0] = lines[0][node.col_offset :]
    return " ".join(b" ".join(lines).decode().split())


@cache
def _lines(module: str) -> list[bytes]:
    """Return the lines of a module as bytes, which is what a syntax tree counts columns in."""
    return text_of(module).encode().split(b"\n")


def signature(node: ast.FunctionDef, module: str, *, bound: bool = False) -> str:
    """Return `name(argument: type = default, ...) -> type` as the source spells it; `bound` leaves `self` out."""
    static = any(last_word(decorator) == "staticmethod" for decorator in node.decorator_list)
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [*[None] * (len(positional) - len(given.defaults)), *given.defaults]
    if bound and not static:
        positional, defaults = positional[1:], defaults[1:]
    words = [_argument(argument, value, module) for argument, value in zip(positional, defaults, strict=True)]
    if given.vararg:
        words.append("*" + _argument(given.vararg, None, module))
    elif given.kwonlyargs:
        words.append("*")
    words += [_argument(a, value, module) for a, value in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg:
        words.append("**" + _argument(given.kwarg, None, module))
    result = f" -> {spelled(node.returns, module)}" if node.returns else ""
    return _call(node.name, words, result)


def constructor(node: ast.ClassDef, module: str) -> str:
    """Return how an object of a class is made, or an empty text for a contract or an exception without arguments."""
    if any(last_word(base) == "Protocol" for base in node.bases):
        return ""
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
            return signature(inner, module, bound=True).replace("__init__", node.name, 1).removesuffix(" -> None")
    words = []
    for inner in node.body:
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            kind = spelled(inner.annotation, module)
            if inner.target.id.startswith("_") or kind.startswith("ClassVar"):
                continue
            words.append(f"{inner.target.id}: {kind}" + (f" = {spelled(inner.value, module)}" if inner.value else ""))
    return _call(node.name, words, "") if words else ""


@dataclass
class Docstring:
    """A docstring taken apart: its text, and `{section: [(name or "", words)]}`."""

    text: list[str] = field(default_factory=list)
    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


def docstring(node: ast.AST) -> Docstring:
    """Return the docstring of a function, class or module, taken apart."""
    found = Docstring()
    raw = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) else None
    section = ""
    for line in (raw or "").splitlines():
        if line.endswith(":") and line[:-1] in _SECTIONS:
            section = line[:-1]
            found.sections[section] = []
        elif not section:
            found.text.append(line)
        elif line and not line.startswith(" "):
            section = ""
            found.text += ["", line]
        elif line.strip():
            _add(found.sections[section], section, line)
    return found


def documented(module: str, *names: str) -> dict[str, str]:
    """Return `{argument or field: words}` of the named definitions, the first that says something wins."""
    found: dict[str, str] = {}
    for name in names:
        sections = docstring(located(module, name)[0]).sections
        for section in ("Args", "Attributes"):
            for key, words in sections.get(section, []):
                for word in key.split(","):
                    if not words.startswith(("as in", "see `load`")):
                        found.setdefault(word.strip(), words)
    return found


def values_of(node: ast.expr, module: str) -> str:
    """Return in words which values a field takes, from its annotation."""
    if isinstance(node, ast.Name):
        if node.id in _PLAIN:
            return _PLAIN[node.id]
        for statement in parsed(module).body:  # an alias such as `Loss = Literal[...]`
            if isinstance(statement, ast.Assign) and any(last_word(target) == node.id for target in statement.targets):
                return values_of(statement.value, module)
    if isinstance(node, ast.Constant) and node.value is None:
        return "`None`"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return f"{values_of(node.left, module)}, or {values_of(node.right, module)}"
    if isinstance(node, ast.Subscript):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        match last_word(node.value):
            case "Literal":
                return ", ".join(f"`{spelled(part, module)}`" for part in parts)
            case "Annotated":
                return ", ".join([values_of(parts[0], module), *_bounds(parts[1:], module)])
            case "tuple":
                kinds = [values_of(part, module) for part in parts]
                return f"{len(kinds)} times: {kinds[0]}" if len(set(kinds)) == 1 else "; ".join(kinds)
    return f"`{spelled(node, module)}`"


def _argument(argument: ast.arg, value: ast.expr | None, module: str) -> str:
    words = argument.arg + (f": {spelled(argument.annotation, module)}" if argument.annotation else "")
    if value is None:
        return words
    return f"{words} = {spelled(value, module)}" if argument.annotation else f"{words}={spelled(value, module)}"


def _call(name: str, words: list[str], result: str) -> str:
    whole = f"{name}({', '.join(words)}){result}"
    return whole if len(whole) <= WIDTH else "\n".join([f"{name}(", *(f"    {word}," for word in words), f"){result}"])


def last_word(node: ast.expr) -> str:
    """Return the last word of a decorator or a base class."""
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _add(items: list[tuple[str, str]], section: str, line: str) -> None:
    """Count a line of a section as a new item, or as the rest of the last one."""
    match = _ITEM.fullmatch(line.strip()) if section not in ("Returns", "Yields") else None
    if len(line) - len(line.lstrip()) == 4 and match:
        items.append((match[1], match[2]))
    elif items:
        items[-1] = (items[-1][0], f"{items[-1][1]} {line.strip()}")
    else:
        items.append(("", line.strip()))


def _bounds(parts: Sequence[ast.expr], module: str) -> list[str]:
    words = [keyword for part in parts if isinstance(part, ast.Call) for keyword in part.keywords]
    return [f"{_BOUNDS[word.arg]} {spelled(word.value, module)}" for word in words if word.arg in _BOUNDS]
