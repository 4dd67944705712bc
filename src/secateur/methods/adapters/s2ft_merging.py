"""What is written when S2FT's adapters are merged and switched, and whether it may still be written."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ready:
    """What merging one adapter alone writes.

    Attributes:
        index: int64 `(k,)`.
        former: what is overwritten, `(out_features, k)` or `(k, in_features)`, in memory line by line.
        merged: what is written, like `former`.
        pieces: former and merged lines `(k, pieces)`, views with elements as wide as a copy can move.
        seen: stamp of the slice that this was computed from.
    """

    index: Tensor
    former: Tensor
    merged: Tensor
    pieces: tuple[Tensor, Tensor]
    seen: tuple[object, ...]


@dataclass(slots=True)
class Merging:
    """What is merged into one weight, and what is ready to be; a copy has nothing ready.

    Attributes:
        overwritten: index and former values of what is merged; None if nothing is.
        ready: what merging an adapter writes, by adapter; see `S2ftLinear.prepare_`.
        stamp: of the weight, when what is ready was known to be right; see `stamp_of`.
        element: dtype of the pieces in which what is ready is copied; see `widest_element`.
    """

    overwritten: tuple[Tensor, Tensor] | None = None
    ready: dict[str, Ready] = field(default_factory=dict)
    stamp: tuple[object, ...] = ()
    element: torch.dtype = torch.float32

    def __reduce__(self) -> tuple[type[Merging], tuple[tuple[Tensor, Tensor] | None]]:
        return Merging, (self.overwritten,)  # what is ready is of one weight, and not of its copy


def stamp_of(tensor: Tensor) -> tuple[object, ...]:
    """Return what tells whether `tensor` was replaced, moved or written to; writes through `.data` do not show."""
    return None if tensor.is_inference() else tensor._version, tensor.data_ptr(), tensor.dtype


def widest_element(lines: Tensor) -> torch.dtype:
    """Return a dtype of 16 bytes as which `lines` `(k, width)` can be viewed, or that of `lines`.

    On CPU a copy by index moves one element at a time, whatever its size: 3 times as fast in float32, 5 in bfloat16.
    """
    sizes = lines.shape[1], lines.stride(0), lines.storage_offset()
    whole = lines.stride(1) == 1 and not any(size * lines.itemsize % 16 for size in sizes)
    able = whole and lines.data_ptr() % 16 == 0 and lines.device.type == "cpu"
    return torch.complex128 if able else lines.dtype
