"""One linear with adapters: it trains them, and merges them by writing the same sum.

An adapter here is a rule that makes a `delta` `(out_features, in_features)` from a few small tensors and the frozen
weight. The layer applies the weight plus the deltas in one product, saves nothing for backward but its input, and
merges by writing the same sum. What a method adds: its tensors, and `delta` (with `delta_gradients` where the closed
form is cheaper than autograd).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from secateur.core.errors import InputError, NumericError, RecipeError, StateError
from secateur.core.shards import gathered, is_sharded
from secateur.train.adapter_config import AdapterConfig
from secateur.train.peft_parts import BaseTunerLayer, check_adapters_to_merge
from secateur.train.reweighted import Reweighted, widened

BASE = "__base__"  # PEFT's word for "no adapter" in a batch that mixes adapters


class AdapterLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A frozen linear and, for each adapter, the tensors that make its `delta`.

    A subclass names its containers (`nn.ParameterDict`s by adapter) in `adapter_layer_names`, creates them before
    `super().__init__`'s work is used, and says what one adapter's tensors are and what they make of the weight.

    Args:
        base_layer: an `nn.Linear` or GPT-2's transposed Conv1D.
        name: its module name in the model.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ("configs",)

    if TYPE_CHECKING:  # what PEFT gives, which has no types
        active_adapters: list[str]
        merged: bool
        disable_adapters: bool
        get_base_layer: Callable[[], Any]
        set_adapter: Callable[..., None]

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.transposed = isinstance(base_layer, Conv1D)
        self.out_features, self.in_features = self.weight_view().shape
        self.configs: dict[str, AdapterConfig] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._before_merge: Tensor | None = None
        for container in self.adapter_layer_names:
            setattr(self, container, nn.ParameterDict())

    # --- what a method fills in ---

    def create_(self, adapter: str, config: Any, generator: torch.Generator) -> None:
        """Create the tensors of `adapter`, float32 on CPU, in the containers of `adapter_layer_names`.

        Raises:
            RecipeError: if the settings do not fit this linear.
        """
        raise NotImplementedError

    def tensors(self, adapter: str) -> tuple[Tensor, ...]:
        """Return the tensors that `delta` takes; gradients flow to the adapter through them."""
        return tuple(getattr(self, container)[adapter] for container in self.adapter_layer_names)

    def delta(self, adapter: str, weight: Tensor, *tensors: Tensor) -> Tensor:
        """Return what `adapter` adds to the unmerged `weight`, `(out_features, in_features)`, float32 or wider.

        Differentiable in `tensors`; modifies none of its arguments.
        """
        raise NotImplementedError

    def delta_gradients(
        self, adapter: str, weight: Tensor, gradient: Tensor, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of `tensors`, given `gradient` `(out_features, in_features)` of the delta; may use it up."""
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            delta = self.delta(adapter, weight, *leaves)
        return tuple(torch.autograd.grad(delta, leaves, gradient, allow_unused=True))

    def combined(self, weight: Tensor, parts: Sequence[tuple[str, tuple[Tensor, ...]]]) -> Tensor:
        """Return `weight` plus the deltas of several adapters, each given with its tensors."""
        total = weight
        for adapter, tensors in parts:
            total = total + self.delta(adapter, weight, *tensors)
        return total

    def input_dropout(self, adapter: str) -> float:
        """Return the probability with which the adapter's own branch drops inputs in training."""
        return 0.0

    def kept(self, adapters: Sequence[str], weight: Tensor) -> Tensor | None:
        """Return where the merged weight may and must differ from zero, bool `(out_features, in_features)`.

        None leaves the pattern free. The default is the support of the unmerged `weight`.
        """
        return weight != 0

    @torch.no_grad()
    def effective_mask(self) -> Tensor:
        """Return where the weight with the active adapters is not zero, as if merged, bool `(out_features, in_features)`.

        What a mask that still moves prunes now counts as zero.
        """
        active = [adapter for adapter in self.active_adapters if self.has(adapter)]
        if self.disable_adapters or self.merged or not active:
            return self.weight_view() != 0
        weight = self.original_weight()
        kept = self.kept(active, weight)
        if kept is not None:
            return kept
        return self.combined(widened(weight), [(adapter, self._still(adapter)) for adapter in active]) != 0

    def check_mergeable(self, adapters: Sequence[str]) -> None:
        """Raise StateError if one of `adapters` is not in a state to be merged."""

    def put_(self, adapter: str, **tensors: Tensor) -> None:
        """Store tensors as trainable parameters of `adapter`, each in the container it is named after."""
        for container, tensor in tensors.items():
            getattr(self, container)[adapter] = nn.Parameter(tensor)

    # --- the frozen weight ---

    def weight_view(self) -> Tensor:
        """Return the weight as `(out_features, in_features)`, the parameter itself or its transposed view."""
        weight: Tensor = self.get_base_layer().weight
        return weight.T if self.transposed else weight

    def original_weight(self) -> Tensor:
        """Return the weight `(out_features, in_features)` without any merged adapter, detached."""
        return self.weight_view().detach() if self._before_merge is None else self._before_merge

    def check_whole(self) -> None:
        """Raise StateError if the weight is sharded (FSDP), so that nothing can be merged or taken back."""
        if is_sharded(self.get_base_layer().weight):
            raise StateError(
                f"the weight of `{self.name}` is sharded over several processes (FSDP), so no adapter can be merged",
                hint="save the adapter with the trainer's `save_model`, and merge it into the model in one process",
            )

    # --- PEFT's contract ---

    def has(self, adapter: str) -> bool:
        """Return whether this linear has an adapter of that name."""
        return adapter in self.configs

    def add_adapter(self, adapter: str, config: AdapterConfig) -> None:
        """Create an adapter, or the same adapter anew, and put it where the weight is."""
        self.configs[adapter] = config
        self.create_(adapter, config, generator_of(config.seed, self.name))
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter: str, device: torch.device | None = None) -> None:
        """Put the tensors of `adapter` where the weight is; never into a dtype below float32, unlike PEFT's own."""
        weight = self.get_base_layer().weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        for name in self.adapter_layer_names + self.other_param_names:
            container: Any = getattr(self, name)
            if not hasattr(container, "parameters") or adapter not in container:
                continue
            tensor = container[adapter]
            if not tensor.is_meta and (device or weight.device).type != "meta":
                dtype = wide if tensor.is_floating_point() else tensor.dtype
                container[adapter] = tensor.to(device or weight.device, dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what `adapter` adds to the weight, in the orientation of the parameter, float32 or wider."""
        self.check_whole()
        weight = self.original_weight()
        delta = self.delta(adapter, widened(weight), *self._still(adapter))
        return delta.T if self.transposed else delta

    @torch.no_grad()
    def merged_weight(self, adapters: Sequence[str]) -> Tensor:
        """Return the weight `(out_features, in_features)` with `adapters` merged into it, in its own dtype.

        Summed in float32 or wider and rounded once. A kept weight that would round to zero becomes the smallest number
        of the dtype instead, and zeros keep their very bits, so that the zero pattern is the same to the last bit.

        Raises:
            NumericError: if a merged value is not finite.
            InputError: if the zero pattern would change.
            StateError: if the weight is sharded (FSDP), or an adapter is not in a state to be merged.
        """
        self.check_whole()
        self.check_mergeable(adapters)
        weight = self.original_weight()
        total = self.combined(widened(weight), [(adapter, self._still(adapter)) for adapter in adapters])
        merged = total.to(weight.dtype)
        names = ", ".join(f"`{adapter}`" for adapter in adapters)
        bad = int((~torch.isfinite(merged)).sum())
        if bad:
            raise NumericError(f"merging {names} into `{self.name}` would make {bad} of its weights NaN or infinite")
        kept = self.kept(adapters, weight)
        if kept is None:
            return merged
        lost = int(((merged != 0) & ~kept).sum())
        if lost:
            raise InputError(
                f"merging {names} into `{self.name}` would fill {lost} of its {int((~kept).sum())} zeros",
                hint="keep the adapter beside the model, or train one that keeps zeros",
            )
        vanished = kept & (merged == 0)
        smallest = torch.full_like(merged, smallest_kept(merged.dtype)).copysign(weight)
        merged = torch.where(vanished, smallest, merged)
        return torch.where(kept, merged, torch.where(weight == 0, weight, torch.zeros_like(weight)))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the sum of weight and deltas into the weight; always checked first, with `safe_merge` or without.

        Raises:
            NumericError: if a merged value is not finite.
            InputError: if the zero pattern would change.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has(name)]
        if not names:
            return
        merged = self.merged_weight([*self.merged_adapters, *names])
        if self._before_merge is None:
            self._before_merge = self.original_weight().clone()
        self.weight_view().data.copy_(merged)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the unmerged weight back, bit for bit."""
        if self._before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.check_whole()
        self.weight_view().data.copy_(self._before_merge)
        self._before_merge = None
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the linear with the active adapters, or with one adapter per row of the batch."""
        names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._plain(x)
        if names is not None:
            return self.mixed(x, names)
        active = [adapter for adapter in self.active_adapters if self.has(adapter)]
        if self.merged or not active:
            return self._plain(x)
        return self.adapted(x, active)

    def adapted(self, x: Tensor, adapters: Sequence[str]) -> Tensor:
        """Return the output for `x` `(..., in_features)` with the sum of `adapters`."""
        rates = {adapter: self.input_dropout(adapter) if self.training else 0.0 for adapter in adapters}
        fused = [adapter for adapter in adapters if not rates[adapter]]
        result = self._reweighted(x, fused) if fused else self._plain(x)
        for adapter, rate in rates.items():
            if rate:
                result = result + self._reweighted(F.dropout(x, rate), [adapter], only_delta=True)
        return result

    def mixed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Return the output for `x` `(batch, ..., in_features)` with the adapter `names[i]` for row i.

        Raises:
            RecipeError: if there is not one name for each row, or adapters are merged.
        """
        self.check_mixed(x, names)
        result: Tensor | None = None
        for name in dict.fromkeys(names):
            rows = torch.tensor([row for row, other in enumerate(names) if other == name], device=x.device)
            part = x.index_select(0, rows)
            output = self.adapted(part, [name]) if self.has(name) else self._plain(part)
            result = output.new_empty(len(x), *output.shape[1:]) if result is None else result
            result = result.index_copy(0, rows, output)
        return self._plain(x) if result is None else result

    def check_mixed(self, x: Tensor, names: Sequence[str]) -> None:
        """Raise RecipeError unless `names` can be the adapters of the rows of `x`."""
        if len(names) != len(x):
            raise RecipeError(f"`adapter_names` needs one name for each of the {len(x)} rows, got {len(names)}")
        if self.merged:
            raise RecipeError("`adapter_names` cannot be used while an adapter is merged", hint="unmerge it first")

    def _plain(self, x: Tensor) -> Tensor:
        output: Tensor = self.base_layer(x)
        return output

    def _still(self, adapter: str) -> tuple[Tensor, ...]:
        """Return the tensors of `adapter` as they are merged: whole, without dropout and without gradient."""
        training, self.training = self.training, False
        try:
            return tuple(widened(gathered(tensor)) for tensor in self.tensors(adapter))
        finally:
            self.training = training

    def _reweighted(self, x: Tensor, adapters: Sequence[str], *, only_delta: bool = False) -> Tensor:
        weight = self.weight_view()
        bias = None if only_delta else self.get_base_layer().bias
        if weight.is_meta and not x.is_meta:
            raise InputError(f"the weight of `{self.name}` is not in memory, so it cannot be adapted")
        if is_sharded(weight):
            raise RecipeError(
                f"the weight of `{self.name}` is sharded by itself, so its adapter cannot read it",
                hint="shard whole blocks: `auto_wrap_policy: TRANSFORMER_BASED_WRAP`",
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        parts = [self.tensors(adapter) for adapter in adapters]
        flat = [tensor for part in parts for tensor in part]
        output: Tensor = Reweighted.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, self, tuple(adapters), tuple(map(len, parts)), only_delta, *flat
        )
        return output

    def __repr__(self) -> str:
        return f"secateur.{super().__repr__()}"


def adapted_linears(model: nn.Module) -> list[AdapterLinear]:
    """Return the linears of `model` that have adapters of ours, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, AdapterLinear)]


def generator_of(seed: int, name: str) -> torch.Generator:
    """Return the CPU generator of one linear: the same for the same seed and name, whatever else is drawn."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def smallest_kept(dtype: torch.dtype) -> float:
    """Return the smallest positive number that survives as a weight: normal, except in float16, whose range is short."""
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
