"""Read YAML that nobody vouches for: plain data only, limits checked while parsing, a position for every value.

Values are built from parser events one by one, so a file that would expand to millions of nodes is refused before it
does. Scalars follow YAML 1.2: `2:4` is a text (YAML 1.1 reads 124), `1e-3` a number, `yes` and `on` are texts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from secateur.core.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NODES = 10_000  # aliases count with everything they stand for

Place = tuple[str | int, ...]  # ("stages", 0, "prune", "pattern")
Event = Any  # yaml.Event: the stubs know no attributes of its kinds

# libyaml where PyYAML was built with it: 20 times faster, so that a file of the largest size allowed is refused in time
_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_INT = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
}


@dataclass
class Positions:
    """Where every key and value of a file stands.

    Attributes:
        source: the file as the user named it.
        keys: `{path: (line, column)}` of the keys of mappings and the items of lists, counted from 1.
        settings: `{path: words}` of values that did not come from the file, in the words to show for them.
        hidden: the path that is left out where a name is shown, as the user never typed it.
    """

    source: str
    keys: dict[Place, tuple[int, int]] = field(default_factory=dict)
    settings: dict[Place, str] = field(default_factory=dict)
    hidden: Place = ()

    def shown(self, path: Place) -> str:
        """Return `path` as users write it: names joined by dots."""
        visible = path[len(self.hidden) :] if path[: len(self.hidden)] == self.hidden else path
        return ".".join(map(str, visible or path))

    def of(self, path: Place) -> str:
        """Return `file:line:column` of `path`, or of the nearest thing around it that has a position."""
        for length in range(len(path), -1, -1):
            if setting := self.settings.get(path[:length]):
                return setting
            if spot := self.keys.get(path[:length]):
                return f"{self.source}:{spot[0]}:{spot[1]}"
        return self.source


def load_yaml(path: Path | str) -> tuple[Any, Positions]:
    """Return the data of a YAML file and where each part of it stands.

    Args:
        path: a regular file of at most 1 MB.

    Raises:
        RecipeError: with file, line and column, if the file cannot be read, is not plain YAML, or breaks a limit.
    """
    file = Path(path)
    try:
        if not file.is_file():
            raise RecipeError(f"`{path}` is not a file" if file.exists() else f"there is no file `{path}`")
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot read `{path}`: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"the file is larger than {MAX_BYTES} bytes", where=str(path), hint="recipes are short")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = _after(str(path), raw[: error.start].decode("utf-8-sig"))
        raise RecipeError(
            f"byte 0x{raw[error.start]:02x} is not UTF-8", where=where, hint="save the file as UTF-8"
        ) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str = "recipe") -> tuple[Any, Positions]:
    """Return the data of YAML `text` and where each part of it stands; see `load_yaml`."""
    if (tab := text.find("\t")) >= 0:
        raise RecipeError("tab characters are not allowed", where=_after(source, text[:tab]), hint="indent with spaces")
    positions = Positions(source)
    try:
        builder = _Builder(yaml.parse(text, Loader=_PARSER), positions)
        return builder.document(), positions
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f"not valid YAML: {error.problem or error.context}", where=_spot(source, mark)) from None
    except yaml.reader.ReaderError as error:
        where = _after(source, text[: error.position])
        raise RecipeError(f"not valid YAML: {error.reason}", where=where) from None


def parse_value(text: str) -> Any:
    """Return the value that `text` has on a command line (`--set key=text`).

    A list, mapping or quoted text is read as YAML, anything else as one plain scalar, so that `*.down_proj` needs no
    quotes.
    """
    if text[:1] in ("[", "{", '"', "'"):
        return parse_yaml(text, "--set")[0]
    return plain_scalar(text)


def plain_scalar(text: str) -> Any:
    """Return None, a bool, an int, a float or `text` itself, as YAML 1.2 reads it unquoted."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > 40:  # no number anyone writes; int() of a megabyte of digits takes seconds
        return text
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


@dataclass(frozen=True)
class _Anchored:
    value: Any
    nodes: int
    height: int


def _after(source: str, before: str) -> str:
    """Return `file:line:column` of what follows the text `before`."""
    return f"{source}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


def _spot(source: str, mark: Any) -> str:
    return f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source


class _Builder:
    """Turns parser events into data, counting nodes and depth as if every alias were written out."""

    def __init__(self, events: Iterator[Event], positions: Positions) -> None:
        self.events = events
        self.positions = positions
        self.nodes = 0
        self.anchors: dict[str, _Anchored] = {}
        self.open: set[str] = set()  # anchors whose node is not complete

    def fail(self, message: str, event: Event, hint: str | None = None) -> RecipeError:
        return RecipeError(message, where=_spot(self.positions.source, event.start_mark), hint=hint)

    def count(self, nodes: int, event: Event) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise self.fail(f"more than {MAX_NODES} values, aliases written out", event, "a recipe needs a few dozen")

    def document(self) -> Any:
        next(self.events)  # start of stream
        start = next(self.events)
        if isinstance(start, yaml.StreamEndEvent):
            raise RecipeError("the file is empty", where=self.positions.source)
        if start.version or start.tags:
            raise self.fail("YAML directives are not allowed", start, "remove the line that begins with `%`")
        value, _ = self.node(next(self.events), (), 1)
        next(self.events)  # end of document
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise self.fail("a second document begins here, one is allowed", after)
        return value

    def node(self, event: Event, path: Place, depth: int) -> tuple[Any, int]:
        """Return the value that begins with `event` and its height (1 for a scalar)."""
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, depth)
        if event.tag is not None:
            raise self.fail(f"tags are not allowed, got `{_shown_tag(event.tag)}`", event, "write plain values")
        self.count(1, event)
        if depth > MAX_DEPTH:
            raise self.fail(f"nested deeper than {MAX_DEPTH} levels", event)
        before = self.nodes
        if event.anchor is not None:
            self.open.add(event.anchor)
        if isinstance(event, yaml.ScalarEvent):
            value, height = self.scalar(event), 1
        elif isinstance(event, yaml.SequenceStartEvent):
            value, height = self.sequence(path, depth)
        else:
            value, height = self.mapping(path, depth)
        if event.anchor is not None:
            self.open.discard(event.anchor)
            self.anchors[event.anchor] = _Anchored(value, self.nodes - before + 1, height)
        return value, height

    def scalar(self, event: Event) -> Any:
        if _SURROGATE.search(event.value):
            raise self.fail("half a surrogate pair is not a character", event)
        return plain_scalar(event.value) if event.implicit[0] else event.value

    def alias(self, event: Event, depth: int) -> tuple[Any, int]:
        if event.anchor in self.open:
            raise self.fail(f"alias `*{event.anchor}` stands inside its own anchor", event)
        anchored = self.anchors.get(event.anchor)
        if anchored is None:
            raise self.fail(f"alias `*{event.anchor}` has no anchor before it", event)
        self.count(anchored.nodes, event)
        if depth + anchored.height - 1 > MAX_DEPTH:
            raise self.fail(f"nested deeper than {MAX_DEPTH} levels, aliases written out", event)
        return copy.deepcopy(anchored.value), anchored.height

    def sequence(self, path: Place, depth: int) -> tuple[list[Any], int]:
        items: list[Any] = []
        height = 0
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            here = (*path, len(items))
            self.mark(here, event)
            value, child = self.node(event, here, depth + 1)
            items.append(value)
            height = max(height, child)
        return items, height + 1

    def mapping(self, path: Place, depth: int) -> tuple[dict[str, Any], int]:
        entries: dict[str, Any] = {}
        height = 0
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None or event.anchor is not None:
                raise self.fail("a key must be a plain text", event)
            key = event.value
            if key == "<<" and event.implicit[0]:
                raise self.fail("merge keys `<<` are not supported", event, "write the keys out")
            if key in entries:
                raise self.fail(f"key `{key[:80]}` is given twice", event)
            self.count(1, event)
            here = (*path, key)
            self.mark(here, event)
            entries[key], child = self.node(next(self.events), here, depth + 1)
            height = max(height, child)
        return entries, height + 1

    def mark(self, path: Place, event: Event) -> None:
        self.positions.keys[path] = (event.start_mark.line + 1, event.start_mark.column + 1)


def _shown_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")[:80]
