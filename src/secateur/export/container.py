"""A safetensors file written piece by piece: the library's own writer wants every tensor in memory at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from secateur.core import faults
from secateur.core.errors import StateError

# the names of the safetensors format for what a model may hold
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Slot(NamedTuple):
    """One tensor to come: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * self.dtype.itemsize


class Container:
    """An open file whose header is written and whose tensors may be filled in any order, each from front to back."""

    def __init__(self, file: BinaryIO, places: Mapping[str, tuple[int, int]]) -> None:
        self._file = file
        self._places = dict(places)

    def append(self, name: str, data: Tensor) -> None:
        """Write `data`, any shape, on CPU, as the next elements of tensor `name`.

        Raises:
            StateError: if the tensor would become longer than announced.
        """
        raw = data.contiguous().reshape(-1).view(torch.uint8).numpy()
        at, end = self._places[name]
        if at + raw.nbytes > end:
            raise StateError(f"the tensor `{name}` changed while it was written")
        faults.hit("container.write")
        self._file.seek(at)
        self._file.write(raw.data)
        self._places[name] = (at + raw.nbytes, end)

    def check(self) -> None:
        """Raise StateError unless every tensor is complete."""
        for name, (at, end) in self._places.items():
            if at != end:
                raise StateError(f"the tensor `{name}` changed while it was written: {end - at:,} bytes are missing")


@contextmanager
def create(path: Path, slots: Mapping[str, Slot], metadata: Mapping[str, str]) -> Iterator[Container]:
    """Yield a new safetensors file to be filled, and check at the end that it is complete.

    Wide elements come first, so that every tensor starts at a multiple of its element size and can be memory-mapped.

    Args:
        path: the file; must not exist.
        slots: what it will hold.
        metadata: texts for its header.
    """
    order = sorted(slots, key=lambda name: -slots[name].dtype.itemsize)  # stable: otherwise as given
    lines: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        slot = slots[name]
        offsets = [at, at + slot.nbytes]
        lines[name] = {"dtype": DTYPES[slot.dtype], "shape": list(slot.shape), "data_offsets": offsets}
        at += slot.nbytes
    header = json.dumps(lines, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    start = 8 + len(header)
    places: dict[str, tuple[int, int]] = {}
    at = start
    for name in order:
        places[name] = (at, at + slots[name].nbytes)
        at += slots[name].nbytes
    with path.open("xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(at)
        container = Container(file, places)
        yield container
        container.check()
