"""Mixture experts: 3-D parameters to one linear for each expert, and back.

transformers keeps the experts of a layer as parameters `(experts, out, in)` in one module, where no hook and no pruner
of linears sees them. Unpacked, every other file meets ordinary linears. How a module lays its experts out is read from
the flags that transformers' experts interface gives it (`has_gate`, `is_transposed`, ...), so no family is named here.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import InputError

Index = tuple[int | slice, ...]
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
NORM = "post_expert_norm"


@dataclass(frozen=True)
class ExpertLinear:
    """Where the linear of one expert lies in the 3-D parameters of its experts module.

    Attributes:
        expert: number of the expert.
        name: "gate_proj", "up_proj" or "down_proj".
        parameter: name of the 3-D parameter.
        index: what selects the linear from the parameter.
        bias: name of the 2-D bias parameter, None without one.
        bias_index: what selects its bias from that.
        transposed: whether the parameter stores `(in_features, out_features)`.
    """

    expert: int
    name: str
    parameter: str
    index: Index
    bias: str | None
    bias_index: Index
    transposed: bool

    def weight(self, module: nn.Module) -> Tensor:
        """Return the weight `(out_features, in_features)`, a view of the parameter of `module`."""
        selected = module.get_parameter(self.parameter).detach()[self.index]
        return selected.T if self.transposed else selected

    def bias_of(self, module: nn.Module) -> Tensor | None:
        """Return the bias `(out_features,)`, a view of the parameter of `module`, or None."""
        return module.get_parameter(self.bias).detach()[self.bias_index] if self.bias is not None else None


@dataclass(frozen=True)
class Unpacked:
    """One experts module that was replaced: its path in the block, and itself, for `pack_experts_`."""

    path: str
    packed: nn.Module


def is_experts(module: nn.Module) -> bool:
    """Return whether `module` holds its experts as 3-D parameters in a layout that is known here."""
    if not all(isinstance(getattr(module, flag, None), bool) for flag in FLAGS):
        return False
    first = "gate_up_proj" if module.has_gate else "up_proj"
    wanted = {first: 3, "down_proj": 3}
    if module.has_bias:
        wanted |= {f"{first}_bias": 2, "down_proj_bias": 2}
    if {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)} != wanted:
        return False
    inside = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
    if inside - ({NORM} if _has_norm(module) else set()):
        return False
    return len(inspect.signature(module.forward).parameters) == 3 and callable(getattr(module, "_apply_gate", None))


def expert_linears(module: nn.Module) -> list[ExpertLinear]:
    """Return the linears of an experts module, expert after expert, each in the order of its forward.

    Args:
        module: one for which `is_experts` holds.
    """
    flags: dict[str, bool] = {flag: getattr(module, flag) for flag in FLAGS}
    first = "gate_up_proj" if flags["has_gate"] else "up_proj"
    experts, rows, columns = module.get_parameter(first).shape
    outputs = columns if flags["is_transposed"] else rows
    parts = {"up_proj": slice(None)}
    if flags["has_gate"]:
        half = outputs // 2
        parts = (
            {"gate_proj": slice(0, half), "up_proj": slice(half, None)}
            if flags["is_concatenated"]
            else {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
        )
    found = []
    for expert in range(experts):
        for name, part in [*parts.items(), ("down_proj", slice(None))]:
            parameter = "down_proj" if name == "down_proj" else first
            found.append(
                ExpertLinear(
                    expert,
                    name,
                    parameter,
                    (expert, slice(None), part) if flags["is_transposed"] else (expert, part),
                    f"{parameter}_bias" if flags["has_bias"] else None,
                    (expert, part),
                    flags["is_transposed"],
                )
            )
    return found


class UnpackedExperts(nn.Module):
    """The experts of one layer as linears `<expert>.gate_proj`, `<expert>.up_proj`, `<expert>.down_proj`.

    Gives what the packed module gives. Every linear is called exactly once in a forward, without tokens if no token was
    routed to its expert, so that forwards of different batches pass the same linears in the same order.
    The weights are views of the packed parameters: unpacking takes no memory, and edits in place reach both.
    """

    _packed: Any

    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        # not registered: its parameters are those of the linears, and its children become children here
        self.__dict__["_packed"] = packed
        self._signature = inspect.signature(packed.forward)
        self.num_experts = packed.get_parameter("down_proj").shape[0]
        for name, child in packed.named_children():  # activation, norm after the experts
            self.add_module(name, child)
        experts: list[dict[str, nn.Module]] = [{} for _ in range(self.num_experts)]
        for linear in expert_linears(packed):
            frozen = not packed.get_parameter(linear.parameter).requires_grad
            experts[linear.expert][linear.name] = _as_linear(linear.weight(packed), linear.bias_of(packed), frozen)
        for expert, linears in enumerate(experts):
            self.add_module(str(expert), nn.ModuleDict(linears))
        self.train(packed.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, in the shape of the hidden states.

        Args:
            *args: as the packed module takes them: hidden states `(tokens, hidden)`, the chosen experts int64
                `(tokens, chosen)` (a number beyond the experts means none), and their weights `(tokens, chosen)`.
            **kwargs: the same by name.
        """
        given, index, weights = self._signature.bind(*args, **kwargs).arguments.values()
        hidden = given.reshape(-1, given.shape[-1])  # (tokens, hidden)
        result = torch.zeros_like(hidden)
        for expert in range(self.num_experts):
            linears: Any = self.get_submodule(str(expert))
            token, choice = torch.where(index == expert)
            current = hidden[token]  # (routed tokens, hidden)
            output = linears["down_proj"](self._inner(linears, current))
            if _has_norm(self._packed):
                output = self.get_submodule(NORM)(output)
            output = output * weights[token, choice, None]
            result.index_add_(0, token, output.to(result.dtype))
        return result.reshape(given.shape)

    def _inner(self, linears: Any, current: Tensor) -> Tensor:
        """Return what enters `down_proj`, `(routed tokens, intermediate)`."""
        if not self._packed.has_gate:
            return self._packed.act_fn(linears["up_proj"](current))  # type: ignore[no-any-return]
        gate, up = linears["gate_proj"](current), linears["up_proj"](current)
        joined = torch.cat((gate, up), -1) if self._packed.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
        return self._packed._apply_gate(joined)  # type: ignore[no-any-return]


def unpack_experts_(block: nn.Module) -> list[Unpacked]:
    """Replace every experts module of `block` by an `UnpackedExperts`, in place; return what `pack_experts_` needs.

    The linears have the names that `find_linears` gives the slices of the packed module. Copy or move the block first:
    a copy made afterwards cannot be packed.
    """
    unpacked = [Unpacked(path, module) for path, module in block.named_modules() if path and is_experts(module)]
    for one in unpacked:
        block.set_submodule(one.path, UnpackedExperts(one.packed))
    return unpacked


def pack_experts_(block: nn.Module, unpacked: list[Unpacked]) -> None:
    """Put the packed experts modules back into `block`, in place, with the weights that their linears have now.

    Args:
        block: the block that was unpacked.
        unpacked: what `unpack_experts_` returned for it.

    Raises:
        InputError: if the block is not the one that was unpacked, or is packed already.
    """
    for one in unpacked:
        module = block.get_submodule(one.path)
        if not isinstance(module, UnpackedExperts):
            raise InputError(f"`{one.path}` is packed already")
        weights = {(linear.expert, linear.name): linear for linear in expert_linears(one.packed)}
        for (expert, name), linear in weights.items():
            current = module.get_submodule(f"{expert}.{name}")
            assert isinstance(current, nn.Linear)
            _adopt_place(one.packed, current.weight)
            _store(linear.weight(one.packed), current.weight)
            bias = linear.bias_of(one.packed)
            if bias is not None:
                _store(bias, current.bias)
        one.packed.train(module.training)
        block.set_submodule(one.path, one.packed)


def _has_norm(experts: nn.Module) -> bool:
    """Whether a norm follows each expert; older transformers (5.15) has no such experts."""
    return bool(getattr(experts, f"has_{NORM}", False))


def _as_linear(weight: Tensor, bias: Tensor | None, frozen: bool) -> nn.Linear:
    """Return a linear whose parameters are the given views."""
    # meta: the usual constructor would draw random weights, from the caller's generator
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=not frozen)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=not frozen)
    return linear


def _adopt_place(packed: nn.Module, like: Tensor) -> None:
    """Move the packed parameters to the device and dtype of `like`, to which the unpacked block was moved meanwhile."""
    for parameter in packed.parameters(recurse=False):
        if parameter.device != like.device or parameter.dtype != like.dtype:
            parameter.data = parameter.data.to(device=like.device, dtype=like.dtype)


def _store(place: Tensor, value: Tensor) -> None:
    """Copy `value` into `place`, unless it lives there anyway."""
    if place.data_ptr() != value.data_ptr() or place.stride() != value.stride():
        place.copy_(value.detach())
