"""Masked LoRA and DoRA: PEFT's own without a mask, the base with a full one, exact in between."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from adapted import adapt, config_of, one_layer, sparse_llama, train, zeros_of
from conftest import random_ids, random_llama
from secateur.core.errors import RecipeError
from secateur.methods.adapters.masked_lora import MaskedLoraConfig
from secateur.train.adapter_linear import adapted_linears

both = pytest.mark.parametrize("kind", ["masked_lora", "masked_lora dora"])


def dense_formula(layer, x, down, up, magnitude=None):
    """The naive graph: every product in full, nothing shared with the layer's own code."""
    weight = layer.base_layer.weight
    mask = (weight != 0).double()
    config = layer.configs["default"]
    s = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    total = weight + s * mask * (up @ down)
    if magnitude is not None:
        norm = (total**2).sum(1, keepdim=True).sqrt().detach()
        total = magnitude * total / norm
    return F.linear(x, total, layer.base_layer.bias)


@both
@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_are_those_of_the_dense_formula(kind, rslora):
    layer, _ = one_layer(kind, r=3, use_rslora=rslora)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 8, dtype=torch.float64)
    leaves = [x, *layer.tensors("default")]
    dense, output = dense_formula(layer, *leaves), layer(x)
    torch.testing.assert_close(output, dense, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad((dense * upstream).sum(), leaves)
    found = torch.autograd.grad((output * upstream).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_several_adapters_add_up():
    layer, _ = one_layer("masked_lora", r=3)
    layer.add_adapter("second", config_of("masked_lora", r=2, init_weights=False))
    x = torch.randn(5, 12, dtype=torch.float64)
    plain = layer.base_layer(x)
    parts = []
    for name in ("default", "second"):
        layer.set_adapter(name)
        parts.append(layer(x) - plain)
    layer.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), plain + parts[0] + parts[1])


@both
def test_without_zeros_it_is_pefts_own(kind):
    dora = "dora" in kind
    with pytest.warns(UserWarning, match="is not sparse"):
        ours = adapt(random_llama(), config_of(kind, r=4, lora_alpha=8))
    theirs = get_peft_model(random_llama(), LoraConfig(r=4, lora_alpha=8, use_dora=dora, target_modules="all-linear"))
    lora = dict(theirs.named_modules())
    for layer in adapted_linears(ours):
        other = lora[f"base_model.model.{layer.name}"]
        down, up, *length = layer.tensors("default")
        with torch.no_grad():
            up.normal_(generator=torch.Generator().manual_seed(len(layer.name)))
            other.lora_A["default"].weight.copy_(down)
            other.lora_B["default"].weight.copy_(up)
            if length:
                length[0].mul_(1.5)
                other.lora_magnitude_vector["default"].weight.mul_(1.5)
    ids = random_ids()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


@both
def test_with_nothing_kept_it_is_the_base_and_has_no_gradient(kind):
    layer, _ = one_layer(kind)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    assert torch.equal(output, layer.base_layer(x))
    output.sum().backward()
    assert not any(tensor.grad.any() for tensor in layer.tensors("default"))
    assert torch.equal(layer.merged_weight(["default"]), layer.base_layer.weight)


def test_a_row_that_is_wholly_pruned_stays_so_under_dora():
    layer, _ = one_layer("masked_lora dora")
    with torch.no_grad():
        layer.base_layer.weight[2] = 0.0
    merged = layer.merged_weight(["default"])
    assert torch.isfinite(merged).all()
    assert not merged[2].any()


def test_dropout_reaches_the_update_only():
    layer, _ = one_layer("masked_lora", lora_dropout=0.5)
    x = torch.ones(1, 12, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        found = layer.train()(x)
        torch.manual_seed(3)
        dropped = F.dropout(x, 0.5)
    torch.testing.assert_close(found, layer.base_layer(x) + dropped @ layer.get_delta_weight("default").T)


def test_plain_lora_fills_the_zeros_that_ours_keeps():
    base = sparse_llama()
    wanted = zeros_of(base)
    lora = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    train(lora)
    filled = zeros_of(lora.merge_and_unload())
    ours = adapt(sparse_llama(), config_of("masked_lora"))
    train(ours)
    kept = zeros_of(ours.merge_and_unload())
    name = "model.layers.0.mlp.up_proj.weight"
    assert wanted[name].float().mean() == pytest.approx(0.5, abs=0.05)
    assert not filled[name].any()
    assert torch.equal(kept[name], wanted[name])


def test_a_rank_that_the_matrix_does_not_have_is_refused():
    with pytest.raises(RecipeError, match=r"`r` = 64 is more than `model\.layers\.0.*` can use"):
        adapt(sparse_llama(), MaskedLoraConfig(r=64))
    with pytest.raises(RecipeError, match="`lora_dropout` must be at least 0 and below 1"):
        MaskedLoraConfig(lora_dropout=1.5)
    with pytest.raises(RecipeError, match="`lora_alpha` must be a finite number"):
        MaskedLoraConfig(lora_alpha="8")
