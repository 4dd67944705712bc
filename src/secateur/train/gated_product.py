"""A gated MLP's `act(gate) * up` that keeps two of its three tensors for backward, and the same bits.

Autograd keeps the gate (for the activation), the activation and `up` (for the product). The activation can be had again
from the gate for the price of one elementwise pass, so two of the widest tensors of a block are enough. A forward hook on
the activation hands on its output as a tensor that knows its gate; a product with it becomes one node, and everything
else that is done with it is done as with any tensor, so a model whose MLP is written in another way works as before.
Where somebody else listens to the activation, or asks for its gradient, it is kept as without this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _global_forward_hooks

_ASKS_FOR_ITS_GRADIENT = frozenset({Tensor.register_hook, Tensor.retain_grad})
_PRODUCTS = frozenset({torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__})


def keep_gates_only_(mlps: Iterable[nn.Module]) -> int:
    """Let the activations of gated MLPs not be kept for backward; return how many activations there are.

    Doing it twice is harmless; `keep_activations_` undoes it. Nothing changes without gradients, under compilation and
    transforms of `torch.func`, and where an activation has other forward hooks.

    Args:
        mlps: modules whose children without tensors are activations, changed in place.
    """
    found = [child for mlp in mlps for child in mlp.children() if _is_activation(child)]
    for activation in found:
        if _knowing not in activation._forward_hooks.values():
            activation.register_forward_hook(_knowing)
    return len(found)


def keep_activations_(model: nn.Module) -> None:
    """Undo `keep_gates_only_` in all of `model`."""
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            if hook is _knowing:
                del module._forward_hooks[number]


class GatedProduct(torch.autograd.Function):
    """`act(gate) * up`; keeps the gate and `up`, and applies the activation again in backward."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, activated: Tensor, activation: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the product.

        Args:
            ctx: autograd's.
            gate: `(..., channels)`.
            up: of the shape and dtype of `activated`.
            activated: what `activation` made of the gate.
            activation: a function of one tensor, of no randomness and with no tensors of its own.
        """
        ctx.activation, ctx.autocast = activation, _autocast(gate.device.type)
        ctx.save_for_backward(gate, up)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of gate and `up`, by the same kernels as without this class."""
        gate, up = ctx.saved_tensors
        of_gate = of_up = None
        with torch.enable_grad(), ctx.autocast():
            leaf = gate.detach().requires_grad_(ctx.needs_input_grad[0])
            activated = ctx.activation(leaf)
        if ctx.needs_input_grad[1]:
            of_up = upstream * activated.detach()
        if ctx.needs_input_grad[0]:
            (of_gate,) = torch.autograd.grad(activated, leaf, upstream * up)
        return of_gate, of_up, None, None


class _Activated(Tensor):
    """An activation's output that knows its gate; every operation on it but a product gives plain tensors."""

    gate: Tensor
    activation: Callable[[Tensor], Tensor]
    versions: tuple[int, int] | None  # of the gate and of itself, when neither was written to; None: it is to be kept

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _ASKS_FOR_ITS_GRADIENT:
                args[0].versions = None  # which a product of gate and `up` alone would not reach
            if func in _PRODUCTS and len(args) == 2 and not kwargs:
                mine, other = args if isinstance(args[0], cls) else (args[1], args[0])
                if _fits(mine, other):
                    plain = mine.detach().as_subclass(Tensor)
                    return GatedProduct.apply(mine.gate, other, plain, mine.activation)  # type: ignore[no-untyped-call]
            return func(*args, **(kwargs or {}))


def _fits(mine: _Activated, other: Any) -> bool:
    """Return whether a product of the two is that of a gated MLP, and nobody has written to what it needs."""
    return (
        isinstance(other, Tensor)
        and not isinstance(other, _Activated)
        and other.shape == mine.shape
        and other.dtype == mine.dtype
        and other.device == mine.device
        and torch.is_grad_enabled()
        and (mine.gate._version, mine._version) == mine.versions
    )


def _knowing(activation: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Return the activation's output as one that knows its gate, where gradients flow through it."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or not torch.is_grad_enabled():
        return output
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return output
    if len(activation._forward_hooks) > 1 or _global_forward_hooks:
        return output  # what they make of the output is not what the activation makes of the gate
    if len(inputs) != 1 or type(inputs[0]) is not Tensor or type(output) is not Tensor:
        return output
    (gate,) = inputs
    if not (output.requires_grad and gate.requires_grad) or output.shape != gate.shape or output.is_meta:
        return output
    if output.untyped_storage().data_ptr() == gate.untyped_storage().data_ptr():
        return output  # in place
    known = output.as_subclass(_Activated)
    known.gate, known.activation, known.versions = gate, activation.forward, (gate._version, known._version)
    return known


def _is_activation(module: nn.Module) -> bool:
    """Return whether `module` is an elementwise function with no tensors and no randomness."""
    known = type(module).__module__ in ("transformers.activations", "torch.nn.modules.activation")
    return known and not any(True for _ in module.state_dict()) and not isinstance(module, nn.RReLU)


def _autocast(device: str) -> Callable[[], AbstractContextManager[None]]:
    """Return what puts autocast into the state in which it is now."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return cast(
        "Callable[[], AbstractContextManager[None]]",
        lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False),
    )
