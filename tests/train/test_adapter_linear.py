"""One linear: merging to the last bit, and a start of its own."""

from __future__ import annotations

import pytest
import torch

from adapted import adapt, config_of, one_layer, sparse_llama
from secateur.train.adapter_linear import adapted_linears, generator_of


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_kept_weight_that_would_round_to_zero_keeps_its_place_and_sign(dtype):
    layer, _ = one_layer("spp", dtype=dtype, r=1, scaling=1.0)
    weight = layer.base_layer.weight
    with torch.no_grad():
        weight.copy_(torch.where(weight == 0, 0.0, torch.randn(weight.shape).sign() * torch.finfo(dtype).tiny))
        weight[0, 0] = -0.0
        layer.secateur_spp_row["default"].fill_(1.0)
        layer.secateur_spp_column["default"].fill_(-1.0)  # every weight times zero
    merged = layer.merged_weight(["default"])
    assert torch.equal(merged == 0, weight == 0)
    assert torch.equal(torch.signbit(merged), torch.signbit(weight))
    assert merged.abs().max() <= torch.finfo(dtype).tiny


def test_merging_one_after_the_other_is_merging_both():
    layer, _ = one_layer("spp", r=2)
    layer.add_adapter("second", config_of("spp", r=1, init_weights=False))
    together = layer.merged_weight(["default", "second"])
    before = layer.base_layer.weight.clone()
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        layer.merge(adapter_names=["second"])
    assert torch.equal(layer.base_layer.weight, together)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_the_start_does_not_depend_on_the_order_of_modules_or_the_global_seed():
    state = torch.random.get_rng_state()
    models = [adapt(sparse_llama(), config_of("spp", target_modules=names)) for names in (["up_proj"], None)]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, second = ({layer.name: layer for layer in adapted_linears(model)} for model in models)
    for name, layer in first.items():
        assert torch.equal(layer.tensors("default")[0], second[name].tensors("default")[0])
    assert generator_of(0, "a").initial_seed() != generator_of(0, "b").initial_seed()
    assert generator_of(1, "a").initial_seed() != generator_of(0, "a").initial_seed()
