"""Where the hidden states of the calibration batches wait between blocks: in memory or on disk."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.core.errors import RecipeError, ResourceError

Offload = Literal["ram", "disk"]


class Activations(Sequence[Tensor]):
    """Hidden states `(batch, tokens, hidden)`, one entry per calibration batch, on CPU.

    Args:
        count: number of batches.
        offload: `ram` keeps tensors; `disk` writes them to an unnamed file and reads an entry when it is asked for, so
            that one batch at a time is resident.
        folder: where the unnamed file of `disk` lives; the system's temporary folder if None.
    """

    def __init__(self, count: int, offload: Offload = "ram", folder: Path | None = None) -> None:
        if offload not in ("ram", "disk"):
            raise RecipeError(f"offload `{offload}` must be `ram` or `disk`")
        self.offload = offload
        self._tensors: list[Tensor | None] = [None] * count
        self._places: list[tuple[int, torch.Size, torch.dtype] | None] = [None] * count
        self._folder = folder
        self._file = TemporaryFile(dir=folder) if offload == "disk" else None  # noqa: SIM115 - lives as long as self
        if self._file is not None:
            weakref.finalize(self, self._file.close)
        self._end = 0

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        if self._file is None:
            tensor = self._tensors[index]
            if tensor is None:
                raise IndexError(f"batch {index} holds no hidden states yet")
            return tensor
        place = self._places[index]
        if place is None:
            raise IndexError(f"batch {index} holds no hidden states yet")
        offset, shape, dtype = place
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(offset)
        self._file.readinto(_bytes(tensor))
        return tensor

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        """Store the states of batch `index`; a tensor of another device is copied, one on CPU is kept as it is."""
        hidden = hidden.detach().to("cpu")
        if self._file is None:
            self._tensors[index] = hidden
            return
        hidden = hidden.contiguous()
        place = self._places[index]
        if place is None or place[1] != hidden.shape or place[2] != hidden.dtype:
            place = (self._end, hidden.shape, hidden.dtype)
            self._end += -(-hidden.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
            self._places[index] = place
        try:
            self._file.seek(place[0])
            self._file.write(_bytes(hidden))
            self._file.flush()
        except OSError as error:
            raise ResourceError(
                f"the hidden states of batch {index} ({hidden.nbytes} bytes) could not be written to disk: {error.strerror}",
                hint="free disk space, or use `--offload ram`",
            ) from error

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def like(self) -> Activations:
        """Return an empty store of the same kind and length."""
        return self.of_length(len(self))

    def of_length(self, count: int) -> Activations:
        """Return an empty store of the same kind for `count` batches."""
        return Activations(count, self.offload, self._folder)

    def filled(self, index: int) -> bool:
        """Return whether batch `index` holds hidden states."""
        return (self._tensors if self._file is None else self._places)[index] is not None


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on CPU."""
    content: Any = tensor.view(torch.uint8).reshape(-1).numpy()
    return memoryview(content)
