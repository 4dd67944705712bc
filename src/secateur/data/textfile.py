"""Local text files, read in bounded pieces and with every fault told by its line."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from secateur.core.errors import InputError, did_you_mean, missing_extra

_CHUNK = 1 << 20  # bytes
_SHOWN = 20  # faults listed in one message
_ESCAPED = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of a byte that is no UTF-8
_SURROGATE = re.compile("[\ud800-\udfff]")
_INVALID = "bytes that are no UTF-8, each read as U+FFFD"
_NUL = "NUL characters left out"
_RETURNS = "CRLF or CR line ends read as LF"
_HALF = "half surrogate pairs read as U+FFFD"

# First bytes of files that people give by mistake.
_FOREIGN = {
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a parquet file",
    b"%PDF-": "a PDF",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


@dataclass
class Read:
    """What a reader found: the documents, and notes on what it put right or left out."""

    documents: list[str]
    notes: list[str]


def read_file(path: Path, *, field: str, skip_bad: int, limit: int) -> Read:
    """Return the documents of a local file; its suffix says how it is read.

    Args:
        path: of a `.txt`, `.jsonl` or `.parquet` file.
        field: field or column that holds the text, where the file has several.
        skip_bad: how many malformed records may be left out.
        limit: characters after which reading stops.

    Raises:
        InputError: the file is missing, of another kind, or not as its suffix says.
    """
    reader = READERS.get(path.suffix.lower())
    check_file(path)
    assert reader is not None
    try:
        return reader(path, field, skip_bad, limit)
    except OSError as error:
        raise InputError(f"text `{path}` cannot be read: {error.strerror or error}", hint="check the file") from error


def check_file(path: Path) -> None:
    """Raise InputError unless `path` is a file that a reader is there for."""
    if path.is_dir():
        raise InputError(f"text `{path}` is a folder", hint=f"name a file in it: {', '.join(READERS)}")
    if not path.exists():
        near = did_you_mean(path.name, _names_in(path.parent))
        raise InputError(f"text `{path}` does not exist{near}", hint="check the path")
    if path.suffix.lower() not in READERS:
        raise InputError(
            f"text `{path}` has the suffix `{path.suffix}`, but must have one of {', '.join(READERS)}",
            hint="rename or convert the file",
        )


def _names_in(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []


def put_right(text: str, counts: Counter[str]) -> str:
    """Return `text` without NUL, half surrogate pairs and CR; every kind of change is added to `counts`."""
    if "\0" in text:
        counts[_NUL] += text.count("\0")
        text = text.replace("\0", "")
    if "\r" in text:
        counts[_RETURNS] += text.count("\r")
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text, number = _SURROGATE.subn("\ufffd", text)
        counts[_HALF] += number
    return text


def notes_on(source: str, counts: Counter[str]) -> list[str]:
    """Return one sentence for each kind of change that `put_right` and its callers counted."""
    return [f"text `{source}`: {count} {what}" for what, count in counts.items() if count]


def limited(source: str, limit: int) -> str:
    """Return the note that reading stopped before the end."""
    return f"text `{source}`: only the first {limit:,} characters were read"


class Faults:
    """Malformed records of one text: allowed up to a number, otherwise told together.

    Args:
        source: the text they are in.
        unit: what a record is: "line" or "row".
        allowed: how many may be left out.
    """

    def __init__(self, source: str, unit: str, allowed: int) -> None:
        self.source, self.unit, self.allowed = source, unit, allowed
        self.seen: list[str] = []

    def add(self, number: int, what: str) -> None:
        """Record that record `number` (from 1) is bad, and stop reading once there are plainly too many."""
        self.seen.append(f"{self.unit} {number}: {what}")
        if len(self.seen) >= self.allowed + _SHOWN:
            self.check()

    def check(self) -> None:
        """Raise if more records were bad than allowed."""
        if len(self.seen) > self.allowed:
            shown = "; ".join(self.seen[:_SHOWN])
            raise InputError(
                f"text `{self.source}` has malformed {self.unit}s ({self.allowed} allowed): {shown}",
                hint="correct them, or allow some with `skip_bad`",
            )

    def notes(self) -> list[str]:
        """Return the note on what was left out."""
        if not self.seen:
            return []
        shown = "; ".join(self.seen[:_SHOWN])
        return [f"text `{self.source}`: {len(self.seen)} malformed {self.unit}s left out ({shown})"]


def _read_txt(path: Path, _field: str, _skip_bad: int, limit: int) -> Read:
    """Return the whole file as one document."""
    counts: Counter[str] = Counter()
    pieces: list[str] = []
    found = 0
    with path.open("rb") as file:
        for piece in _decoded(file, path, counts, budget=4 * limit):
            pieces.append(piece)
            found += len(piece)
            if found >= limit:
                break
        cut = found > limit or bool(file.read(1))
    notes = notes_on(str(path), counts)
    return Read(["".join(pieces)[:limit]], [*notes, limited(str(path), limit)] if cut else notes)


class RepeatedKey(ValueError):
    """A JSON object has a key twice, so that readers would disagree about its value."""


def json_record(line: str) -> Any:
    """Return the value of a line of JSON.

    Raises:
        RepeatedKey: an object in it has a key twice.
        ValueError, RecursionError: it is no JSON.
    """
    return _DECODER.decode(line)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(key, times)] = Counter(key for key, _ in pairs).most_common(1)
        raise RepeatedKey(f"the key `{key[:80]}` is there {'twice' if times == 2 else f'{times} times'}")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def jsonl_records(path: Path, faults: Faults, counts: Counter[str], longest: int) -> Iterator[tuple[int, Any]]:
    """Yield the number (from 1) and the value of every line of a `.jsonl` file; what is no sound JSON is a fault.

    Args:
        path: the file.
        faults: where lines that are no JSON, or have a key twice, are added.
        counts: where changes to the text are counted, see `put_right`.
        longest: characters of a line at most.
    """
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file, path, counts, longest), start=1):
            if not line.strip():
                continue
            try:
                record = json_record(line)
            except RepeatedKey as error:
                faults.add(number, str(error))
                continue
            except (ValueError, RecursionError) as error:
                reason = (
                    f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
                )
                faults.add(number, f"no JSON ({reason})")
                continue
            yield number, record


def parquet_rows(
    path: Path, columns: list[str] | None = None, check: Callable[[Any], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number (from 1) and the values of every row of a `.parquet` file.

    Args:
        path: the file.
        columns: those to read; None: all.
        check: given the schema first, to refuse it.

    Raises:
        InputError: the package `pyarrow` is missing, or the file is damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "data", f"read `{path}`") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if check is not None:
                check(table.schema_arrow)
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's fault; the library's own have no number
            raise
        reason = str(error).strip()
        raise InputError(f"text `{path}` is no readable parquet file: {reason}", hint="write the file again") from error


def _read_jsonl(path: Path, field: str, skip_bad: int, limit: int) -> Read:
    """Return the field of every record as a document."""
    counts: Counter[str] = Counter()
    faults = Faults(str(path), "line", skip_bad)
    documents: list[str] = []
    found = 0
    notes: list[str] = []
    for number, record in jsonl_records(path, faults, counts, longest=limit):
        if found >= limit:
            notes.append(limited(str(path), limit))
            break
        if isinstance(record, dict) and isinstance(record.get(field), str):
            documents.append(put_right(record[field], counts))
            found += len(documents[-1])
        else:
            faults.add(number, _why_unusable(record, field))
    faults.check()
    return Read(documents, [*notes, *faults.notes(), *notes_on(str(path), counts)])


def _read_parquet(path: Path, field: str, skip_bad: int, limit: int) -> Read:
    """Return the column of every row as a document."""

    def check(schema: Any) -> None:
        import pyarrow

        if field not in schema.names:
            raise InputError(
                f"text `{path}` has no column `{field}`, only {listed(schema.names)}",
                hint="choose one with `field`",
            )
        kind = schema.field(field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise InputError(f"text `{path}`: column `{field}` holds {kind}, but must hold strings")

    counts: Counter[str] = Counter()
    faults = Faults(str(path), "row", skip_bad)
    documents: list[str] = []
    found = 0
    notes: list[str] = []
    for number, row in parquet_rows(path, [field], check):
        if found >= limit:
            notes.append(limited(str(path), limit))
            break
        if row[field] is None:
            faults.add(number, f"`{field}` is null")
        else:
            documents.append(put_right(row[field], counts))
            found += len(row[field])
    faults.check()
    return Read(documents, [*notes, *faults.notes(), *notes_on(str(path), counts)])


READERS: dict[str, Callable[[Path, str, int, int], Read]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _decoded(file: IO[bytes], path: Path, counts: Counter[str], budget: float) -> Iterator[str]:
    """Yield the text of a file piece by piece, put right and counted, until about `budget` bytes are read."""
    head = file.read(8)
    for magic, kind in _FOREIGN.items():
        if head.startswith(magic):
            raise InputError(f"text `{path}` is {kind}, not UTF-8 text", hint="unpack or convert it first")
    file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    held = ""  # a CR at the end of a piece: its LF may open the next one
    read = 0
    while read < budget:
        data = file.read(_CHUNK)
        read += len(data)
        piece, number = _ESCAPED.subn("\ufffd", held + decoder.decode(data, final=not data))
        counts[_INVALID] += number
        held = "\r" if data and piece.endswith("\r") else ""
        yield put_right(piece.removesuffix("\r") if held else piece, counts)
        if not data:
            return


def _lines(file: IO[bytes], path: Path, counts: Counter[str], longest: int) -> Iterator[str]:
    """Yield the lines of a file, none of them longer than `longest` characters."""
    number = 1
    pending: list[str] = []  # pieces of a line whose end is not read yet
    size = 0
    for piece in _decoded(file, path, counts, budget=float("inf")):
        *ended, rest = piece.split("\n")
        for line in ended:
            yield "".join([*pending, line])
            pending, size = [], 0
            number += 1
        pending.append(rest)
        size += len(rest)
        if size > longest:
            raise InputError(
                f"text `{path}`: line {number} is longer than {longest:,} characters, but must be one record",
                hint="write one JSON object per line",
            )
    yield "".join(pending)


def _why_unusable(record: Any, field: str) -> str:
    if not isinstance(record, dict):
        return f"holds a {type(record).__name__}, but must hold an object with the field `{field}`"
    if field not in record:
        return f"no field `{field}`, only {listed(list(record))}"
    return f"field `{field}` holds a {type(record[field]).__name__}, but must hold a string"


def listed(names: list[str]) -> str:
    """Return names as `a`, `b` and so on, at most twenty."""
    shown = ", ".join(f"`{name}`" for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "") or "no fields"
