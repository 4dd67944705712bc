"""The stream of blocks: the model stays where it is, one block at a time is copied to the device and written back."""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.models.blocks import Blocks
from secateur.models.experts import Unpacked, pack_experts_, unpack_experts_
from secateur.models.linears import LinearView, find_linears


@dataclass
class WorkingBlock:
    """A copy of one block on the compute device, its experts unpacked to linears.

    Attributes:
        index: number of the block.
        name: its module name in the model.
        module: the copy, eval mode, compute dtype.
        linears: its prunable linears, in the order of the forward where that is known.
        unpacked: what `pack_experts_` needs.
    """

    index: int
    name: str
    module: nn.Module
    linears: list[LinearView]
    unpacked: list[Unpacked]


def compute_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    """Return the dtype that a block runs in: float32 on CPU, where half precision is many times slower, else its own."""
    stored = next(model.parameters()).dtype
    return torch.float32 if device.type == "cpu" and stored != torch.float64 else stored


def borrow(
    blocks: Blocks, index: int, device: torch.device, dtype: torch.dtype, ignore: tuple[str, ...] = ()
) -> WorkingBlock:
    """Return a working copy of block `index`; the model is left as it is.

    Args:
        blocks: the model's blocks.
        index: which one.
        device: where the copy goes.
        dtype: floating dtype of the copy.
        ignore: linears to leave out, see `models.linears.match`.
    """
    name = blocks.names[index]
    module = copy.deepcopy(blocks.modules[index]).to(device=device, dtype=dtype).eval()
    unpacked = unpack_experts_(module)
    return WorkingBlock(index, name, module, find_linears(module, name, index, ignore), unpacked)


def changed_parameters(work: WorkingBlock, original: nn.Module) -> dict[str, Tensor]:
    """Return the parameters in which the packed working copy differs from `original`, on CPU, in the original's dtype.

    Packs the experts of `work`, which therefore cannot run lanes any more.
    """
    pack_experts_(work.module, work.unpacked)
    changed: dict[str, Tensor] = {}
    new = dict(work.module.named_parameters())
    for name, parameter in original.named_parameters():
        value = new[name].detach().to(device="cpu", dtype=parameter.dtype)
        if not torch.equal(value, parameter.detach().to("cpu")):
            changed[name] = value.contiguous()
    return changed


def write_back_(original: nn.Module, weights: Mapping[str, Tensor], *, assign: bool) -> None:
    """Put `weights` into the block `original`, in place.

    Args:
        original: a block of the model.
        weights: `{parameter name: tensor}` in the parameter's own dtype.
        assign: let the parameters *be* the given (memory-mapped) tensors instead of copying them.
    """
    parameters = dict(original.named_parameters())
    for name, value in weights.items():
        if assign:
            parameters[name].data = value.to(parameters[name].device)
        else:
            with torch.no_grad():
                parameters[name].copy_(value)


def return_free_memory() -> None:
    """Give memory that was freed, but that the allocator keeps for later, back to the system.

    Blocks allocate and free matrices of many sizes; without this the resident size creeps up from block to block. Does
    nothing where the C library is not glibc.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
