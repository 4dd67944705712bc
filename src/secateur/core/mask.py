"""Masks of a whole model, one bit per weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from secateur.core.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def pack_bits(mask: Tensor) -> Tensor:
    """Return uint8 `(rows, ceil(columns / 8))`, eight columns a byte, the lowest column in the lowest bit.

    Args:
        mask: bool `(rows, columns)`, moved to CPU if it is elsewhere.
    """
    # contiguous, which files ask for: numpy would pack a transposed mask into a transposed table
    return torch.from_numpy(np.packbits(mask.cpu().contiguous().numpy(), axis=1, bitorder="little"))


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """Return the bool `(rows, columns)` whose `pack_bits` is `packed`."""
    bits: NDArray[np.uint8] = np.unpackbits(packed.cpu().numpy(), axis=1, count=columns, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))


class Masks(Mapping[str, Tensor]):
    """Which weights of which linears are kept: `{linear name: bool (out_features, in_features)}`, True = kept.

    Stored packed (1 bit per weight) on CPU; reading an entry unpacks it.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self._packed: dict[str, tuple[Tensor, int]] = {}
        for name, mask in (masks or {}).items():
            self[name] = mask

    def __setitem__(self, name: str, mask: Tensor) -> None:
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise InputError(
                f"the mask of `{name}` must be a bool matrix, got {mask.dtype} with shape {tuple(mask.shape)}"
            )
        self._packed[name] = (pack_bits(mask), mask.shape[1])

    def __getitem__(self, name: str) -> Tensor:
        return unpack_bits(*self._packed[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def sparsity(self) -> float:
        """Return the fraction of pruned entries over all masks, 0..1 (0 if there are none)."""
        kept = sum(int(mask.sum()) for mask in self.values())
        size = sum(packed.shape[0] * columns for packed, columns in self._packed.values())
        return 1 - kept / size if size else 0.0

    def packed(self) -> dict[str, Tensor]:
        """Return `{name: uint8 (rows, ceil(columns / 8))}` for a safetensors file; `columns` are in `widths`."""
        return {name: packed for name, (packed, _) in self._packed.items()}

    def widths(self) -> dict[str, int]:
        """Return `{name: columns}`, what `from_packed` needs beside `packed`."""
        return {name: columns for name, (_, columns) in self._packed.items()}

    @classmethod
    def from_packed(cls, packed: Mapping[str, Tensor], widths: Mapping[str, int]) -> Masks:
        """Return the masks stored by `packed` and `widths`."""
        masks = cls()
        masks._packed = {name: (bits, widths[name]) for name, bits in packed.items()}
        return masks
