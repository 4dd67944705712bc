"""SPP against a loop over rows, its gradients, its costs, its refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import spp as published
from torch.nn import functional as F

from adapted import adapt, config_of, one_layer, sparse_llama, train
from conftest import random_llama
from secateur.core.errors import RecipeError
from secateur.core.pattern import NM
from secateur.methods.adapters.spp import SppConfig, spp_multiplier
from secateur.train.adapter_linear import adapted_linears
from strategies import seeds


def draw(bands: int, rows: int, columns: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(bands, columns, generator=generator, dtype=torch.float64)
    column = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    return row, column


@given(bands=st.integers(1, 5), height=st.integers(1, 4), columns=st.integers(1, 7), seed=seeds)
def test_every_row_of_a_band_is_multiplied_by_the_bands_row_and_its_own_number(bands, height, columns, seed):
    row, column = draw(bands, bands * height, columns, seed)
    multiplier = spp_multiplier(row, column, 2.0)
    for i in range(bands * height):
        for j in range(columns):
            expected = 2.0 * float(column[i, 0]) * float(row[i // height, j])
            assert float(multiplier[i, j]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("r", [1, 2, 4, 8])
@pytest.mark.parametrize("names", [["default"], ["default", "second"]], ids=["one", "two"])
def test_gradients_are_those_of_the_dense_formula(r, names):
    layer, _ = one_layer("spp", r=r)
    layer.add_adapter("second", config_of("spp", r=2, scaling=-0.5, init_weights=False))
    layer.set_adapter(names)
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, 8, dtype=torch.float64)
    weight = layer.base_layer.weight
    factor = 1.0
    leaves = [x]
    for name in names:
        row, column = layer.tensors(name)
        leaves += [row, column]
        bands = row.repeat_interleave(8 // len(row), 0)
        factor = factor + layer.configs[name].scaling * column * bands
    dense = F.linear(x, weight * factor, layer.base_layer.bias)
    expected = torch.autograd.grad((dense * upstream).sum(), leaves)
    output = layer(x)
    found = torch.autograd.grad((output * upstream).sum(), leaves)
    torch.testing.assert_close(output, dense, rtol=1e-12, atol=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_gradients_pass_a_numeric_check():
    layer, _ = one_layer("spp", r=2)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    parameters = layer.tensors("default")
    assert torch.autograd.gradcheck(lambda *inputs: layer(inputs[0]), (x, *parameters))


def test_the_published_sliced_form_gives_the_same_and_keeps_more_for_backward():
    layer, config = one_layer("spp", rows=64, columns=48, dtype=torch.float32, r=4)
    sliced = published.Sliced(layer.base_layer.weight, layer.base_layer.bias, *layer.tensors("default"), config.scaling)
    x = torch.randn(40, 48, requires_grad=True)
    outputs, kept = {}, {}
    for name, form in (("ours", layer), ("published", sliced)):
        outputs[name], kept[name] = published.saved_bytes(lambda form=form: form(x), list(layer.parameters()))
    torch.testing.assert_close(outputs["ours"], outputs["published"], rtol=1e-5, atol=1e-5)
    assert kept["ours"] == 4 * x.numel()
    assert kept["ours"] <= 0.6 * kept["published"]


def test_parameters_are_r_times_the_inputs_plus_the_outputs():
    model = adapt(sparse_llama(), config_of("spp", r=4))
    layers = adapted_linears(model)
    wanted = sum(4 * layer.in_features + layer.out_features for layer in layers)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_of_four_survives_training_and_merging(dtype):
    base = random_llama()
    for layer in base.model.layers:
        for linear in layer.modules():
            if isinstance(linear, torch.nn.Linear):
                linear.weight.data *= NM(2, 4).mask(linear.weight.detach().abs())
    model = adapt(base.to(dtype), config_of("spp", r=4))
    train(model, steps=4)
    merged = model.merge_and_unload()
    for layer in merged.model.layers:
        for linear in layer.modules():
            if isinstance(linear, torch.nn.Linear):
                NM(2, 4).check(linear.weight != 0)


def test_a_dense_base_works_and_is_said():
    with pytest.warns(UserWarning, match="the model is not sparse: none of the adapted weights is zero"):
        model = adapt(random_llama(), config_of("spp"))
    losses = train(model)
    assert losses[-1] < losses[0]


def test_dropping_rows_is_unbiased_and_only_in_training():
    layer, _ = one_layer("spp", r=2, dropout=0.5)
    x = torch.randn(2, 12, dtype=torch.float64)
    layer.eval()
    still = layer(x)
    assert torch.equal(layer(x), still)
    layer.train()
    plain = layer.base_layer(x)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = torch.stack([layer(x) for _ in range(800)])
    moved = (outputs != plain).double().mean((0, 1))
    assert ((moved > 0.4) & (moved < 0.6)).all()
    torch.testing.assert_close(outputs.mean(0) - plain, still - plain, rtol=0.3, atol=0.4)


def test_dropping_inputs_leaves_the_frozen_branch_alone():
    layer, config = one_layer("spp", r=2, dropout=0.5, dropout_mode="input")
    layer.train()
    x = torch.ones(1, 12, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        found = layer(x)
        torch.manual_seed(3)
        dropped = F.dropout(x, config.dropout)
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(found, layer.base_layer(x) + dropped @ delta.T)


def test_a_rank_that_does_not_divide_is_refused_with_ranks_that_do():
    with pytest.raises(
        RecipeError, match=r"`r` = 5 does not divide the \d+ output features of `model\.layers"
    ) as caught:
        adapt(sparse_llama(), SppConfig(r=5))
    assert "4, 8" in caught.value.hint
    model = adapt(sparse_llama(), SppConfig(r=4, rank_pattern={"down_proj": 32, r"layers\.0\.self_attn\.q_proj": 1}))
    ranks = {layer.name: len(layer.tensors("default")[0]) for layer in adapted_linears(model)}
    assert ranks["model.layers.1.mlp.down_proj"] == 32
    assert ranks["model.layers.0.self_attn.q_proj"] == 1
    assert ranks["model.layers.1.self_attn.q_proj"] == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dropout": 1.0}, "`dropout` must be at least 0 and below 1"),
        ({"dropout_mode": "rows"}, "`dropout_mode` must be"),
        ({"scaling": float("nan")}, "`scaling` must be a finite number"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": 3}, "`rank_pattern` must be a mapping"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(RecipeError, match=words):
        SppConfig(**settings)


def test_training_under_the_mask_ends_below_a_mask_put_on_afterwards():
    """The published baseline: LoRA on the dense model, merged, then masked."""
    from peft import LoraConfig, get_peft_model

    ids = torch.randint(64, (4, 24), generator=torch.Generator().manual_seed(1))
    sparse = sparse_llama()
    masks = {name: parameter != 0 for name, parameter in sparse.named_parameters()}
    ours = adapt(sparse, config_of("spp", r=16))
    train(ours, steps=40, rate=0.1, ids=ids)
    lora = get_peft_model(random_llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    train(lora, steps=40, rate=0.05, ids=ids)
    merged = lora.merge_and_unload()
    for name, parameter in merged.named_parameters():
        parameter.data.mul_(masks[name])
    with torch.no_grad():
        assert ours(input_ids=ids, labels=ids).loss < merged(input_ids=ids, labels=ids).loss
