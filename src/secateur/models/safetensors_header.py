"""The header of a safetensors file, read strictly and without the library that would map the file.

Layout: 8 bytes little-endian length n, n bytes JSON `{name: {dtype, shape, data_offsets}}`, then the tensors' bytes
without gaps. A file that any reader could take differently is refused here, before a library sees it.
"""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from secateur.core.errors import InputError
from secateur.models.strict_json import MEGABYTE, Pairs, parse, unique

MAX_HEADER = 100 * MEGABYTE
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 16

# bits per element; the names are those of the safetensors format
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


class Stored(NamedTuple):
    """One tensor of a file: dtype in the format's own name, shape, first and last byte + 1 after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What a safetensors file says about itself: its tensors by name, and the bytes in front of their data."""

    tensors: dict[str, Stored]
    data_start: int


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file after checking that it describes exactly the bytes that are there.

    Raises:
        InputError: anything is off: the length, the JSON, a dtype, a shape, or an offset.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise InputError(f"`{path}` is truncated: {size:,} bytes, a safetensors file has at least 10")
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER:
            raise InputError(f"`{path}` has a header of {length:,} bytes, at most {MAX_HEADER:,} are allowed")
        if 8 + length > size:
            raise InputError(f"`{path}` is truncated: a header of {length:,} bytes in a file of {size:,}")
        data = file.read(length)
    if not data.startswith(b"{"):
        raise InputError(f"the header of `{path}` does not start with `{{`: not a safetensors file")
    count = data.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise InputError(f"`{path}` lists {count:,} tensors, at most {MAX_TENSORS:,} are allowed")
    if length > MEGABYTE + 2000 * count:  # before the JSON is built: a list of ones takes forty times its own length
        raise InputError(f"`{path}` has a header of {length:,} bytes for only {count:,} tensors")
    found = parse(data, str(path), lambda pairs: _object(pairs, str(path)))
    if not isinstance(found, dict):
        raise InputError(f"the header of `{path}` is not an object of tensors")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"`__metadata__` in `{path}` must be an object of texts")
    _check_layout(found, size - 8 - length, path)
    return Header(found, 8 + length)


def _object(pairs: Pairs, where: str) -> Any:
    """Return a `Stored` for the description of a tensor, else a dict."""
    found = unique(pairs, where)
    if found.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
        if _is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2 and isinstance(dtype, str):
            return Stored(dtype, tuple(shape), offsets[0], offsets[1])
    return found


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(tensors: dict[str, Any], data_size: int, path: Path) -> None:
    """Raise unless the tensors fill the `data_size` bytes after the header, each once."""
    for name, stored in tensors.items():
        if not isinstance(stored, Stored):
            raise InputError(
                f"tensor `{name[:200]}` in `{path}` must have a dtype, a shape and two data_offsets, all sizes from 0"
            )
        if not name or re.search(r"[\x00-\x1f]", name):
            raise InputError(f"`{path}` has a tensor with the name {name[:80]!r}")
        bits = DTYPE_BITS.get(stored.dtype)
        if bits is None:
            raise InputError(f"tensor `{name}` in `{path}` has the unknown dtype `{stored.dtype[:40]}`")
        if len(stored.shape) > MAX_DIMENSIONS:
            raise InputError(
                f"tensor `{name}` in `{path}` has {len(stored.shape):,} dimensions, at most {MAX_DIMENSIONS} may be"
            )
        elements = 0 if 0 in stored.shape else prod(stored.shape)
        # a reader in another language would multiply with wrap-around: refuse what does not fit 63 bits
        if elements >= 2**63 or elements * bits != 8 * (stored.end - stored.begin):
            raise InputError(
                f"tensor `{name}` in `{path}` has shape {list(stored.shape)} of {stored.dtype}, but "
                f"{stored.end - stored.begin:,} bytes"
            )
    at = 0
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if stored.begin != at:
            fault = "overlaps another" if stored.begin < at else "leaves a gap before it"
            raise InputError(f"tensor `{name}` in `{path}` {fault}: it starts at byte {stored.begin:,}, not {at:,}")
        at = stored.end
    if at != data_size:
        fault = "is truncated" if at > data_size else "has bytes that belong to no tensor"
        raise InputError(f"`{path}` {fault}: the tensors take {at:,} bytes, the file has {data_size:,}")
