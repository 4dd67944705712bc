"""Sparse tiny models with adapters, and what tests ask of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from conftest import random_ids, random_llama
from secateur.methods.adapters.pst import advance_pst_
from secateur.methods.registry import REGISTRY
from secateur.models.linears import find_all_linears
from secateur.train.adapter_config import AdapterConfig
from secateur.train.adapter_linear import AdapterLinear, adapted_linears

# what each registered adapter is built with on tiny models; a variant of one has a name of its own
SETTINGS: dict[str, dict] = {
    "spp": {"r": 4, "dropout": 0.0},
    "masked_lora": {"r": 4},
    "masked_lora dora": {"r": 4, "use_dora": True},
    "s2ft": {"o": 2, "down": 0.2},
    "pst": {"pattern": "60%", "r": 2, "importance_r": 2},
}
for _entry in REGISTRY:
    if _entry.kind == "adapter" and _entry.name != "lora":  # PEFT's own, which keeps nothing of what ours promise
        SETTINGS.setdefault(_entry.name, {})
each_adapter = pytest.mark.parametrize("kind", SETTINGS)
# S2FT selects units over the whole model and takes its linears from there; the others adapt any linear that is named
each_that_is_told = pytest.mark.parametrize("kind", [kind for kind in SETTINGS if kind != "s2ft"])


def config_of(kind: str, **settings) -> AdapterConfig:
    """Return the configuration of an adapter by its name in `SETTINGS`."""
    entry = REGISTRY.find(kind.split()[0], "adapter")
    return entry.load()(**{**SETTINGS[kind], "task_type": "CAUSAL_LM", **settings})


def prune_(model: nn.Module, sparsity: float = 0.5, seed: int = 5) -> nn.Module:
    """Set random weights of the blocks' linears to zero, the same for the same seed, and return the model."""
    generator = torch.Generator().manual_seed(seed)
    for view in find_all_linears(model):
        weight = view.read()
        weight.masked_fill_(torch.rand(weight.shape, generator=generator) < sparsity, 0.0)
    return model


def sparse_llama(seed: int = 0, mask_seed: int = 5, **settings) -> nn.Module:
    """Return a random LLaMA with half of the weights of its blocks pruned."""
    return prune_(random_llama(seed=seed, **settings), seed=mask_seed)


def unloaded(model: nn.Module) -> nn.Module:
    """Take the weights of a model out of memory, but not its buffers, and return it."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.to("meta")))
    return model


def adapt(model: nn.Module, config: AdapterConfig, name: str = "default"):
    """Return the PEFT model."""
    from peft import get_peft_model

    return get_peft_model(model, config, adapter_name=name)


def train(model: nn.Module, steps: int = 3, rate: float = 0.05, ids: Tensor | None = None) -> list[float]:
    """Take steps of AdamW on one batch, moving the masks of PST; leaves the model in eval mode; return the losses."""
    ids = random_ids() if ids is None else ids
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    finish(model)
    return losses


def finish(model: nn.Module) -> None:
    """Fix the masks of PST, if the model has any."""
    if any("secateur_pst_mask" in name for name, _ in model.named_buffers()):
        advance_pst_(model, 1, 1)


def shake(model: nn.Module, seed: int = 0) -> None:
    """Give every adapter tensor values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_linears(model):
            for container in layer.adapter_layer_names:
                for tensor in getattr(layer, container).values():
                    tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator).to(tensor))


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the zero pattern of every parameter outside of adapters, by its name in the plain model."""
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): parameter.detach() == 0
        for name, parameter in model.named_parameters()
        if "secateur_" not in name
    }


def one_layer(kind: str, rows: int = 8, columns: int = 12, dtype=torch.float64, sparse: bool = True, **settings):
    """Return one adapted linear with tensors that matter, and its config."""
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(columns, rows, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(rows, columns, generator=generator))
        if sparse:
            linear.weight.masked_fill_(torch.rand(rows, columns, generator=generator) < 0.5, 0.0)
        linear.bias.copy_(torch.randn(rows, generator=generator))
    linear.requires_grad_(False)
    config = config_of(kind, **settings)
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    layer: AdapterLinear = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].tuner_layer_cls(linear, "linear")
    layer._active_adapter = ["default"]
    if kind == "s2ft":
        config.lines = {"linear": (True, torch.arange(0, columns, 5))}
    layer.add_adapter("default", config)
    shake(layer)
    return layer, config
