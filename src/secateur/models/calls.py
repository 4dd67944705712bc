"""What a model calls its blocks with beside the hidden state: noted once, then moved, cut into sequences and shared."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from secateur.core.errors import InputError

Path = tuple[Any, ...]
Axis = tuple[int, int]
CACHES = frozenset({"past_key_values", "past_key_value", "layer_past", "cache_params", "kv_cache"})


def call_of(args: tuple[Any, ...], kwargs: dict[str, Any], forward: Callable[..., Any]) -> tuple[Any, BlockCall]:
    """Return the hidden states and the call in the arguments of a block's `forward`; the call holds no cache."""
    if args:
        hidden, args = args[0], args[1:]
    else:
        first = first_parameter(forward)
        hidden = kwargs.get(first)
        kwargs = {name: value for name, value in kwargs.items() if name != first}
    rest = {name: None if name in CACHES else value for name, value in kwargs.items()}
    if "use_cache" in rest:
        rest["use_cache"] = False
    return hidden, BlockCall(args, rest).fresh()


def first_parameter(forward: Callable[..., Any]) -> str:
    """Return the name of the first parameter of `forward`, which takes the hidden states."""
    return next(iter(inspect.signature(forward).parameters), "")


def settle(
    names: Sequence[str],
    calls: Sequence[BlockCall],
    probes: Sequence[BlockCall],
    batch: int,
    dtype: torch.dtype | None,
    like: Sequence[BlockCall] | None,
) -> list[BlockCall]:
    """Return `calls` as they are worth keeping: it is known where their sequences lie, and nothing is held twice.

    Tensors that blocks share stay shared; a mask that is the same for every sequence is kept once.

    Args:
        names: names of the blocks.
        calls: one call for each block, for one batch.
        probes: the calls of the same batch with its first sequence once more at its end; `calls` if `batch` is 1.
        batch: sequences in the batch.
        dtype: what floating tensors are cast to, None for no cast.
        like: calls of an earlier batch; tensors equal to theirs are taken from there.
    """
    settler = _Settler(batch, dtype)
    before: Sequence[BlockCall | None] = like if like is not None else [None] * len(calls)
    return [
        settler.call(name, call, probe, earlier)
        for name, call, probe, earlier in zip(names, calls, probes, before, strict=True)
    ]


def cast(tensor: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """Return `tensor` on `device`, in `dtype` if it is floating; finite values (the lowest, in masks) stay so."""
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    device = tensor.device if device is None else torch.device(device)
    if (tensor.dtype, tensor.device) == (dtype, device):
        return tensor
    layout = zip(tensor.shape, tensor.stride(), strict=True)
    first = tuple(slice(0, 1) if size > 1 and not stride else slice(None) for size, stride in layout)
    once = tensor[first]  # what `expand` repeats is not written out
    if dtype.is_floating_point and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        limit = torch.finfo(dtype)
        once = torch.where(once.isfinite(), once.clamp(limit.min, limit.max), once)
    return once.to(device=device, dtype=dtype).expand_as(tensor)


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with beside the hidden state, for one batch.

    Attributes:
        args: positional arguments after the hidden state.
        kwargs: keyword arguments; caches are None.
        axes: where sequences lie, `{path of a tensor: (dimension, entries for each sequence)}`; tensors that are not
            listed serve all sequences alike. None if unknown: then a first dimension of the batch's size counts.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    axes: Mapping[Path, Axis] | None = field(default=None, repr=False)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BlockCall:
        """Return the call with its tensors on `device`, floating ones in `dtype`; what fits already is not copied."""
        return self.changed(lambda path, tensor: cast(tensor, device, dtype))

    def rows(self, rows: slice | None, batch: int) -> BlockCall:
        """Return the call for the sequences `rows` of its batch, as views.

        Args:
            rows: which sequences; None for all of them.
            batch: sequences in the whole batch.
        """
        if rows is None:
            return self

        def cut(path: Path, tensor: Tensor) -> Tensor:
            if self.axes is not None:
                axis = self.axes.get(path)
            else:
                axis = (0, 1) if tensor.dim() and tensor.shape[0] == batch else None
            if axis is None:
                return tensor
            dimension, each = axis
            shape = tensor.shape
            split = tensor.reshape(*shape[:dimension], batch, each, *shape[dimension + 1 :])  # (..., batch, each, ...)
            chosen: Tensor = split[(slice(None),) * dimension + (rows,)]
            return chosen.flatten(dimension, dimension + 1)

        return self.changed(cut)

    def fresh(self) -> BlockCall:
        """Return the call with containers of its own, which a block may write into; the tensors are the same."""
        return self.changed(lambda path, tensor: tensor)

    def has_store(self) -> bool:
        """Return whether an argument is an empty container: its only use is to carry something between blocks."""
        containers = (MutableMapping, MutableSequence)
        return any(isinstance(value, containers) and not value for value in (*self.args, *self.kwargs.values()))

    def tensors(self) -> dict[Path, Tensor]:
        """Return every tensor of the call by its path, such as `("args", 0)` or `("kwargs", "attention_mask")`."""
        found: dict[Path, Tensor] = {}

        def note(path: Path, tensor: Tensor) -> Tensor:
            found[path] = tensor
            return tensor

        self.changed(note)
        return found

    def changed(self, change: Callable[[Path, Tensor], Tensor], axes: Mapping[Path, Axis] | None = None) -> BlockCall:
        """Return the call with each tensor replaced by `change(path, tensor)`, and with `axes` if given."""
        args = _changed(self.args, change, ("args",))
        kwargs = _changed(self.kwargs, change, ("kwargs",))
        return BlockCall(args, kwargs, self.axes if axes is None else axes)


def _changed(value: Any, change: Callable[[Path, Tensor], Tensor], path: Path) -> Any:
    """Return `value` with tensors changed, containers copied and caches None; other objects are passed on."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, Cache):
        return None
    if isinstance(value, MutableMapping):
        own = copy.copy(value)
        for key, part in value.items():
            own[key] = _changed(part, change, (*path, key))
        return own
    if isinstance(value, (tuple, list)):
        parts = [_changed(part, change, (*path, index)) for index, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    inside = {} if isinstance(value, nn.Module) else getattr(value, "__dict__", {})
    if any(isinstance(part, Tensor) for part in inside.values()):
        raise InputError(
            f"a block is called with a `{type(value).__name__}`, which cannot be cut into sequences",
            hint='choose another attention first: model.set_attn_implementation("sdpa")',
        )
    return value


class _Settler:
    """`settle` for one batch; remembers what became of each tensor, because blocks share them."""

    def __init__(self, batch: int, dtype: torch.dtype | None) -> None:
        self.batch = batch
        self.dtype = dtype
        self.settled: dict[int, tuple[Tensor, Tensor, Axis | None]] = {}

    def call(self, name: str, call: BlockCall, probe: BlockCall, earlier: BlockCall | None) -> BlockCall:
        twins = probe.tensors()
        if twins.keys() != call.tensors().keys():
            raise InputError(
                f"the arguments of `{name}` depend on the number of sequences in other ways than their size"
            )
        known = earlier.tensors() if earlier is not None else {}
        axes: dict[Path, Axis] = {}

        def keep(path: Path, tensor: Tensor) -> Tensor:
            if id(tensor) not in self.settled:
                axis = self.axis(name, path, tensor, twins[path])
                value, axis = self.value(tensor, axis, known.get(path))
                self.settled[id(tensor)] = (
                    tensor,
                    value,
                    axis,
                )  # holding the tensor keeps its id from being used again
            _, value, axis = self.settled[id(tensor)]
            if axis is not None:
                axes[path] = axis
            return value

        return call.changed(keep, axes)

    def value(self, tensor: Tensor, axis: Axis | None, earlier: Tensor | None) -> tuple[Tensor, Axis | None]:
        """Return what to keep of `tensor`, and where its sequences lie then."""
        pairwise = tensor.dim() == 4 and tensor.shape[2] == tensor.shape[3]  # (batch, heads or 1, tokens, tokens)
        if axis == (0, 1) and pairwise and all(torch.equal(row, tensor[0]) for row in tensor[1:]):
            # an attention mask without padding; some models insist on its full shape, but it needs no memory for that
            tensor = tensor[:1].clone().expand_as(tensor)
        value = cast(tensor.detach(), None, self.dtype)
        if earlier is not None and (earlier.dtype, earlier.device) == (value.dtype, value.device):
            value = earlier if torch.equal(earlier, value) else value
        return value, axis

    def axis(self, name: str, path: Path, tensor: Tensor, probe: Tensor) -> Axis | None:
        """Return which dimension of `tensor` counts sequences: the one that is longer in `probe`."""
        if probe.shape == tensor.shape:
            return None
        grown = [at for at, size in enumerate(tensor.shape) if probe.dim() == tensor.dim() and probe.shape[at] != size]
        if len(grown) == 1:
            (at,) = grown
            each, rest = divmod(tensor.shape[at], self.batch)
            if rest == 0 and probe.shape[at] == each * (self.batch + 1):
                first = probe.narrow(at, 0, tensor.shape[at])  # the same, if the sequences lie one after the other
                if torch.allclose(first, tensor, rtol=1e-2, atol=1e-3, equal_nan=tensor.is_floating_point()):
                    return at, each
        raise InputError(
            f"the argument `{path[1]}` of `{name}`, {tuple(tensor.shape)}, cannot be cut into {self.batch} sequences",
            hint="calibrate with one sequence at a time (`batch_size: 1`)",
        )
