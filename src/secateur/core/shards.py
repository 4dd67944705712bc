"""Tensors of which each process holds a part: what FSDP2 makes of parameters outside of the forward that they are for."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether `tensor` is a DTensor, of which this process may hold a part only."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: nobody has made one
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of `tensor`, detached and in the same memory; all of it unless it is sharded."""
    with torch.no_grad():
        return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of `tensor`, detached; if it is sharded, all processes that hold a part must ask for it."""
    with torch.no_grad():
        return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined]


def anywhere(flag: bool, tensor: Tensor) -> bool:
    """Return whether `flag` is true in any process that holds a part of `tensor`; all of them must ask."""
    if not is_sharded(tensor):
        return flag
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    told = torch.tensor(int(flag), device=local(tensor).device)
    for dimension in range(mesh.ndim):
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, mesh.get_group(dimension))
    return bool(told)


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return `tensor`, which all processes hold whole, cut as `like` is cut; as it is if that is not sharded."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh  # type: ignore[attr-defined]
    whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(mesh, like.placements)  # type: ignore[attr-defined]
