"""S2FT: its gradients, its exactness, and what PEFT's users do with an adapter."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from adapted import adapt, config_of, sparse_llama, train, unloaded, zeros_of
from conftest import random_ids, random_llama
from families import prepared
from secateur.core.errors import InputError, NumericError, RecipeError
from secateur.methods.adapters import s2ft
from secateur.methods.adapters.s2ft import S2ftConfig, chosen
from secateur.methods.adapters.s2ft_exchange import (
    export_lora,
    forget_switches_,
    fuse_,
    prepare_switches_,
    s2ft_linears,
    switch_,
)
from secateur.methods.adapters.s2ft_linear import S2ftLinear
from secateur.methods.adapters.s2ft_product import Sliced
from secateur.methods.adapters.s2ft_selection import Wish, choose, drawn, ranked, unit_scores
from secateur.models.layout import KINDS, find_layout, oriented
from secateur.train.gated_product import keep_activations_

FAMILIES = ("llama", "qwen3", "gemma2", "phi3", "opt", "gpt2")
IDS = random_ids(3, 12, 60)
COUPLED = {"o": 1, "down": 0.1, "coupled": True}


def tuned(model=None, adapters=("default",), **settings):
    """Return a model with random, not empty, adapters of different selections, in eval mode."""
    model = get_peft_model(model or random_llama(), S2ftConfig(init_weights=False, **settings), adapters[0])
    for number, name in enumerate(adapters[1:], 1):
        model.add_adapter(name, S2ftConfig(init_weights=False, seed=number, **settings))
    return model.eval()


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def bits(model):
    """Return the bytes of every parameter and buffer that is not an adapter's."""
    return {
        name.replace("base_layer.", "").removeprefix("base_model.model."): tensor.detach()
        .contiguous()
        .view(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
        for name, tensor in model.state_dict().items()
        if "s2ft" not in name
    }


def dense_mask(model, units):
    """Return for each weight that `units` reach the bool mask of what is trained, in the parameter's orientation."""
    layout = find_layout(model)
    masks = {}
    for kind, blocks in units.items():
        for number, own in blocks.items():
            place = layout.blocks[number].places[kind]
            module = model.get_submodule(place.module)
            mask = masks.setdefault(place.module, torch.zeros_like(module.weight, dtype=torch.bool))
            place.lines(oriented(module, mask))[[unit * place.size + i for unit in own for i in range(place.size)]] = (
                True
            )
    return masks


# --- the maths ---


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("tokens", [2, 40])  # below and above the size from which the weight is copied
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_dense_formula(columns, tokens, bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    offset = torch.randn(4, dtype=torch.float64, generator=generator) if bias else None
    index = torch.tensor([0, 3])
    part = torch.randn(2, 4 if columns else 5, dtype=torch.float64, generator=generator, requires_grad=True)
    upstream = torch.randn(tokens, 3, 4, dtype=torch.float64, generator=generator)

    full = torch.zeros_like(weight)
    full = full.index_add(1, index, part.T) if columns else full.index_add(0, index, part)
    expected = nn.functional.linear(x, weight + full, offset)
    output = Sliced.apply(x, weight, offset, part, index, columns)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(output, [x, part], upstream)
    theirs = torch.autograd.grad(expected, [x, part], upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda x, part: Sliced.apply(x, weight, offset, part, index, columns), (x[:2], part)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{"o": 1, "down": 0.1}, COUPLED], ids=["columns", "coupled"])
def test_training_is_dense_training_of_the_selected_entries_alone(family, settings):
    dense = copy.deepcopy(prepared(family)).double().eval()
    model = get_peft_model(copy.deepcopy(dense), S2ftConfig(**settings)).eval()
    start = bits(dense)
    masks = dense_mask(dense, model.peft_config["default"].units)
    for parameter in dense.parameters():
        parameter.requires_grad_(False)
    for name, mask in masks.items():
        weight = dense.get_submodule(name).weight.requires_grad_(True)
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)

    def train(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        for step in range(3):
            ids = random_ids(2, 12, 60, seed=step)
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    train(dense)
    train(model)
    assert bits(model) == start  # the base does not move
    merged = model.merge_and_unload()
    for name, mask in masks.items():
        ours, theirs = merged.get_submodule(name).weight, dense.get_submodule(name).weight
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        assert not torch.equal(
            ours[mask],
            torch.frombuffer(bytearray(start[f"{name}.weight"]), dtype=torch.float64).reshape(ours.shape)[mask],
        )
        ours.detach()[mask] = theirs.detach()[mask]
    dense_bits = bits(dense)
    assert {name: dense_bits[name] for name in start} == bits(merged)  # everything else bit for bit


def test_only_k_columns_are_saved_and_no_view_of_the_input():
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    linear = nn.Linear(64, 32).requires_grad_(False)
    x = torch.randn(50, 64, requires_grad=True)
    part, index = nn.Parameter(torch.zeros(3, 32)), torch.tensor([1, 20, 63])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        Sliced.apply(x, linear.weight, linear.bias, part, index, True)
    assert sum(kept.values()) == 50 * 3 * 4 + 3 * 8  # k columns of the activations, and the index


def kept_for_backward(model, ids=IDS):
    """Return the bytes that one forward keeps for backward, without those of parameters and buffers."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(input_ids=ids, labels=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_a_step_keeps_less_than_three_quarters_of_what_lora_keeps():
    from peft import LoraConfig

    ids = random_ids(4, 64, 60)
    base = random_llama(layers=3, hidden=64)
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    ours = get_peft_model(copy.deepcopy(base), S2ftConfig(o=0, down=7))
    budgets = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (lora, ours)]
    assert 0.9 < budgets[1] / budgets[0] < 1.1
    assert kept_for_backward(ours, ids) < 0.75 * kept_for_backward(lora, ids)


def test_activations_of_gated_mlps_are_not_kept_and_unload_takes_that_back():
    ids, base = random_ids(2, 16, 60), random_llama(layers=2)
    channels = base.model.layers[0].mlp.up_proj.out_features
    model = get_peft_model(copy.deepcopy(base), S2ftConfig(o=1, down=2))
    plain = copy.deepcopy(model)
    keep_activations_(plain)
    assert kept_for_backward(plain, ids) - kept_for_backward(model, ids) == 2 * ids.numel() * channels * 4
    for one in (plain, model):
        one(input_ids=ids, labels=ids).loss.backward()
    gradients = [[p.grad for p in one.parameters() if p.requires_grad] for one in (plain, model)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))
    assert not any(module._forward_hooks for module in model.unload().modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_as_if_activations_were_kept(family):
    model = tuned(copy.deepcopy(prepared(family)), o=1, down=0.1).train()
    plain = copy.deepcopy(model)
    keep_activations_(plain)
    for one in (plain, model):
        torch.manual_seed(0)
        one(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [[p.grad for p in one.parameters() if p.requires_grad] for one in (plain, model)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


def test_no_masked_copy_of_a_slice_is_kept_for_backward():
    base = random_llama()
    dense = kept_for_backward(get_peft_model(copy.deepcopy(base), S2ftConfig(o=1, down=4)))
    with torch.no_grad():
        for block in base.model.layers:
            block.mlp.down_proj.weight.view(-1, 2)[:, 0] = 0.0
    sparse = get_peft_model(base, S2ftConfig(o=1, down=4, init_weights=False))
    assert any(len(layer.secateur_s2ft_zeros) for layer in s2ft_linears(sparse))
    assert kept_for_backward(sparse) == dense
    sparse(input_ids=IDS, labels=IDS).loss.backward()
    for layer in s2ft_linears(sparse):
        if "default" in layer.secateur_s2ft_zeros:
            gradient, zeros = layer.secateur_s2ft_slice["default"].grad, layer.secateur_s2ft_zeros["default"]
            assert (gradient[zeros] == 0).all()
            assert (gradient[~zeros] != 0).any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    def gradients(checkpoint):
        model = tuned(**COUPLED).train()
        if checkpoint:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(checkpointed) > 0
    torch.testing.assert_close(checkpointed, plain)


def test_two_micro_batches_are_one_batch():
    model = tuned(**COUPLED)
    whole = model(input_ids=IDS[:2], labels=IDS[:2]).loss
    expected = torch.autograd.grad(whole, [p for p in model.parameters() if p.requires_grad])
    for row in IDS[:2]:
        (model(input_ids=row[None], labels=row[None]).loss / 2).backward()
    torch.testing.assert_close([p.grad for p in model.parameters() if p.requires_grad], list(expected))


def test_autocast_trains_in_bfloat16_and_keeps_float32_slices():
    model = tuned(**COUPLED)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert parameter.grad.abs().sum() > 0


def test_a_bfloat16_base_sees_steps_too_small_for_its_weights():
    linear = nn.Linear(8, 8, bias=False).to(torch.bfloat16).requires_grad_(False)
    with torch.no_grad():
        linear.weight.fill_(1.0)
    part, x = torch.full((8, 8), 1e-3), torch.zeros(64, 8, dtype=torch.bfloat16)
    part[1:], x[:, 0] = 0.0, 1.0
    x[:, 1] = -1.0  # cancels the weight, so that the slice is all there is
    output = Sliced.apply(x, linear.weight, None, part, torch.arange(8), True)
    torch.testing.assert_close(output.float(), torch.full((64, 8), 1e-3), rtol=1e-2, atol=0)


def test_a_base_that_is_listened_to_is_called():
    model, seen = tuned(o=1, down=3), []
    expected = logits(model)
    for layer in s2ft_linears(model):
        layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(logits(model), expected)
    assert len(seen) == 4


# --- merging, switching, several adapters ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{"o": 1, "down": 0.1}, COUPLED], ids=["columns", "coupled"])
def test_merged_logits_are_unmerged_logits(family, settings):
    model = tuned(copy.deepcopy(prepared(family)), **settings)
    base, adapted = bits(model), logits(model)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), adapted)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert bits(model) == base
    torch.testing.assert_close(logits(model.merge_and_unload()), adapted, rtol=1e-5, atol=1e-5)


def test_an_empty_adapter_is_the_base_model():
    plain = random_llama()
    assert torch.equal(logits(get_peft_model(copy.deepcopy(plain), S2ftConfig()).eval()), logits(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_switching_is_bitwise_reversible(dtype):
    model = tuned(random_llama().to(dtype), ("one", "two", "six"), o=2, down=0.3)
    base, seen = bits(model), {}
    for name in ("one", "two", "one", "six", "__base__", "two", "six", "one", "__base__"):
        switch_(model, name)
        assert seen.setdefault(name, bits(model)) == bits(model)
        assert s2ft_linears(model)[0].active_adapters == ([] if name == "__base__" else [name])
        logits(model)  # whichever name PEFT takes for the active one
    assert seen["__base__"] == base
    assert len(set(map(str, seen.values()))) == 4


@pytest.mark.parametrize("settings", [{"o": 2, "down": 9}, COUPLED], ids=["columns", "coupled"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prepared_switches_write_the_same_bits(family, settings):
    make = prepared(family)
    plain, ready = (tuned(copy.deepcopy(make), ("one", "two", "same"), **settings) for _ in range(2))
    for model in (plain, ready):
        for layer in s2ft_linears(model):
            if layer.has("one"):
                part = layer.secateur_s2ft_slice["one"]
                part.data.copy_(torch.linspace(-1, 1, part.numel()).reshape(part.shape))
    switch_(plain, "one")
    switch_(ready, "one")
    prepare_switches_(ready, ["one", "two"])
    for name in ("two", "same", "one", "one", "__base__", "two", "same", "__base__", "same", "one"):
        switch_(plain, name)
        switch_(ready, name)
        assert bits(plain) == bits(ready)
        torch.testing.assert_close(logits(plain), logits(ready))
    forget_switches_(ready)
    assert bits(plain) == bits(ready)
    assert all(layer.get_base_layer().weight.is_contiguous() for layer in s2ft_linears(ready))
    switch_(ready, "__base__")
    switch_(plain, "__base__")
    assert bits(plain) == bits(ready)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("hidden", [32, 20], ids=["whole pieces", "odd pieces"])
def test_prepared_switches_are_bitwise_reversible(dtype, hidden):
    base = random_llama(hidden=hidden, head_dim=8 if hidden == 32 else 6).to(dtype)
    with torch.no_grad():
        for block in base.model.layers:
            block.mlp.down_proj.weight[0] = -0.0
            block.mlp.down_proj.weight[1] = torch.finfo(dtype).smallest_normal / 4
    model = tuned(base, ("one", "two", "six"), o=1, down=0.3)
    expected = {}
    for name in ("one", "two", "six", "__base__"):
        switch_(model, name)
        expected[name] = bits(model)
    prepare_switches_(model)
    wide = {layer.merging.element for layer in s2ft_linears(model)}
    assert wide == {torch.complex128 if hidden * dtype.itemsize % 16 == 0 else dtype}
    for name in ("one", "two", "two", "six", "one", "__base__", "six", "__base__", "two", "__base__"):
        switch_(model, name)
        assert bits(model) == expected[name]


@pytest.mark.parametrize("prepare", [True, False])
@pytest.mark.parametrize("settings", [{"o": 2, "down": 9}, COUPLED], ids=["columns", "coupled"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2", "opt"])
def test_a_switch_by_reference_touches_no_weight(family, settings, prepare):
    model = tuned(copy.deepcopy(prepared(family)), ("one", "two"), **settings)
    base = bits(model)
    if prepare:
        prepare_switches_(model)
    storages = [layer.weight_view().data_ptr() for layer in s2ft_linears(model)]
    versions = [layer.weight_view()._version for layer in s2ft_linears(model)]
    for name in ("one", "two", "one", "__base__"):
        switch_(model, name, merge=False)
        assert s2ft_linears(model)[0].active_adapters == ([] if name == "__base__" else [name])
        served = logits(model)
        other = copy.deepcopy(model)
        switch_(other, name)
        torch.testing.assert_close(served, logits(other), rtol=1e-5, atol=1e-5)
    assert storages == [layer.weight_view().data_ptr() for layer in s2ft_linears(model)]
    assert versions == [layer.weight_view()._version for layer in s2ft_linears(model)]
    assert bits(model) == base


def test_merged_switches_and_switches_by_reference_follow_each_other():
    model = tuned(random_llama().bfloat16(), ("one", "two"), o=2, down=9)
    base = bits(model)
    prepare_switches_(model)
    switch_(model, "one")
    merged = bits(model)
    switch_(model, "two", merge=False)  # takes what is merged out
    assert bits(model) == base
    assert not any(layer.merged for layer in s2ft_linears(model))
    switch_(model, "one")
    assert bits(model) == merged
    with pytest.raises(RecipeError, match="no adapter is called `ones`"):
        switch_(model, "ones", merge=False)


def test_adapters_of_the_same_lines_are_switched_without_putting_lines_back():
    model = tuned(random_llama().half(), o=2, down=9)
    base = bits(model)
    for seed, name in ((1, "second"), (2, "third")):
        model.add_adapter(name, S2ftConfig(init_weights=False, seed=seed, units=model.peft_config["default"].units))
    plain = copy.deepcopy(model)
    prepare_switches_(model)
    ready = s2ft_linears(model)[0].merging.ready
    assert ready["second"].index is ready["third"].index
    for name in ("second", "third", "default", "second", "__base__"):
        before = [layer.weight_view()._version for layer in s2ft_linears(model)]
        switch_(model, name)
        switch_(plain, name)
        assert [layer.weight_view()._version - 1 for layer in s2ft_linears(model)] == before  # one write
        assert bits(model) == bits(plain)
    assert bits(model) == base


def test_a_copy_of_a_prepared_model_has_weights_of_its_own(tmp_path):
    model = tuned(adapters=("one", "two"), o=2, down=9)
    prepare_switches_(model)
    switch_(model, "one")
    merged = bits(model)
    torch.save(model, tmp_path / "whole.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert bits(twin) == merged
        assert not any(layer.merging.ready for layer in s2ft_linears(twin))
        switch_(twin, "two")
        assert bits(model) == merged
        prepare_switches_(twin)
        switch_(twin, "__base__")
        assert bits(model) == merged
    switch_(model, "__base__")
    assert bits(model) == bits(twin) == bits(tuned(adapters=("one", "two"), o=2, down=9))


def test_what_is_ready_is_not_used_on_weights_that_moved():
    model = tuned(adapters=("one", "two"), o=2, down=9)
    prepare_switches_(model)
    switch_(model, "one")
    switch_(model, "__base__")
    model.to(torch.float64)
    plain = copy.deepcopy(model)
    for name in ("one", "two", "__base__"):
        switch_(model, name)
        switch_(plain, name)
        assert bits(model) == bits(plain)


def test_what_changed_since_it_was_prepared_is_computed_anew():
    plain, ready = (tuned(adapters=("one", "two"), o=2, down=9) for _ in range(2))
    prepare_switches_(ready)

    def both(change):
        for model in (plain, ready):
            with torch.no_grad():
                for layer in s2ft_linears(model):
                    change(layer)
        for name in ("one", "two", "__base__", "one", "__base__"):
            switch_(plain, name)
            switch_(ready, name)
            assert bits(plain) == bits(ready)

    both(lambda layer: layer.secateur_s2ft_slice["one"].mul_(2.0) if layer.has("one") else None)
    both(lambda layer: layer.get_base_layer().weight.mul_(0.5))
    prepare_switches_(ready)
    for model in (plain, ready):
        model.delete_adapter("two")
        model.add_adapter("two", S2ftConfig(init_weights=False, seed=7, o=1, down=9))
    both(lambda layer: None)


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_merged_model_that_is_converted_is_switched_as_if_it_had_been_so_before(dtype, prepare):
    model = tuned(adapters=("default", "other"), o=1, down=4)
    expected = {}
    for name in ("other", "__base__"):
        before = copy.deepcopy(model).to(dtype)
        switch_(before, name)
        expected[name] = logits(before)
    if prepare:
        prepare_switches_(model)
    switch_(model, "default")
    model.to(dtype)
    switch_(model, "other")
    assert torch.allclose(logits(model), expected["other"], atol=1e-6)
    switch_(model, "__base__")
    assert torch.allclose(logits(model), expected["__base__"], atol=1e-6)


@pytest.mark.parametrize("prepare", [False, True])
def test_a_switch_that_is_interrupted_leaves_everything_as_it_was(prepare, monkeypatch):
    model = tuned(adapters=("default", "other"), o=1, down=4)
    if prepare:
        prepare_switches_(model)
    switch_(model, "default")
    before, answers, stopped = bits(model), logits(model), s2ft_linears(model)[2]
    usual = stopped.remerge_

    def interrupted(adapters):
        if adapters == ["other"]:
            raise KeyboardInterrupt
        usual(adapters)

    monkeypatch.setattr(stopped, "remerge_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        switch_(model, "other")
    assert bits(model) == before
    assert torch.equal(logits(model), answers)
    assert model.active_adapter == "default"


@pytest.mark.parametrize("merge", [False, True])
def test_whole_modules_are_switched_with_their_adapter(merge):
    model = random_llama()
    plain = logits(model)
    model = tuned(model, o=1, down=4, modules_to_save=["lm_head"])
    model.add_adapter("slices", S2ftConfig(o=1, down=4, init_weights=False, seed=1))
    model.add_adapter("other", S2ftConfig(o=1, down=4, init_weights=False, seed=2, modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["other"].weight.mul_(3.0)
    expected = {}
    for name in ("slices", "other", "default"):
        model.set_adapter(name)
        expected[name] = logits(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name in ("slices", "other", "default", "other", "__base__", "default"):
        switch_(model, name, merge=merge)
        assert torch.allclose(logits(model), expected.get(name, plain), atol=1e-5)
    assert trained == [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_a_prepared_model_is_unloaded_with_weights_stored_by_rows():
    model = tuned(o=1, down=4)
    prepare_switches_(model)
    assert not all(parameter.is_contiguous() for parameter in model.parameters())
    assert all(parameter.is_contiguous() for parameter in model.merge_and_unload().parameters())


def test_preparing_what_is_not_finite_or_not_there_is_refused():
    model = tuned(adapters=("one", "two"))
    before = bits(model)
    with pytest.raises(RecipeError, match="no adapter is called `ones`"):
        prepare_switches_(model, ["ones"])
    with torch.no_grad():
        s2ft_linears(model)[-1].secateur_s2ft_slice["two"].fill_(float("inf"))
    with pytest.raises(NumericError, match="NaN or infinite"):
        prepare_switches_(model)
    assert bits(model) == before


def test_a_prepared_model_is_saved_as_any_other(tmp_path):
    model = tuned(adapters=("one", "two"))
    prepare_switches_(model)
    switch_(model, "two")
    merged = {name: tensor.clone() for name, tensor in model.unload().state_dict().items()}
    model.unload().save_pretrained(tmp_path)
    found = type(model.unload()).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in merged.items())


def test_a_switch_serves_the_adapter_and_leaves_what_a_merge_leaves():
    model = tuned(adapters=("one", "two"), o=2, down=0.3)
    for name in ("one", "two"):
        model.set_adapter(name)
        adapted = logits(model)
        switch_(model, name)
        torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-5)
        written = bits(model)
        model.unmerge_adapter()
        model.merge_adapter([name])
        assert bits(model) == written
        model.unmerge_adapter()


def test_a_switch_to_what_is_not_finite_leaves_everything_as_it_was():
    model = tuned(adapters=("one", "two"), o=2, down=0.3)
    switch_(model, "one")
    before = bits(model)
    with torch.no_grad():
        s2ft_linears(model)[-1].secateur_s2ft_slice["two"][0, 0] = float("inf")
    with pytest.raises(NumericError, match="`two`"):
        switch_(model, "two")
    assert bits(model) == before
    with pytest.raises(RecipeError, match=r"no adapter is called `ones`.*did you mean `one`"):
        switch_(model, "ones")
    with pytest.raises(InputError, match="no S2FT adapters"):
        switch_(random_llama(), "one")


def test_merging_what_is_not_finite_changes_nothing():
    model = tuned(o=2, down=0.3)
    before = bits(model)
    with torch.no_grad():
        s2ft_linears(model)[-1].secateur_s2ft_slice["default"][0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"down_proj"):
        model.merge_adapter()
    assert bits(model) == before


def test_several_active_adapters_add_up():
    model = tuned(adapters=("one", "two"), o=2, down=0.3)
    model.base_model.set_adapter(["one", "two"])
    adapted = logits(model)
    base = bits(model)
    model.merge_adapter(["one"])
    with pytest.warns(UserWarning, match="additionally merging two"):
        model.merge_adapter(["one", "two"])
    torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert bits(model) == base
    fuse_(model, {"one": 1.0, "two": 1.0}, "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-5)


def test_fused_slices_are_weighted_sums_and_disjoint_ones_stay_exact():
    model = tuned(adapters=("one",), o=1, down=0.2)
    model.add_adapter(
        "two", S2ftConfig(init_weights=False, o=1, down=0.2, seed=1, exclude_units=model.peft_config["one"].units)
    )
    fuse_(model, {"one": 0.5, "two": 2.0}, "both")
    for layer in s2ft_linears(model):
        index = {name: layer.secateur_s2ft_index[name].tolist() for name in layer.configs}
        if "one" in index and "two" in index:
            assert not set(index["one"]) & set(index["two"])
            assert sorted(index["one"] + index["two"]) == index["both"]
        for name, factor in (("one", 0.5), ("two", 2.0)):
            for row, line in enumerate(index.get(name, [])):
                fused = layer.secateur_s2ft_slice["both"][index["both"].index(line)]
                assert torch.equal(fused, factor * layer.secateur_s2ft_slice[name][row])
    assert model.active_adapter == "one"
    for weights, name, message in (
        ({"one": float("nan")}, "x", "finite"),
        ({"zoo": 1.0}, "x", "no adapter"),
        ({"one": 1.0}, "two", "already"),
        ({}, "x", "no adapter is given"),
    ):
        with pytest.raises(RecipeError, match=message):
            fuse_(model, weights, name)


@pytest.mark.parametrize("settings", [{"o": 1, "down": 0.1}, COUPLED], ids=["columns", "coupled"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("rows", [1, 6])  # one batched product, or one for each adapter
def test_a_mixed_batch_equals_separate_passes(family, settings, rows):
    model = tuned(copy.deepcopy(prepared(family)), ("one", "two", "six"), **settings)
    model.add_adapter("narrow", S2ftConfig(init_weights=False, o=0.0, down=1))
    names = ["two", "__base__", "one", "narrow", "six", "one"] * rows
    ids = random_ids(len(names), 7, 60)
    together = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names[:6]):
        if name == "__base__":
            with model.disable_adapter():
                alone = logits(model, ids[row : row + 1])
        else:
            model.set_adapter(name)
            alone = logits(model, ids[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_a_mixed_batch_needs_a_name_for_each_row():
    model = tuned(adapters=("one", "two"), o=1)
    with pytest.raises(RecipeError, match="3 rows, got 2"):
        logits(model, adapter_names=["one", "two"])
    with pytest.raises(RecipeError, match="no adapter is called `zoo`"):
        logits(model, adapter_names=["one", "two", "zoo"])
    switch_(model, "one")
    with pytest.raises(RecipeError, match="merged"):
        logits(model, adapter_names=["one", "two", "one"])


# --- files ---


def test_a_saved_adapter_comes_back(tmp_path):
    model = tuned(random_llama(), ("one", "two"), **COUPLED)
    expected = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        expected[name] = logits(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["peft_type"] == "secateur_s2ft"
    assert set(config["units"]) == set(KINDS)
    assert "lines" not in config
    again = PeftModel.from_pretrained(random_llama(), tmp_path / "one", adapter_name="one").eval()
    again.load_adapter(tmp_path / "two", "two")
    lean = PeftModel.from_pretrained(random_llama(), tmp_path / "one", low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(lean), expected["one"])
    for name in ("one", "two"):
        again.set_adapter(name)
        assert torch.equal(logits(again), expected[name])
        assert again.peft_config[name].units == model.peft_config[name].units


def test_an_adapter_for_another_model_is_refused(tmp_path):
    tuned(o=2).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="for another model"):
        PeftModel.from_pretrained(random_llama(seed=1), tmp_path)
    with pytest.raises(InputError, match="for another model"):
        PeftModel.from_pretrained(random_llama(hidden=64), tmp_path)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("settings", [{"o": 0.5, "down": 0.1}, COUPLED], ids=["columns", "coupled"])
def test_exported_lora_gives_the_same_logits_in_plain_peft(family, settings, tmp_path):
    base = copy.deepcopy(prepared(family)).eval()
    model = tuned(copy.deepcopy(base), ("mine",), **settings)
    export_lora(model, tmp_path / "lora", "mine")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    trained = sum(p.numel() for name, p in loaded.named_parameters() if "lora_" in name)
    assert trained > 0
    with pytest.raises(RecipeError, match="no adapter is called"):
        export_lora(model, tmp_path / "other", "default")
    assert not (tmp_path / "other").exists()


# --- selection ---


def test_the_random_draw_has_the_size_of_the_budget_and_depends_on_the_seed_alone():
    model = random_llama(layers=4)
    config = {"o": 0.4, "down": 0.13}
    units = get_peft_model(copy.deepcopy(model), S2ftConfig(**config)).peft_config["default"].units
    assert sum(map(len, units["o"].values())) == int(0.4 * 16)
    assert sum(map(len, units["down"].values())) == int(0.13 * 64 * 4)
    torch.manual_seed(5)
    again = get_peft_model(copy.deepcopy(model), S2ftConfig(**config)).peft_config["default"].units
    other = get_peft_model(copy.deepcopy(model), S2ftConfig(seed=1, **config)).peft_config["default"].units
    assert again == units != other


def test_one_configuration_serves_several_models():
    config = S2ftConfig(down=3)
    get_peft_model(random_llama(), config)
    assert config.units is None
    assert len(get_peft_model(random_llama(layers=3), config).peft_config["default"].units["down"]) == 3


def test_every_head_is_drawn_alike():
    counts = torch.zeros(8)
    generator = torch.Generator().manual_seed(0)
    pools = [torch.arange(4), torch.arange(4)]
    for _ in range(2000):
        for block, picked in enumerate(drawn(pools, [4, 4], 0.5, generator)):
            assert picked.tolist() == sorted(set(picked.tolist()))
            counts[block * 4 + picked] += 1
    assert (counts / 2000 - 0.5).abs().max() < 0.05


def test_ranking_is_joint_for_fractions_by_block_for_counts_and_ties_keep_the_first():
    scores, pools = [torch.tensor([3.0, 1, 2]), torch.tensor([2.0, 9, 8])], [torch.arange(3), torch.arange(3)]

    def picked(amount, order="largest", pools=pools):
        return [own.tolist() for own in ranked(scores, pools, [3, 3], amount, order)]

    assert picked(0.5) == [[0], [1, 2]]
    assert picked(2) == [[0, 2], [1, 2]]
    assert picked(0.5, "smallest") == [[1, 2], [0]]
    assert picked(2, "largest", [torch.tensor([1, 2]), torch.arange(2)]) == [[1, 2], [0, 1]]
    tied = ranked([torch.ones(3), torch.ones(3)], pools, [3, 3], 0.5)
    assert [own.tolist() for own in tied] == [[0, 1, 2], []]
    with pytest.raises(RecipeError, match="2 units it has left"):
        picked(3, "largest", [torch.arange(3), torch.arange(2)])
    with pytest.raises(NumericError, match="1 scores"):
        ranked([torch.tensor([1.0, float("nan")])], [torch.arange(2)], [2], 1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2"])
def test_scores_are_what_their_formulas_say(family):
    model = copy.deepcopy(prepared(family)).eval()
    layout = find_layout(model)
    kinds = list(layout.kinds())
    keep = torch.ones_like(IDS)
    keep[0, :4] = 0
    inputs = {}
    places = [block.unit_place(kind) for block in layout.blocks for kind in ("o", "down")]
    hooks = [
        model.get_submodule(place.module).register_forward_pre_hook(
            lambda module, args, name=place.module: inputs.__setitem__(name, args[0][keep != 0].detach())
        )
        for place in places
    ]
    labels = IDS.masked_fill(keep == 0, -100)
    model(input_ids=IDS, attention_mask=keep, labels=labels).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    scores = {
        strategy: unit_scores(model, layout, kinds, strategy, [(IDS, keep)])
        for strategy in ("weight", "activation", "product", "gradient")
    }
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    for kind in kinds:
        for number, block in enumerate(layout.blocks):
            place, source = block.places[kind], block.unit_place(kind)
            module = model.get_submodule(place.module)
            lines = place.lines(oriented(module, module.weight.detach()))
            gradient = place.lines(oriented(module, gradients[f"{place.module}.weight"]))
            seen = inputs[source.module].reshape(-1, source.count, source.size)
            for unit in range(place.count):
                part = slice(unit * place.size, (unit + 1) * place.size)
                per = block.queries_per_group if kind in ("k", "v") else 1
                own = seen[:, unit * per : (unit + 1) * per]
                expected = {
                    "weight": lines[part].norm(),
                    "activation": own.norm(dim=2).mean(),
                    "gradient": gradient[part].norm(),
                    "product": (lines[part].norm(dim=1) * own[:, 0].norm(dim=0)).sum()
                    if place.columns
                    else lines[part].norm() * own.square().sum((0, 2)).mean().sqrt(),
                }
                for strategy, value in expected.items():
                    torch.testing.assert_close(scores[strategy][kind][number][unit], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", ["activation", "product", "gradient"])
@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_text_chooses_units_and_the_model_stays_as_it_was(strategy, order):
    model = random_llama().train()
    before = bits(model)
    config = S2ftConfig(o=1, down=0.1, strategy=strategy, order=order)
    with pytest.raises(RecipeError, match=f"`{strategy}` reads text"):
        get_peft_model(copy.deepcopy(model), config)
    with pytest.raises(InputError, match="there is none"):
        chosen(model, config)
    with_units = chosen(model, config, [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, IDS])
    assert config.units is None
    assert bits(model) == before
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    other = chosen(model, S2ftConfig(o=1, down=0.1, strategy=strategy, order="largest"), [IDS])
    assert (other.units["down"] == with_units.units["down"]) == (order == "largest") or len(IDS) > 2
    tuned_model = get_peft_model(model, with_units)
    assert tuned_model.peft_config["default"].units == with_units.units
    assert chosen(tuned_model, config, [IDS]).units is not None  # a second adapter, on the wrapped model


def test_ids_that_the_model_does_not_have_are_refused():
    for ids, message in ((IDS + 60, r"0\.\.63"), (IDS.float(), "integer token ids"), ("text", "integer token ids")):
        with pytest.raises(InputError, match=message):
            chosen(random_llama(), S2ftConfig(strategy="activation"), [{"input_ids": ids}])


def test_coupled_rows_are_those_of_the_columns_and_of_the_groups_they_read():
    units = get_peft_model(random_llama(), S2ftConfig(o=1, down=2, coupled=True)).peft_config["default"].units
    assert units["q"] == units["o"]
    assert units["up"] == units["gate"] == units["down"]
    assert units["k"] == units["v"] == {block: [head // 2 for head in heads] for block, heads in units["o"].items()}


def test_heads_come_by_whole_groups_if_asked():
    units = get_peft_model(random_llama(), S2ftConfig(o=1, q=0.5, down=0.0, by_group=True)).peft_config["default"].units
    for blocks in units.values():
        for heads in blocks.values():
            assert all((head ^ 1) in heads for head in heads)
    assert all(len(heads) == 2 for heads in units["o"].values())


def test_peft_words_restrict_the_selection():
    def modules(**settings):
        model = get_peft_model(random_llama(layers=3), S2ftConfig(o=1, down=1, **settings))
        return {layer.name.removeprefix("model.layers.") for layer in s2ft_linears(model)}

    assert modules(target_modules=["down_proj"]) == {f"{block}.mlp.down_proj" for block in range(3)}
    assert modules(exclude_modules=["o_proj"]) == {f"{block}.mlp.down_proj" for block in range(3)}
    assert modules(layers_to_transform=[1]) == {"1.mlp.down_proj", "1.self_attn.o_proj"}
    assert modules(target_modules=r".*\.2\..*o_proj") == {"2.self_attn.o_proj"}


# --- what is refused ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"o": 1.5}, "`o` must be a fraction"),
        ({"down": -1}, "`down` must be a fraction"),
        ({"down": True}, "`down` must be a fraction"),
        ({"up": float("nan")}, "`up` must be a fraction"),
        ({"v": "10%"}, "`v` must be a fraction"),
        ({"o": 0.0, "down": 0}, "nothing to train"),
        ({"strategy": "wanda"}, "`strategy` is 'wanda'"),
        ({"order": "large"}, "did you mean `largest`"),
        ({"coupled": True, "v": 0.1}, "`v` follows the columns"),
        ({"units": {"out": {0: [1]}}}, "no kind 'out'"),
        ({"units": {"o": [1]}}, "must be"),
        ({"units": {"o": {"first": [1]}}}, "must be"),
        ({"units": {"o": {0: [1, 1]}}}, "twice"),
        ({"units": {"o": {0: [-1]}}}, "whole numbers"),
        ({"units": {"o": {0: [0.5]}}}, "whole numbers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        S2ftConfig(**settings)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"o": {0: [4]}}, r"`o` of block 0 of LlamaForCausalLM.* has heads 0\.\.3, `units` names 4"),
        ({"v": {1: [0, 2]}}, r"`v` of block 1.* has heads 0\.\.1, `units` names 2"),
        ({"down": {0: [64]}}, r"channels 0\.\.63"),
        ({"down": {2: [0]}}, r"blocks 0\.\.1, `units` names 2"),
    ],
)
def test_heads_and_channels_that_do_not_exist_are_refused(units, message):
    with pytest.raises(InputError, match=message):
        get_peft_model(random_llama(), S2ftConfig(units=units))


def test_a_model_without_the_projection_is_refused():
    with pytest.raises(InputError, match="has no `gate`"):
        get_peft_model(copy.deepcopy(prepared("opt")), S2ftConfig(gate=0.1))
    with pytest.raises(InputError, match="MixtralForCausalLM"):
        get_peft_model(copy.deepcopy(prepared("mixtral")), S2ftConfig())
    with pytest.raises(RecipeError, match="selects no unit"):
        get_peft_model(random_llama(), S2ftConfig(o=0.01, down=0.001))
    with pytest.raises(RecipeError, match="more than the 4 units"):
        get_peft_model(random_llama(), S2ftConfig(o=5))


def test_an_exhausted_exclusion_is_refused():
    taken = {"o": {0: [0, 1, 2, 3], 1: [0, 1, 2]}}
    with pytest.raises(RecipeError, match="asks for 4 of 8 units, and 1 are left"):
        get_peft_model(random_llama(), S2ftConfig(o=0.5, exclude_units=taken))


def test_a_linear_with_an_adapter_of_another_method_is_refused():
    from peft import LoraConfig, inject_adapter_in_model

    base = inject_adapter_in_model(LoraConfig(r=2, target_modules=["down_proj"]), random_llama())
    with (
        pytest.warns(UserWarning, match="Already found a `peft_config`"),
        pytest.raises(InputError, match="down_proj` has an adapter of another method"),
    ):
        inject_adapter_in_model(S2ftConfig(down=1), base, adapter_name="other")


# --- sparsity ---


@pytest.mark.parametrize("keep", [True, False])
def test_zeros_stay_zeros_unless_told_otherwise(keep):
    base = random_llama()
    with torch.no_grad():
        for block in base.model.layers:
            for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                linear.weight.view(-1, 4)[:, :2] = 0.0
                linear.weight.view(-1, 8)[:, 0] = -0.0
    zeros = {name: parameter.detach() == 0 for name, parameter in base.named_parameters()}
    before = bits(base)
    model = tuned(copy.deepcopy(base), o=3, down=0.5, keep_sparsity=keep)
    model(input_ids=IDS, labels=IDS).loss.backward()
    adapted = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-5, atol=1e-5)
    same = all(torch.equal(parameter.detach() == 0, zeros[name]) for name, parameter in merged.named_parameters())
    assert same == keep
    if keep:
        signs = {name: torch.signbit(p.detach())[zeros[name]] for name, p in merged.named_parameters()}
        assert all(
            torch.equal(signs[name], torch.signbit(p.detach())[zeros[name]]) for name, p in base.named_parameters()
        )
        assert bits(base) == before


def test_a_weight_that_would_merge_to_zero_stays_in_the_pattern():
    model = tuned(o=2, down=0.0)
    for layer in s2ft_linears(model):
        index = layer.secateur_s2ft_index["default"]
        with torch.no_grad():
            layer.secateur_s2ft_slice["default"].copy_(-layer.lines(layer.weight_view()).index_select(0, index))
    merged = model.merge_and_unload()
    assert all((block.self_attn.o_proj.weight != 0).all() for block in merged.model.layers)


# --- PEFT's daily life ---


def test_adapters_are_added_deleted_and_trained_alone():
    model = tuned(adapters=("one", "two"), o=1, down=2)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("s2ft_slice.one" in name for name in trainable)
    model.set_adapter("two")
    model.delete_adapter("one")
    assert list(model.peft_config) == ["two"]
    assert all(not layer.has("one") for layer in s2ft_linears(model))
    restored = model.unload()
    assert bits(restored) == bits(random_llama())


def test_modules_to_save_are_trained_beside_the_slices_and_cannot_leave_as_lora(tmp_path):
    model = get_peft_model(random_llama(), S2ftConfig(down=2, modules_to_save=["lm_head"]))
    assert any("lm_head" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    with pytest.raises(InputError, match="whole modules"):
        export_lora(model, tmp_path / "lora")
    with pytest.raises(InputError, match="whole modules"):
        fuse_(model, {"default": 1.0}, "x")


def test_copies_are_independent():
    model = tuned(o=1, down=2)
    twin = copy.deepcopy(model)
    expected = logits(model)
    with torch.no_grad():
        s2ft_linears(twin)[0].secateur_s2ft_slice["default"].add_(1.0)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(twin), expected)


def test_a_trainer_runs_saves_and_resumes(trained_folder, tmp_path):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in random_ids(8, 16, 60)]

    def run(folder, steps, resume=None):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(trained_folder), S2ftConfig(o=1, down=0.1))
        arguments = TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            save_steps=2,
            learning_rate=1e-2,
            use_cpu=True,
            disable_tqdm=True,
            save_total_limit=2,
            lr_scheduler_type="constant",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
        return model, losses

    whole, _ = run(tmp_path / "whole", 4)
    resumed, _ = run(tmp_path / "whole", 4, str(tmp_path / "whole" / "checkpoint-2"))
    moved = [layer.secateur_s2ft_slice["default"] for layer in s2ft_linears(whole)]
    assert all(part.abs().sum() > 0 for part in moved)
    torch.testing.assert_close([layer.secateur_s2ft_slice["default"] for layer in s2ft_linears(resumed)], moved)
    plain = AutoModelForCausalLM.from_pretrained(trained_folder)
    assert bits(whole.unload()) == bits(plain)


def test_the_defaults_work_on_every_family():
    for family in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt2"):
        model = get_peft_model(copy.deepcopy(prepared(family)), S2ftConfig())
        assert isinstance(s2ft_linears(model)[0], S2ftLinear)


def test_choosing_is_a_function_of_layout_and_wish_alone():
    model = random_llama()
    layout = find_layout(model)
    units = choose(model, layout, Wish({"o": 1, "down": 0.1}))
    assert units == choose(model, layout, Wish({"o": 1, "down": 0.1}))
    assert s2ft.S2ftConfig(units=units).units == units


def test_zeros_of_weights_that_come_later_are_kept():
    base = sparse_llama()
    weights = base.state_dict()
    wanted = zeros_of(base)
    tuned = adapt(unloaded(sparse_llama()), config_of("s2ft"))
    for name, parameter in list(tuned.named_parameters()):
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        owner, _, own = name.rpartition(".")
        value = nn.Parameter(weights[plain].clone() if plain in weights else torch.zeros(parameter.shape))
        tuned.get_submodule(owner)._parameters[own] = value.requires_grad_(parameter.requires_grad)
    train(tuned)
    found = zeros_of(tuned.merge_and_unload())
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_strategy_that_reads_weights_needs_them_in_memory():
    with torch.device("meta"):
        model = random_llama()
    with pytest.raises(InputError, match="reads weights that are not in memory"):
        adapt(model, config_of("s2ft", strategy="weight"))
