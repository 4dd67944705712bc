"""What every adapter shares: its place in PEFT, one layer that trains and merges it, and the model it belongs to.

An adapter here is a rule that makes a `delta` `(out_features, in_features)` from a few small tensors and the frozen
weight. The layer applies the weight plus the deltas in one product, saves nothing for backward but its input, and
merges by writing the same sum. What a method adds: its tensors, and `delta` (with `delta_gradients` where the closed
form is cheaper than autograd).

PEFT keeps its methods in mappings by name and its own registration refuses names outside its enum, so `register`
writes into the mappings, under names of our own (`secateur_spp`).
"""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from secateur.core.errors import InputError, NumericError, RecipeError, StateError, missing_extra
from secateur.core.mask import pack_bits
from secateur.core.shards import gathered, is_sharded
from secateur.models.experts import is_experts
from secateur.models.linears import FLOATS, find_all_linears

try:
    from peft.config import PeftConfig
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
    from peft.utils.other import get_pattern_key
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "peft":
        raise
    raise missing_extra("peft", "peft", "train and load adapters") from error

FORMAT = 1  # of what is stored in `adapter_config.json`
BASE = "__base__"  # PEFT's word for "no adapter" in a batch that mixes adapters
SAMPLES = 4096  # weights of a linear that its digest looks at


class MethodName(str):
    """The name of a method in PEFT's mappings and files: a string that also answers as PEFT's enum does."""

    @property
    def value(self) -> str:
        """The plain string."""
        return str(self)


def register(config: type[AdapterConfig], tuner: type[AdapterModel]) -> None:
    """Make a method known to PEFT: its configuration, its tuner, and the prefix of its tensors.

    Doing it twice is harmless.

    Raises:
        ValueError: another method has the name or the prefix already.
    """
    name = method_name(config)
    if tuner.prefix != f"{name}_":
        raise ValueError(f"the prefix of `{tuner.__name__}` must be `{name}_`, got `{tuner.prefix}`")
    for mapping, mine in (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, tuner.prefix),
    ):
        if mapping.get(name, mine) != mine:
            raise ValueError(f"PEFT knows another method called `{name}`")
        mapping[name] = mine


def method_name(config: type[AdapterConfig]) -> MethodName:
    """Return the name under which PEFT knows the method of a configuration: `secateur_` and its short name."""
    return MethodName(f"secateur_{config.method}")


@dataclass
class AdapterConfig(PeftConfig):  # type: ignore[misc]
    """What every adapter can be told, and what it remembers of the model it was made for.

    Attributes:
        target_modules: names or name endings of the linears to adapt, a regular expression, or "all-linear"; None: every
            prunable linear of the blocks.
        exclude_modules: names, name endings or a regular expression of what to leave out of those.
        modules_to_save: modules to train and save whole beside the adapter, such as a new head.
        layers_to_transform: numbers of the blocks to adapt; None: all.
        layers_pattern: name of the list of blocks, for `layers_to_transform` in models that PEFT does not know.
        target_parameters: not supported, experts are unpacked first; here because PEFT asks for it.
        trainable_token_indices: token embeddings to train beside the adapter, for added tokens.
        init_weights: start as the base model; False draws every tensor at random, for tests.
        seed: of the random start; each linear draws from its own stream, so the order of modules does not matter.
        check_base: refuse a model other than the one that the adapter was made for.
        base_weights: `{linear: shape, dtype, digest of its zeros, digest of its values}`, filled in by the tuner.
        format_version: of this record.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_weights: bool = True
    seed: int = 0
    check_base: bool = True
    base_weights: dict[str, str] | None = None
    format_version: int = FORMAT

    method: ClassVar[str]
    suggested_rate: ClassVar[float] = 2e-4  # the learning rate to begin with
    records: ClassVar[frozenset[str]] = frozenset(
        {"target_parameters", "base_weights", "format_version"}
    )  # not settings

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = method_name(type(self))
        if self.format_version > FORMAT:
            raise InputError(
                f"the adapter has format version {self.format_version}, this version of secateur reads up to {FORMAT}",
                hint="pip install --upgrade secateur",
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise RecipeError(f"`{name}` needs `target_modules` as a list of names, not a regular expression")

    def callbacks(self) -> list[Any]:
        """Return what transformers' Trainer must call while the adapter is trained."""
        return []

    def prepared(self, model: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> Self:
        """Return the settings with what is to be known of `model` before its adapter is created; the default is itself.

        Args:
            model: that is to be tuned, left as it is.
            batches: gives token ids `(batch, tokens)` of the training data.
        """
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data; sets become sorted lists, so that equal adapters have equal files."""
        plain = {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}
        return plain | {"peft_type": str(self.peft_type)}


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
        delta = self.delta(adapter, _wide(weight), *self._still(adapter))
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
        total = self.combined(_wide(weight), [(adapter, self._still(adapter)) for adapter in adapters])
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
            return tuple(_wide(gathered(tensor)) for tensor in self.tensors(adapter))
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
            gradient = _wide(rows.T @ inputs)
            if needs_weight:
                with torch.enable_grad():
                    leaf = weight.detach().requires_grad_()
                    total = _total(ctx.layer, leaf, parts, ctx.only_delta)
                of_weight = torch.autograd.grad(total, leaf, gradient)[0]
            wide, place = _wide(weight.detach()), 0
            for number, (adapter, own) in enumerate(parts):
                mine = gradient if number == len(parts) - 1 else gradient.clone()
                found = ctx.layer.delta_gradients(adapter, wide, mine, *map(_wide, own))
                for value, tensor in zip(found, own, strict=True):
                    of_tensors[place] = None if value is None else value.to(tensor.dtype)
                    place += 1
        if needs_bias:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias, None, None, None, None, *of_tensors


class AdapterModel(BaseTuner):  # type: ignore[misc]
    """PEFT's tuner for adapters of ours: which linears are adapted, and what is checked before.

    A subclass sets `prefix` and `tuner_layer_cls`.
    """

    prefix: str
    tuner_layer_cls: type[AdapterLinear]
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adapt the targeted linears of `model`; the configuration is copied, the caller's stays as it was.

        Raises:
            InputError: if the adapter was made for another model or under another mask.
            RecipeError: if its settings do not fit the model, or the model is sharded already (FSDP).
        """
        if any(map(is_sharded, model.parameters())):
            raise RecipeError(
                "the weights of the model are sharded already (FSDP), so no adapter can be made for them",
                hint="call `get_peft_model` or `PeftModel.from_pretrained` before the trainer shards the model",
            )
        config = copy.deepcopy(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        check_base(model, config)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            _take_back(model, adapter_name)
            raise
        layers = [module for module in adapted_linears(model) if module.has(adapter_name)]
        if config.base_weights is None and not any(layer.original_weight().is_meta for layer in layers):
            config.base_weights = {layer.name: described(layer.original_weight()) for layer in layers}
        self.injected(model, config, adapter_name)

    def injected(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Look at the model once its linears are adapted; what a method has to say about it is said here."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # the default targets need the model: see _prepare_model

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.target_parameters:
            raise _packed("`target_parameters` is not supported")
        if peft_config.target_modules is None:
            peft_config.target_modules = set(default_targets(model))

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.add_adapter(adapter_name, peft_config)
            return
        check_linear(target, current_key, self.model)
        layer = self.tuner_layer_cls(target, current_key)
        layer._active_adapter = [adapter_name]
        layer.add_adapter(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the weights, all linears or none.

        Raises:
            NumericError, InputError: as `AdapterLinear.merged_weight`; no weight has changed then.
        """
        self._check_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merge(self, adapter_names: Sequence[str] | None) -> None:
        """Try every merge without writing, so that a refusal leaves the whole model as it was."""
        for layer in adapted_linears(self.model):
            wanted = layer.active_adapters if adapter_names is None else adapter_names
            names = [name for name in wanted if layer.has(name) and name not in layer.merged_adapters]
            if names:
                layer.merged_weight([*layer.merged_adapters, *names])

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand the names of a mixed batch to every adapted linear, for one forward."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise RecipeError("`adapter_names` is for inference, the model is in training mode")
        known = {name for layer in adapted_linears(self.model) for name in layer.configs} | {BASE}
        unknown = sorted(set(names) - known)
        if unknown:
            raise RecipeError(f"no adapter is called `{unknown[0]}`", hint=f"known: {', '.join(sorted(known))}")
        handles = [
            layer.register_forward_pre_hook(partial(_hand_names, names=names), with_kwargs=True)
            for layer in adapted_linears(self.model)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def adapted_linears(model: nn.Module) -> list[AdapterLinear]:
    """Return the linears of `model` that have adapters of ours, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, AdapterLinear)]


def default_targets(model: nn.Module) -> list[str]:
    """Return the names of all prunable linears of the blocks, those that have adapters already included.

    Packed experts are left out with a warning that names them.

    Raises:
        InputError: if the model is of an unknown architecture.
    """
    try:
        with without_adapters(model):
            views = find_all_linears(model)
    except InputError as error:
        raise InputError(str(error), hint="name the linears to adapt in `target_modules`") from error
    packed = [name for name, module in model.named_modules() if is_experts(module)]
    if packed:
        warnings.warn(
            f"the experts of `{packed[0]}` and {len(packed) - 1} more modules are packed and get no adapter; "
            "unpack them first with `secateur.models.experts.unpack_experts_`",
            stacklevel=2,
        )
    return [view.name for view in views if view.module is not None]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let `model` have its plain linears for a moment; their weights stay as they are, merged or not."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        if not isinstance(parent, BaseTunerLayer)
        for name, child in parent._modules.items()
        if isinstance(child, BaseTunerLayer)
    ]
    try:
        for parent, name, child in wrapped:
            parent._modules[name] = child.get_base_layer()
        yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


def check_linear(module: nn.Module, name: str, model: nn.Module) -> None:
    """Raise InputError unless `module` is a linear with an ordinary weight of its own."""
    if isinstance(module, BaseTunerLayer):
        raise InputError(f"`{name}` has an adapter of another method ({type(module).__name__}) already")
    if is_experts(module):
        raise _packed(f"`{name}` holds packed experts")
    if not isinstance(module, nn.Linear | Conv1D):
        raise InputError(
            f"`{name}` is a {type(module).__name__}, adapters are for linears",
            hint="name linears in `target_modules`",
        )
    weight = module.weight
    if weight.dtype not in FLOATS or weight.dim() != 2:
        raise InputError(
            f"the weight of `{name}` is stored as {weight.dtype}, which cannot be adapted",
            hint="give the model in bf16, fp16 or fp32",
        )
    owners = [
        path
        for path, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is weight and path != f"{name}.weight"
    ]
    if owners:
        raise InputError(
            f"`{name}` shares its weight with `{owners[0].removesuffix('.weight')}`: merging into one would change both",
            hint="leave it out of `target_modules`, or untie the weights first",
        )


def check_base(model: nn.Module, config: AdapterConfig) -> None:
    """Raise InputError if `model` is not the one that the adapter of `config` was made for; new adapters pass.

    Shapes and zeros are compared exactly, values by samples rounded to bfloat16, so that the same checkpoint in
    another dtype passes (float16 rounds otherwise, so against another dtype only shapes and zeros count).
    """
    if not config.check_base or config.base_weights is None:
        return
    hint = "load the model that it was trained on; `check_base=False` in its configuration skips this"
    weights = {name: _weight_called(model, name) for name in config.base_weights}
    if any(weight is not None and weight.is_meta for weight in weights.values()):
        return  # not in memory: there is nothing to compare
    for name, weight in weights.items():  # the shapes of all before the values of any: they say more
        if weight is None:
            raise InputError(f"the adapter is for another model: this one has no linear `{name}`", hint=hint)
        was, found = config.base_weights[name].split(), _shape_of(weight)
        if len(was) != 4:
            raise InputError(f"the record of `{name}` in `base_weights` is malformed: `{' '.join(was)}`")
        if was[0] != found:
            raise InputError(f"the adapter is for another model: `{name}` is {found}, not {was[0]}", hint=hint)
    for name, weight in weights.items():
        assert weight is not None
        _, dtype, zeros, values = config.base_weights[name].split()
        _, own_dtype, own_zeros, own_values = described(weight).split()
        if zeros != own_zeros:
            raise InputError(f"the adapter was trained under another mask of `{name}`", hint=hint)
        comparable = dtype == own_dtype or "float16" not in (dtype, own_dtype)
        if comparable and values != own_values:
            raise InputError(f"the adapter is for another model: the weights of `{name}` are not the same", hint=hint)


def described(weight: Tensor) -> str:
    """Return shape, dtype, digest of the zeros and digest of sampled values of a weight, words on one line."""
    columns = weight.shape[1]
    place = torch.arange(0, weight.numel(), max(1, weight.numel() // SAMPLES), device=weight.device)
    values = weight[place // columns, place % columns].to(torch.bfloat16) + 0.0  # -0.0 is 0.0
    zeros = hashlib.sha256(pack_bits(weight != 0).numpy().tobytes()).hexdigest()[:16]
    digest = hashlib.sha256(values.cpu().view(torch.int16).numpy().tobytes()).hexdigest()[:16]
    return f"{_shape_of(weight)} {str(weight.dtype).removeprefix('torch.')} {zeros} {digest}"


def generator_of(seed: int, name: str) -> torch.Generator:
    """Return the CPU generator of one linear: the same for the same seed and name, whatever else is drawn."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def note_dense_base(model: nn.Module, adapter: str) -> None:
    """Warn if none of the linears with `adapter` has a zero in its weight."""
    layers = [layer for layer in adapted_linears(model) if layer.has(adapter)]
    weights = [weight for weight in (layer.original_weight() for layer in layers) if not weight.is_meta]
    if weights and all(bool((weight != 0).all()) for weight in weights):
        warnings.warn(
            "the model is not sparse: none of the adapted weights is zero, so there is no sparsity to keep; "
            "prune it first with `secateur.prune`",
            stacklevel=2,
        )


def rank_of(config: Any, name: str) -> int:
    """Return the `r` of the linear `name`: that of the first key of `rank_pattern` that fits, or `config.r`."""
    patterns = config.rank_pattern or {}
    return int(patterns.get(get_pattern_key(patterns.keys(), name), config.r))


def check_rank(r: object, rank_pattern: object = None, name: str = "r") -> None:
    """Raise RecipeError unless the field `name`, and every value of `rank_pattern`, is a whole number from 1."""
    if rank_pattern is not None and not isinstance(rank_pattern, dict):
        raise RecipeError(f"`rank_pattern` must be a mapping of linears to ranks, got {rank_pattern!r}")
    for field, value in [
        (name, r),
        *((f"rank_pattern[{key!r}]", value) for key, value in (rank_pattern or {}).items()),
    ]:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RecipeError(f"`{field}` must be a whole number from 1, got {value!r}")


def check_rate(name: str, value: object) -> None:
    """Raise RecipeError unless the field `name` is a probability below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise RecipeError(f"`{name}` must be at least 0 and below 1, got {value!r}")


def check_finite(name: str, value: object) -> None:
    """Raise RecipeError unless the field `name` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecipeError(f"`{name}` must be a finite number, got {value!r}")


def _weight_called(model: nn.Module, name: str) -> Tensor | None:
    """Return the unmerged weight `(out_features, in_features)` of the linear `name`, None if there is none."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    if isinstance(module, AdapterLinear):
        return module.original_weight()
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight = getattr(inner, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    return weight.detach().T if isinstance(inner, Conv1D) else weight.detach()


def _shape_of(weight: Tensor) -> str:
    return f"{weight.shape[0]}x{weight.shape[1]}"


def _total(
    layer: AdapterLinear, weight: Tensor, parts: list[tuple[str, tuple[Tensor, ...]]], only_delta: bool
) -> Tensor:
    """Return the weight that the adapters make, float32 or wider."""
    wide = _wide(weight)
    parts = [(adapter, tuple(map(_wide, tensors))) for adapter, tensors in parts]
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


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def smallest_kept(dtype: torch.dtype) -> float:
    """Return the smallest positive number that survives as a weight: normal, except in float16, whose range is short."""
    return 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny


def _take_back(model: nn.Module, adapter: str) -> None:
    """Remove what a failed injection of `adapter` has left in `model`."""
    for parent in list(model.modules()):
        for name, layer in parent._modules.items():
            if not isinstance(layer, AdapterLinear) or not layer.has(adapter):
                continue
            for container in (*layer.adapter_layer_names, *layer.other_param_names):
                if adapter in getattr(layer, container):
                    del getattr(layer, container)[adapter]
            if not layer.configs:
                parent._modules[name] = layer.base_layer


def _hand_names(module: nn.Module, args: Any, kwargs: Any, *, names: Sequence[str]) -> Any:
    return args, {**kwargs, "adapter_names": names}


def _packed(what: str) -> InputError:
    return InputError(
        f"{what}: experts are adapted one linear each",
        hint="unpack them first with `secateur.models.experts.unpack_experts_`",
    )
