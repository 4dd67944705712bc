"""Giving back the memory of weights that were read from a mapped file and are not needed for a while.

A model that is loaded from safetensors is mapped: its weights take memory only once they are touched, and the kernel
may drop them again at any time. It does so late, though, so a run over the whole model looks as large as the model.
Telling the kernel early keeps the resident size at what is in use. Nothing is lost: what was changed stays, what was
not is read from the file again.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4 and later; unlike MADV_DONTNEED it keeps pages that were written to


class Mappings:
    """Where files are mapped into this process, as it is when the object is made."""

    def __init__(self) -> None:
        ranges: list[tuple[int, int]] = []
        if sys.platform == "linux":
            for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
                fields = line.split(maxsplit=5)
                # address, permissions, offset, device, inode, path: an inode of 0 is plain memory
                if len(fields) == 6 and fields[4] != "0" and fields[1].startswith("rw"):
                    start, end = (int(part, 16) for part in fields[0].split("-"))
                    ranges.append((start, end))
        self._ranges = ranges
        self._starts = [start for start, _ in ranges]
        self._madvise: Any = ctypes.CDLL(None).madvise if ranges else None

    def hold(self, tensor: Tensor) -> bool:
        """Return whether the tensor's memory is a mapped file."""
        if tensor.device.type != "cpu" or tensor.numel() == 0:
            return False
        index = bisect_right(self._starts, tensor.data_ptr()) - 1
        return index >= 0 and tensor.data_ptr() < self._ranges[index][1]

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Let the kernel drop the whole pages of those tensors that are mapped; others are left alone.

        Args:
            tensors: contiguous ones; their values stay as they are.
        """
        for tensor in tensors:
            if not self.hold(tensor):
                continue
            start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
            if length > 0:
                # an older kernel answers EINVAL and keeps the pages, which costs memory and nothing else
                self._madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _PAGEOUT)
