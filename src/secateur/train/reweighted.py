"""The product of a linear whose weight is a frozen one plus the deltas of adapters, keeping nothing but its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

if TYPE_CHECKING:
    from secateur.train.adapter_linear import AdapterLinear


class Reweighted(torch.autograd.Function):
    """`x (W + sum of deltas)^T + b` in one product; nothing is kept for backward but x and references to parameters.

    Backward rebuilds the sum, forms the gradient of the weight once, and lets each adapter reduce it to the gradients
    of its own tensors: three large products a step where a frozen linear has two.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: AdapterLinear,
        adapters: tuple[str, ...],
        counts: tuple[int, ...],
        only_delta: bool,
        *tensors: Tensor,
    ) -> Tensor:
        """Return `(..., out_features)` in the dtype of x."""
        ctx.layer, ctx.adapters, ctx.counts, ctx.only_delta = layer, adapters, counts, only_delta
        ctx.save_for_backward(x, weight, *tensors)
        with torch.autocast(x.device.type, enabled=False):
            total = _total(layer, weight.detach(), _split(adapters, counts, tensors), only_delta)
            return F.linear(x, total.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, bias and the adapters' tensors."""
        x, weight, *tensors = ctx.saved_tensors
        parts = _split(ctx.adapters, ctx.counts, tensors)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows, inputs = upstream.reshape(-1, upstream.shape[-1]), x.reshape(-1, x.shape[-1])
        of_x = of_weight = of_bias = None
        of_tensors: list[Tensor | None] = [None] * len(tensors)
        if needs_x:
            total = _total(ctx.layer, weight.detach(), parts, ctx.only_delta)
            of_x = (rows @ total.to(rows.dtype)).reshape(x.shape)
            del total
        if needs_weight or any(ctx.needs_input_grad[7:]):
            gradient = widened(rows.T @ inputs)
            if needs_weight:
                with torch.enable_grad():
                    leaf = weight.detach().requires_grad_()
                    total = _total(ctx.layer, leaf, parts, ctx.only_delta)
                of_weight = torch.autograd.grad(total, leaf, gradient)[0]
            wide, place = widened(weight.detach()), 0
            for number, (adapter, own) in enumerate(parts):
                mine = gradient if number == len(parts) - 1 else gradient.clone()
                found = ctx.layer.delta_gradients(adapter, wide, mine, *map(widened, own))
                for value, tensor in zip(found, own, strict=True):
                    of_tensors[place] = None if value is None else value.to(tensor.dtype)
                    place += 1
        if needs_bias:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias, None, None, None, None, *of_tensors


def _total(
    layer: AdapterLinear, weight: Tensor, parts: list[tuple[str, tuple[Tensor, ...]]], only_delta: bool
) -> Tensor:
    """Return the weight that the adapters make, float32 or wider."""
    wide = widened(weight)
    parts = [(adapter, tuple(map(widened, tensors))) for adapter, tensors in parts]
    if not only_delta:
        return layer.combined(wide, parts)
    ((adapter, tensors),) = parts
    return layer.delta(adapter, wide, *tensors)


def _split(
    adapters: Sequence[str], counts: Sequence[int], tensors: Sequence[Tensor]
) -> list[tuple[str, tuple[Tensor, ...]]]:
    """Return the tensors of each adapter, given all of them in a row."""
    found, place = [], 0
    for adapter, count in zip(adapters, counts, strict=True):
        found.append((adapter, tuple(tensors[place : place + count])))
        place += count
    return found


def widened(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
