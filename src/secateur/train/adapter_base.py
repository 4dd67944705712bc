"""Which model an adapter is for: linears that can have one, and the record of those that it was made for."""

from __future__ import annotations

import hashlib
import warnings

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.core.errors import InputError
from secateur.core.mask import pack_bits
from secateur.models.experts import is_experts
from secateur.models.linears import FLOATS
from secateur.train.adapter_config import AdapterConfig
from secateur.train.adapter_linear import AdapterLinear, adapted_linears
from secateur.train.peft_parts import BaseTunerLayer

SAMPLES = 4096  # weights of a linear that its digest looks at


def check_linear(module: nn.Module, name: str, model: nn.Module) -> None:
    """Raise InputError unless `module` is a linear with an ordinary weight of its own."""
    if isinstance(module, BaseTunerLayer):
        raise InputError(f"`{name}` has an adapter of another method ({type(module).__name__}) already")
    if is_experts(module):
        raise packed_experts(f"`{name}` holds packed experts")
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


def packed_experts(what: str) -> InputError:
    """Return the error for experts that are still packed."""
    return InputError(
        f"{what}: experts are adapted one linear each",
        hint="unpack them first with `secateur.models.experts.unpack_experts_`",
    )


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
