"""The header of a GGUF file, walked before a library reads it: every length against the file's size.

Layout: magic, version, number of tensors, number of values; the values (typed, with text keys); the table of tensors
(name, dimensions, type, offset); then, aligned, the tensors' bytes. Libraries believe each of these lengths.
"""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from secateur.core.errors import InputError
from secateur.models.config_checks import BOUNDS

MAX_VALUES = 100_000
MAX_TENSORS = 1_000_000

_ARRAY, _TEXT = 9, 8
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

# elements and bytes of a block of each tensor type, numbered as in ggml.h
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17),
}  # fmt: skip
_FLOATS = {0: "F32", 1: "F16", 30: "BF16"}

# the sizes of a configuration by the word that ends their key, with the field of `config.json` that has the same bounds
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
}


class GgufHeader(NamedTuple):
    """What a GGUF file says about itself.

    Attributes:
        architecture: the family's name, `general.architecture`.
        dtype: F32, F16 or BF16 if the weights are plain numbers of that type (norms may be F32), None if quantised.
        elements: number of weights over all tensors.
    """

    architecture: str
    dtype: str | None
    elements: int


class _Reader:
    """A place in the mapped file that never leaves it."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def skip(self, count: int, what: str) -> int:
        """Step over `count` bytes and return where they begin."""
        begin = self.at
        if count > len(self.data) - begin:
            raise InputError(f"`{self.path}` is truncated: {what} takes {count:,} bytes from byte {begin:,}")
        self.at += count
        return begin

    def number(self, form: str, what: str) -> Any:
        """Read one little-endian number."""
        return struct.unpack_from(f"<{form}", self.data, self.skip(struct.calcsize(f"<{form}"), what))[0]

    def text(self, what: str) -> str:
        """Read a text with its length in front."""
        length = self.number("Q", what)
        begin = self.skip(length, what)
        try:
            return self.data[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"`{self.path}` has {what} that is not UTF-8 at byte {begin:,}") from error

    def value(self, key: str) -> Any:
        """Read one value; of an array only the numbers are kept, of a long one nothing."""
        kind = self.number("I", key)
        if kind == _TEXT:
            return self.text(key)
        if kind != _ARRAY:
            return self.number(self._form(kind, key), key)
        kind, count = self.number("I", key), self.number("Q", key)
        if kind == _TEXT:
            if count > len(self.data) // 8:
                raise InputError(f"`{key}` in `{self.path}` has {count:,} texts, more than the file can hold")
            for _ in range(count):
                self.skip(self.number("Q", key), key)
            return None
        form = self._form(kind, key)
        begin = self.skip(count * struct.calcsize(f"<{form}"), key)
        return list(struct.unpack_from(f"<{count}{form}", self.data, begin)) if count <= 10_000 else None

    def _form(self, kind: int, key: str) -> str:
        if kind not in _FORMATS:
            raise InputError(f"`{key}` in `{self.path}` is of the unknown type {kind}")
        return _FORMATS[kind]


def read_gguf_header(path: Path) -> GgufHeader:
    """Return what a GGUF file says about itself, after checking that it fits the bytes that are there.

    Raises:
        InputError: it is no GGUF file, is truncated, or states an impossible size.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size < 24 or file.read(4) != b"GGUF":
                raise InputError(f"`{path}` is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(_Reader(data, path))
    except OSError as error:
        raise InputError(f"`{path}` cannot be read: {error.strerror}") from error


def _read(reader: _Reader) -> GgufHeader:
    path = reader.path
    reader.skip(4, "the magic")
    version = reader.number("I", "the version")
    if version not in (2, 3):
        raise InputError(f"`{path}` is GGUF of version {version}, but 2 or 3 is supported")
    tensors, values = reader.number("Q", "the header"), reader.number("Q", "the header")
    if not 0 < tensors <= MAX_TENSORS or values > MAX_VALUES:
        raise InputError(f"`{path}` states {tensors:,} tensors and {values:,} values, which is no possible model")
    found: dict[str, Any] = {}
    for _ in range(values):
        key = reader.text("a key")
        if key in found:
            raise InputError(f"`{path}` has the key `{key[:80]}` twice")
        found[key] = reader.value(key[:80])
    architecture = found.get("general.architecture")
    if not isinstance(architecture, str):
        raise InputError(f"`{path}` does not say its `general.architecture`")
    for key, value in found.items():
        _check_size(key.removeprefix(f"{architecture}."), value, key, path)
    blocks = found.get(f"{architecture}.block_count")
    if isinstance(blocks, int) and blocks > tensors:
        raise InputError(f"`{path}` states {blocks:,} blocks for {tensors:,} tensors")
    return _read_table(reader, tensors, architecture, found.get("general.alignment", 32))


def _check_size(word: str, value: Any, key: str, path: Path) -> None:
    if word not in _SIZES:
        return
    least, most = BOUNDS[_SIZES[word]]
    for item in value if isinstance(value, list) else [value]:
        if type(item) is not int or not least <= item <= most:
            raise InputError(f"`{key}` in `{path}` is {str(item)[:40]}, but must be {least} to {most:,}")


def _read_table(reader: _Reader, tensors: int, architecture: str, alignment: Any) -> GgufHeader:
    path = reader.path
    if type(alignment) is not int or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise InputError(f"`general.alignment` in `{path}` is {str(alignment)[:40]}, but must be a power of two")
    places: list[tuple[int, int, str]] = []
    kinds: set[int] = set()
    elements = 0
    for _ in range(tensors):
        name = reader.text("a tensor's name")
        dimensions = reader.number("I", name[:80])
        if dimensions > 8:
            raise InputError(f"tensor `{name[:80]}` in `{path}` has {dimensions:,} dimensions")
        shape = [reader.number("Q", name[:80]) for _ in range(dimensions)]
        kind, offset = reader.number("I", name[:80]), reader.number("Q", name[:80])
        if kind not in _BLOCKS:
            raise InputError(f"tensor `{name[:80]}` in `{path}` is of the unknown type {kind}")
        size, per_block = _BLOCKS[kind]
        count = prod(shape)
        if count >= 2**63 or (shape and shape[0] % size):
            raise InputError(f"tensor `{name[:80]}` in `{path}` has the impossible shape {shape}")
        kinds.add(kind)
        elements += count
        places.append((offset, count // size * per_block, name[:80]))
    start = -(-reader.at // alignment) * alignment
    end = 0
    for offset, length, name in sorted(places):
        if offset < end:
            raise InputError(f"tensor `{name}` in `{path}` overlaps another")
        end = offset + length
        if start + end > len(reader.data):
            raise InputError(f"`{path}` is truncated: tensor `{name}` ends at byte {start + end:,}")
    floats = {_FLOATS[kind] for kind in kinds if kind in _FLOATS}
    dtype = None
    if kinds <= _FLOATS.keys():  # norms are F32 beside halves, so the narrow type is the model's
        dtype = "BF16" if "BF16" in floats else "F16" if "F16" in floats else "F32"
    return GgufHeader(architecture, dtype, elements)
