"""Models with matrices that cannot be pruned: what the hint says is enough to prune the rest of them."""

from __future__ import annotations

import re

import pytest
import torch
import transformers

import secateur
from secateur.core.errors import InputError, RecipeError
from secateur.models.linears import find_all_linears, match

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {**SMALL, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "mamba": ("MambaForCausalLM", "MambaConfig", {**SMALL, "intermediate_size": 32, "state_size": 4}),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**HEADS, "intermediate_size_mlp": 32, "num_local_experts": 2},
    ),
    "jetmoe": (
        "JetMoeForCausalLM",
        "JetMoeConfig",
        {**SMALL, "num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 16, "num_local_experts": 2},
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **HEADS,
            **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "num_experts"), 2),
            **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "moe_intermediate_size"), 8),
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 8,
        },
    ),
}
IDS = torch.arange(48).reshape(4, 12)


def tiny(family):
    name, config, settings = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hint_of_a_refused_model_is_enough_to_prune_it(family):
    model = tiny(family)
    with pytest.raises(InputError, match="a matrix of an unknown kind") as caught:
        secateur.prune(model, method="magnitude", pattern="50%")
    ignore = re.findall('"(.*?)"', str(caught.value.hint))
    pruned, report = secateur.prune(model, method="magnitude", pattern="50%", ignore=ignore)
    assert report["sparsity"] == 0.5
    found = secateur.inspect(pruned)
    assert found["sparsity"] == 0.5
    left = dict(pruned.named_parameters())
    assert found["unknown"] and all(match(name, "", ignore) for name in found["unknown"])
    assert all(torch.equal(left[name], dict(model.named_parameters())[name]) for name in found["unknown"])


def test_the_rest_of_a_refused_model_is_calibrated_planned_and_evaluated():
    model = tiny("mamba")
    ignore = ["MambaMixer", "*.conv1d"]
    pruned, report = secateur.prune(
        model, method="wanda", pattern="50%", plan="owl", calibration=IDS, ignore=ignore, batch_tokens=24
    )
    assert report["sparsity"] == pytest.approx(0.5, abs=0.01)
    tuned, _ = secateur.tune(pruned, method="ebft", calibration=IDS, teacher=model, ignore=ignore)
    for before, after in zip(find_all_linears(pruned), find_all_linears(tuned), strict=True):
        assert not after.read()[before.read() == 0].any()


def test_a_pattern_that_means_neither_a_linear_nor_a_matrix_left_out_is_refused():
    with pytest.raises(RecipeError, match=r"`\*.down_proj` matches no linear"):
        secateur.prune(tiny("mamba"), method="magnitude", pattern="50%", ignore=["MambaMixer", "Conv1d", "*.down_proj"])


def test_a_weight_that_blocks_share_may_be_left_out(tiny_llama):
    one, two = (layer.mlp for layer in tiny_llama.model.layers)
    two.up_proj = one.up_proj
    with pytest.raises(InputError, match="shares its weight with"):
        secateur.prune(tiny_llama, method="magnitude", pattern="50%")
    pruned, _ = secateur.prune(tiny_llama, method="magnitude", pattern="50%", ignore=["*.up_proj"])
    assert torch.equal(pruned.model.layers[1].mlp.up_proj.weight, one.up_proj.weight)
    assert secateur.inspect(pruned)["linears"][0]["sparsity"] == 0.5
