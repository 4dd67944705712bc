"""What trained S2FT adapters can do apart from their base: be fused, switched in place, and leave as plain LoRA.

Section 4 of arXiv 2412.06289: a slice is the change of k rows or columns, so a weighted sum of adapters is an adapter,
a switch writes k lines and no product, and k one-hot rows beside the slice make the factors of a LoRA.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.core.errors import InputError, RecipeError, did_you_mean
from secateur.methods.adapters.s2ft import S2ftConfig, S2ftModel
from secateur.methods.adapters.s2ft_linear import S2ftLinear
from secateur.methods.adapters.s2ft_selection import Units
from secateur.models.publish import publish
from secateur.train.adapter_config import check_finite
from secateur.train.adapter_linear import BASE


def switch_(model: nn.Module, adapter: str, *, merge: bool = True) -> None:
    """Let `adapter` take the place of the one that answers now, exactly reversibly.

    Merged, only k lines of each linear are written; the overwritten lines are kept and copied back, so any sequence of
    switches that ends at an adapter gives the same bits. The forward then costs what the base costs. Not merged, the
    weights are the base's and are not touched at all: a reference is set in each linear, and the forward adds the
    slice's thin product. Whole modules that the adapter trains beside its slices are switched with it.

    Who writes to the weights writes to what is merged: switch to "__base__" before.

    Args:
        model: a model with S2FT adapters.
        adapter: its name, or "__base__" for the plain weights with no adapter active.
        merge: write the adapter into the weights; False takes out what is merged there, once, and leaves them alone.

    Raises:
        RecipeError: if there is no such adapter.
        NumericError: if a merged weight would not be finite.
        StateError: if a weight is sharded (FSDP). After this and any other error what was merged is merged again.
    """
    tuner = tuner_of(model)
    if adapter != BASE:
        _known(tuner, adapter)
    names = [] if adapter == BASE else [adapter]
    layers = tuner.prepared or s2ft_linears(tuner)
    wanted = names if merge else []
    done: list[tuple[S2ftLinear, list[str]]] = []
    try:
        for layer in layers:
            if merge or layer.merged_adapters:
                done.append((layer, list(layer.merged_adapters)))
                layer.remerge_(wanted)
    except BaseException:
        for layer, former in done:
            layer.remerge_(former)
        raise
    for layer in layers:
        layer._active_adapter = names
    if any(map(_trains_whole_modules, tuner.peft_config.values())):
        _switch_whole_modules_(tuner.model, adapter)
    tuner.active_adapter = adapter if names else []
    if isinstance(model, PeftModel) and names:  # PEFT's forward fails where none is named, so the last name stays
        model.active_adapter = adapter


def prepare_switches_(model: nn.Module, adapters: Sequence[str] | None = None) -> None:
    """Make `switch_` a copy of memory: compute beforehand what each adapter writes, and store columns as columns.

    For programs that switch often. Costs the memory of the slices twice more. Shapes, values and results of saving stay
    as they are, but weights whose columns are selected are no longer contiguous by rows, and outputs may differ in
    the last bits from before, as sums are formed in another order. An adapter that is trained further, or replaced, is
    merged as before until this is called again; changes through `.data`, and modules that were replaced since, are not
    seen. A copy of the model is to be prepared anew.

    Args:
        model: a model with S2FT adapters, changed in place.
        adapters: their names; all if None.

    Raises:
        RecipeError: if there is no such adapter.
        NumericError: if a merged weight would not be finite.
    """
    tuner = tuner_of(model)
    for adapter in adapters or ():
        _known(tuner, adapter)
    layers = s2ft_linears(tuner)
    for layer in layers:
        layer.prepare_(list(tuner.peft_config) if adapters is None else adapters)
    tuner.prepared = layers


def forget_switches_(model: nn.Module) -> None:
    """Undo `prepare_switches_`; what is merged stays merged.

    Args:
        model: a model with S2FT adapters, changed in place.
    """
    tuner = tuner_of(model)
    tuner.prepared = ()
    for layer in s2ft_linears(tuner):
        layer.forget_()


def fuse_(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """Add the adapter `name`, the weighted sum of others, which stay as they are; it is not made active.

    Exact, because slices only add up: where the adapters' units do not overlap each is there unchanged but for its
    weight, where they do their changes are summed.

    Args:
        model: a model with S2FT adapters.
        weights: what each adapter is multiplied by.
        name: of the new adapter.

    Raises:
        RecipeError: if an adapter is not there, the name is taken, or a weight is not finite.
        InputError: if one of the adapters trains whole modules beside its slices, which cannot be summed.
    """
    tuner = tuner_of(model)
    if not weights:
        raise RecipeError("no adapter is given to fuse")
    if name in tuner.peft_config or name == BASE:
        raise RecipeError(f"there is an adapter `{name}` already", hint="give the fused one a new name")
    for adapter, factor in weights.items():
        _known(tuner, adapter)
        check_finite(f"weight of {adapter}", factor)
        _refuse_whole_modules(tuner, adapter, "fused")
    configs: list[S2ftConfig] = [tuner.peft_config[adapter] for adapter in weights]
    config = copy.deepcopy(configs[0])
    config.units = _union(configs)
    config.keep_sparsity = all(one.keep_sparsity for one in configs)
    config.inference_mode, config.init_weights = True, True
    config.base_weights = None
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        tuner.peft_config[name] = config
        tuner.inject_adapter(tuner.model, name)
    with torch.no_grad():
        for layer in s2ft_linears(tuner):
            if not layer.has(name):
                continue
            part, index = layer.secateur_s2ft_slice[name], layer.secateur_s2ft_index[name]
            for adapter, factor in weights.items():
                if layer.has(adapter):
                    place = torch.searchsorted(index, layer.secateur_s2ft_index[adapter])
                    part.index_add_(0, place, factor * layer.tensors(adapter)[0].to(part.dtype))


def export_lora(model: nn.Module, folder: str | Path, adapter: str = "default", overwrite: bool = False) -> None:
    """Write `adapter` as a LoRA adapter folder that gives the same outputs in plain PEFT and in LoRA servers.

    The rank of each linear is its number of lines k: one factor picks the lines, the other is the slice, and the scale
    is 1. The folder is published whole or not at all.

    Args:
        model: a model with S2FT adapters.
        folder: where to write.
        adapter: which one.
        overwrite: replace a folder that is there.

    Raises:
        RecipeError: if there is no such adapter.
        InputError: if it trains whole modules beside its slices.
        StateError: if the folder is there and `overwrite` is false.
    """
    tuner = tuner_of(model)
    _known(tuner, adapter)
    _refuse_whole_modules(tuner, adapter, "written as LoRA")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    layers = [layer for layer in s2ft_linears(tuner) if layer.has(adapter)]
    for layer in layers:
        first, second = lora_factors(layer, adapter)
        ranks[layer.name] = len(first)
        tensors[f"base_model.model.{layer.name}.lora_A.weight"] = first
        tensors[f"base_model.model.{layer.name}.lora_B.weight"] = second
    rank = max(ranks.values())
    config: Any = tuner.peft_config[adapter]
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=sorted(ranks),
        rank_pattern={name: own for name, own in ranks.items() if own != rank},
        alpha_pattern={name: own for name, own in ranks.items() if own != rank},
        fan_in_fan_out=any(layer.transposed for layer in layers),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    with publish(Path(folder), overwrite) as fresh:
        lora.save_pretrained(str(fresh))
        save_file(tensors, fresh / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def lora_factors(layer: S2ftLinear, adapter: str) -> tuple[Tensor, Tensor]:
    """Return A `(k, in_features)` and B `(out_features, k)` on CPU, whose product `B A` is the adapter's change."""
    part = layer.tensors(adapter)[0].detach().cpu().contiguous()
    index = layer.secateur_s2ft_index[adapter].cpu()
    width = layer.in_features if layer.columns else layer.out_features
    picks = torch.zeros(len(index), width, dtype=part.dtype)
    picks[torch.arange(len(index)), index] = 1.0
    return (picks, part.T.contiguous()) if layer.columns else (part, picks.T.contiguous())


def s2ft_linears(model: nn.Module) -> list[S2ftLinear]:
    """Return the linears with S2FT adapters, in the order of the model's modules."""
    return [module for module in model.modules() if isinstance(module, S2ftLinear)]


def tuner_of(model: nn.Module) -> Any:
    """Return PEFT's tuner of a model with S2FT adapters.

    Raises:
        InputError: if it has none.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, S2ftModel):
        raise InputError(
            f"{type(model).__name__} has no S2FT adapters", hint="get_peft_model(model, S2ftConfig()) adds one"
        )
    return tuner


def _known(tuner: Any, adapter: str) -> None:
    if adapter not in tuner.peft_config:
        known = list(tuner.peft_config)
        raise RecipeError(
            f"no adapter is called `{adapter}`{did_you_mean(adapter, known)}", hint=f"known: {', '.join(known)}"
        )


def _refuse_whole_modules(tuner: Any, adapter: str, what: str) -> None:
    if _trains_whole_modules(tuner.peft_config[adapter]):
        raise InputError(f"`{adapter}` trains whole modules beside its slices, so it cannot be {what}")


def _switch_whole_modules_(model: nn.Module, adapter: str) -> None:
    """Let whole modules be those of `adapter`, or the base's; what is trained stays so, unlike with PEFT's own way."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
            module.set_adapter(adapter if adapter in module._adapters else [])
            for parameter, needed in trained:
                parameter.requires_grad_(needed)


def _trains_whole_modules(config: Any) -> bool:
    return bool(config.modules_to_save or config.trainable_token_indices)


def _union(configs: list[S2ftConfig]) -> Units:
    found: dict[str, dict[int, set[int]]] = {}
    for config in configs:
        for kind, blocks in (config.units or {}).items():
            for number, units in blocks.items():
                found.setdefault(kind, {}).setdefault(number, set()).update(units)
    return {kind: {number: sorted(units) for number, units in blocks.items()} for kind, blocks in found.items()}
