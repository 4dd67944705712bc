"""PEFT's tuner for adapters of ours: which linears they are put on, merging all of them, and batches that mix them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

from torch import nn

from secateur.core.errors import InputError, RecipeError
from secateur.core.shards import is_sharded
from secateur.models.experts import is_experts
from secateur.models.linears import find_all_linears
from secateur.train.adapter_base import check_base, check_linear, described, packed_experts
from secateur.train.adapter_config import check_pattern_keys
from secateur.train.adapter_linear import BASE, AdapterLinear, adapted_linears
from secateur.train.peft_parts import BaseTuner, BaseTunerLayer


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
            RecipeError: if its settings do not fit the model, a key of `rank_pattern` fits no adapted linear, or the model
                is sharded already (FSDP).
        """
        if any(map(is_sharded, model.parameters())):
            raise RecipeError(
                "the weights of the model are sharded already (FSDP), so no adapter can be made for them",
                hint="call `get_peft_model` or `PeftModel.from_pretrained` before the trainer shards the model",
            )
        config = copy.deepcopy(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        check_base(model, config)
        new = config.base_weights is None
        try:
            with warnings.catch_warnings():
                if new:  # an error below; for an adapter that was made already PEFT's warning is enough
                    warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys", RuntimeWarning)
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            layers = [module for module in adapted_linears(model) if module.has(adapter_name)]
            if new:
                check_pattern_keys(config, [layer.name for layer in layers])
        except BaseException:
            _take_back(model, adapter_name)
            raise
        if new and not any(layer.original_weight().is_meta for layer in layers):
            config.base_weights = {layer.name: described(layer.original_weight()) for layer in layers}
        self.injected(model, config, adapter_name)

    def injected(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Look at the model once its linears are adapted; what a method has to say about it is said here."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # the default targets need the model: see _prepare_model

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.target_parameters:
            raise packed_experts("`target_parameters` is not supported")
        targets, layers = peft_config.target_modules, peft_config.layers_to_transform
        everywhere = isinstance(targets, str) and targets.lower() == "all-linear"
        if targets is None or (everywhere and layers is not None):
            peft_config.target_modules = set(default_targets(model, [layers] if isinstance(layers, int) else layers))
            # PEFT ignores the numbers where names are whole, and takes that of an expert for that of a block elsewhere
            peft_config.layers_to_transform = peft_config.layers_pattern = None

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


def default_targets(model: nn.Module, layers: Sequence[int] | None = None) -> list[str]:
    """Return the names of all prunable linears of the blocks, those that have adapters already included.

    Packed experts are left out with a warning that names them.

    Args:
        model: whose linears are looked for.
        layers: numbers of the blocks; all of them if None or empty.

    Raises:
        InputError: if the model is of an unknown architecture.
        RecipeError: if the model has no block of one of the numbers.
    """
    try:
        with without_adapters(model):
            views = find_all_linears(model)
    except InputError as error:
        raise InputError(str(error), hint="name the linears to adapt in `target_modules`") from error
    blocks = {view.block for view in views}
    if missing := sorted(set(layers or ()) - blocks):
        raise RecipeError(
            f"`layers_to_transform` names block {missing[0]}, but the model has blocks {min(blocks)} to {max(blocks)}"
        )
    packed = [name for name, module in model.named_modules() if is_experts(module)]
    if packed:
        warnings.warn(
            f"the experts of `{packed[0]}` and {len(packed) - 1} more modules are packed and get no adapter; "
            "unpack them first with `secateur.models.experts.unpack_experts_`",
            stacklevel=2,
        )
    return [view.name for view in views if view.module is not None and (not layers or view.block in layers)]


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
