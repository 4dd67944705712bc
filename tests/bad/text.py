"""Golden bad text files: each function writes one into a folder and returns its path."""

from __future__ import annotations

import json
from pathlib import Path

GOOD = {"text": "A good record."}


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def empty(folder: Path) -> Path:
    return _written(folder / "empty.txt", b"")


def blank(folder: Path) -> Path:
    return _written(folder / "blank.txt", b" \r\n\t\n")


def only_nul(folder: Path) -> Path:
    return _written(folder / "nul.txt", bytes(3000))


def invalid_bytes(folder: Path) -> Path:
    """Four bytes that are no UTF-8, one cut-off character at the end among them, and one honest U+FFFD."""
    return _written(folder / "invalid.txt", b"good \xff\xfe word \xef\xbf\xbd \xc3(\xe2")


def mark_and_returns(folder: Path) -> Path:
    """A byte-order mark, CRLF, a lone CR and a NUL."""
    return _written(folder / "marked.txt", b"\xef\xbb\xbfone\r\ntwo\rth\x00ree\n")


def utf16(folder: Path) -> Path:
    return _written(folder / "wide.txt", "some words".encode("utf-16"))


def archive(folder: Path) -> Path:
    return _written(folder / "packed.txt", b"\x1f\x8b\x08\x00" + bytes(range(256)))


def one_line(folder: Path, size: int) -> Path:
    """One line of `size` bytes that takes no room on the disk."""
    path = folder / "line.txt"
    with path.open("wb") as file:
        file.write(b"word " * 400_000)
        file.truncate(size)
    return path


def one_record(folder: Path, size: int) -> Path:
    """One JSON line of `size` bytes without an end."""
    path = folder / "line.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "' + b"a" * size)
    return path


def broken_json(folder: Path) -> Path:
    """Bad lines 2 (no JSON), 4 (no field), 5 (a number), 6 (a list), 7 (too deep); 1, 3 and 9 are good, 8 is blank."""
    lines = [
        json.dumps(GOOD),
        '{"text": "cut',
        json.dumps(GOOD),
        '{"content": "x", "id": 3}',
        '{"text": 7}',
        "[1]",
        "[" * 100_000,
        "",
        json.dumps(GOOD),
    ]
    return _written(folder / "broken.jsonl", "\n".join(lines).encode())


def half_pair(folder: Path) -> Path:
    """JSON whose strings hold half a surrogate pair, a NUL and a CRLF, all of them escaped."""
    return _written(folder / "half.jsonl", rb'{"text": "a\ud83d b\u0000c\r\nd"}' + b"\n")


def false_parquet(folder: Path) -> Path:
    return _written(folder / "false.parquet", b"PAR1" + bytes(40) + b"PAR1")
