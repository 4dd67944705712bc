"""What every adapter of the shelf promises, shown for each line of the registry."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from peft import PeftConfig, PeftModel
from torch.nn import functional as F

from adapted import (
    adapt,
    config_of,
    each_adapter,
    each_that_is_told,
    finish,
    one_layer,
    prune_,
    shake,
    sparse_llama,
    train,
    zeros_of,
)
from conftest import random_ids, random_llama
from families import prepared
from secateur.core.errors import InputError, NumericError, RecipeError
from secateur.methods.registry import REGISTRY
from secateur.models.blocks import find_blocks
from secateur.models.experts import pack_experts_, unpack_experts_
from secateur.train.adapter_config import AdapterConfig
from secateur.train.adapter_linear import adapted_linears

KEEPS_ZEROS = ("spp", "masked_lora", "masked_lora dora")


def logits(model, **more):
    with torch.no_grad():
        return model(input_ids=random_ids(), **more).logits


@each_adapter
def test_a_new_adapter_changes_nothing(kind):
    model = sparse_llama()
    before = logits(model)
    assert torch.equal(logits(adapt(model, config_of(kind))), before)


@each_adapter
def test_only_the_adapter_is_trained(kind):
    model = sparse_llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapted = adapt(model, config_of(kind))
    losses = train(adapted, steps=4)
    assert losses[-1] < losses[0]
    for name, parameter in adapted.named_parameters():
        if "secateur_" in name:
            assert parameter.requires_grad
        else:
            assert not parameter.requires_grad
            plain = name.replace(".base_layer", "").removeprefix("base_model.model.")
            assert torch.equal(parameter, before[plain])


@each_adapter
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (0, 12)])
def test_the_output_is_that_of_the_merged_weight(kind, shape):
    layer, _ = one_layer(kind)
    finish(layer)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = F.linear(x, layer.merged_weight(["default"]), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@each_adapter
def test_nothing_is_kept_for_backward_but_the_input(kind):
    layer, _ = one_layer(kind, dtype=torch.float32)
    known = {parameter.data_ptr() for parameter in layer.parameters()}
    kept = {}

    def note(tensor):
        if tensor.data_ptr() not in known and tensor.numel():
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    x = torch.randn(4, 7, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = layer(x)
    assert sum(kept.values()) <= x.numel()
    output.sum().backward()
    assert x.grad is not None


@each_adapter
def test_merging_gives_the_same_logits_and_unmerging_the_same_bits(kind):
    model = adapt(sparse_llama(), config_of(kind))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    train(model)
    tuned = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), tuned, rtol=1e-5, atol=1e-5)
    assert not all(torch.equal(weights[name], value) for name, value in model.state_dict().items() if "base" in name)
    model.unmerge_adapter()
    for name, value in model.state_dict().items():
        if "secateur_" not in name:
            assert torch.equal(weights[name], value)
    assert torch.equal(logits(model), tuned)


@pytest.mark.parametrize("kind", KEEPS_ZEROS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_merged_model_has_the_zeros_of_the_base_to_the_last_bit(kind, dtype):
    base = sparse_llama().to(dtype)
    wanted, before = zeros_of(base), {name: value.clone() for name, value in base.state_dict().items()}
    model = adapt(base, config_of(kind))
    assert all(parameter.dtype == torch.float32 for name, parameter in model.named_parameters() if "secateur_" in name)
    shake(model)
    merged = model.merge_and_unload()
    found = zeros_of(merged)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    changed = 0
    for name, value in merged.state_dict().items():
        assert value.dtype == dtype
        assert value.dtype == before[name].dtype
        changed += not torch.equal(value, before[name])
        zero = before[name] == 0
        assert torch.equal(torch.signbit(value[zero]), torch.signbit(before[name][zero]))
    assert changed == 14


@each_adapter
def test_saving_and_loading_give_the_same_model(kind, tmp_path):
    model = adapt(sparse_llama(), config_of(kind))
    train(model)
    tuned = logits(model)
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    stored = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert stored["peft_type"] == str(config_of(kind).peft_type)
    assert stored["target_modules"] == sorted(stored["target_modules"])
    loaded = PeftModel.from_pretrained(sparse_llama(), tmp_path / "one")
    assert torch.equal(logits(loaded), tuned)
    merged = PeftModel.from_pretrained(sparse_llama(), tmp_path / "one", low_cpu_mem_usage=True).merge_and_unload()
    torch.testing.assert_close(logits(merged), tuned, rtol=1e-5, atol=1e-5)
    again = PeftModel.from_pretrained(sparse_llama(), tmp_path / "one", is_trainable=True)
    assert any(parameter.requires_grad for parameter in again.parameters())


@each_adapter
def test_the_adapter_loads_through_transformers_too(kind, tmp_path):
    model = adapt(sparse_llama(), config_of(kind))
    train(model)
    tuned = logits(model)
    model.save_pretrained(tmp_path)
    plain = sparse_llama()
    before = logits(plain)
    plain.load_adapter(str(tmp_path), adapter_name="mine")
    assert torch.equal(logits(plain), tuned)
    plain.disable_adapters()
    assert torch.equal(logits(plain), before)
    plain.enable_adapters()
    plain.delete_adapter("mine")
    assert not any(layer.has("mine") for layer in adapted_linears(plain))


@each_adapter
def test_several_adapters_live_in_one_model(kind):
    base = sparse_llama()
    before = logits(base)
    model = adapt(base, config_of(kind))
    train(model)
    first = logits(model)
    model.add_adapter("second", config_of(kind, seed=1, init_weights=False))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    finish(model)
    second = logits(model)
    assert not torch.equal(first, second)
    mixed = logits(model, adapter_names=["default", "second", "__base__", "second"])
    expected = torch.stack([first[0], second[1], before[2], second[3]])
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RecipeError, match="one name for each of the 4 rows, got 1"):
        logits(model, adapter_names=["second"])
    with pytest.raises(RecipeError, match="no adapter is called `thrid`"):
        logits(model, adapter_names=["thrid"] * 4)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), second)
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(model.unload()), before)


@each_adapter
def test_activation_checkpointing_and_bfloat16_autocast_train_alike(kind):
    plain, checkpointed = (adapt(sparse_llama(), config_of(kind)) for _ in range(2))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed.enable_input_require_grads()
    losses = train(plain)
    assert train(checkpointed) == losses
    with torch.autocast("cpu", torch.bfloat16):
        rounded = train(adapt(sparse_llama(), config_of(kind)))
    assert rounded == pytest.approx(losses, rel=0.02)


@each_that_is_told
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2", "gpt_neox"])
def test_families_are_adapted_and_merged_by_default(kind, family):
    base = prune_(copy.deepcopy(prepared(family))).eval()
    ids = random_ids()
    model = adapt(base, config_of(kind))
    train(model, ids=ids)
    tuned = logits(model)
    finish(model)
    names = {layer.name for layer in adapted_linears(model)}
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), tuned, rtol=1e-5, atol=1e-5)
    assert len(names) % 3 == 0  # the same in every block
    assert not adapted_linears(merged)


@each_that_is_told
def test_packed_experts_are_named_and_unpacked_ones_adapted(kind):
    base = prune_(copy.deepcopy(prepared("mixtral"))).eval()
    with pytest.warns(UserWarning, match="experts of `model.layers.0.mlp.experts` and 2 more modules are packed"):
        model = adapt(base, config_of(kind))
    assert not any("experts" in layer.name for layer in adapted_linears(model))
    base = model.unload()
    unpacked = [(block, unpack_experts_(block)) for block in find_blocks(base).modules]
    before = logits(base)
    model = adapt(base, config_of(kind))
    assert sum("experts" in layer.name for layer in adapted_linears(model)) == 3 * 4 * 3
    torch.testing.assert_close(logits(model), before)
    train(model)
    tuned = logits(model)
    merged = model.merge_and_unload()
    for block, experts in unpacked:
        pack_experts_(block, experts)
    torch.testing.assert_close(logits(merged), tuned, rtol=1e-5, atol=1e-5)


@each_that_is_told
def test_a_tied_head_is_left_alone_and_refused_as_a_target(kind):
    base = sparse_llama(tie_word_embeddings=True)
    embedding = base.get_input_embeddings().weight.detach().clone()
    model = adapt(base, config_of(kind))
    train(model)
    merged = model.merge_and_unload()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    with (
        pytest.warns(UserWarning, match="tie_word_embeddings"),
        pytest.raises(InputError, match=r"`lm_head` shares its weight with `model\.embed_tokens`"),
    ):
        adapt(merged, config_of(kind, target_modules=["lm_head"]))


@each_adapter
def test_an_adapter_is_refused_by_another_model(kind, tmp_path):
    model = adapt(sparse_llama(), config_of(kind))
    train(model, steps=1)
    model.save_pretrained(tmp_path)
    for other, words in (
        (sparse_llama(mask_seed=6), "was trained under another mask of `model.layers.0"),
        (sparse_llama(layers=1), "is for another model: this one has no linear `model.layers.1"),
        (sparse_llama(hidden=64), "is for another model: `model.layers.0.* is 64x128, not 32x64"),
        (sparse_llama(seed=1), "is for another model: the weights of `model.layers.0.* are not the same"),
    ):
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(InputError, match=words):
            PeftModel.from_pretrained(other, tmp_path)
        assert before.keys() == other.state_dict().keys()
    config = PeftConfig.from_pretrained(tmp_path)
    config.check_base = False
    assert PeftModel.from_pretrained(sparse_llama(seed=1), tmp_path, config=config)


@each_adapter
def test_the_same_base_in_bfloat16_takes_the_adapter(kind, tmp_path):
    model = adapt(sparse_llama(), config_of(kind))
    train(model, steps=1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(sparse_llama().bfloat16(), tmp_path)
    torch.testing.assert_close(logits(loaded).float(), logits(model), rtol=0.1, atol=0.02)
    assert PeftModel.from_pretrained(sparse_llama().half(), tmp_path)


@each_adapter
def test_a_configuration_serves_several_models(kind):
    config = config_of(kind)
    before = copy.deepcopy(config)
    adapt(sparse_llama(), config)
    adapt(sparse_llama(seed=1), config)
    assert {**vars(config), "base_model_name_or_path": None} == {**vars(before), "base_model_name_or_path": None}


@each_adapter
def test_a_merge_that_is_not_finite_changes_no_weight(kind):
    model = adapt(sparse_llama(), config_of(kind))
    shake(model)
    finish(model)
    layer = adapted_linears(model)[-1]
    container = getattr(layer, layer.adapter_layer_names[0])
    container["default"].data.fill_(float("inf"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NumericError, match=f"`default` into `{layer.name}` would make"):
            merge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer.merged for layer in adapted_linears(model))


@each_that_is_told
def test_a_merge_that_would_fill_zeros_is_refused(kind, monkeypatch):
    model = adapt(sparse_llama(), config_of(kind))
    finish(model)
    layer = adapted_linears(model)[3]
    monkeypatch.setattr(layer, "combined", lambda weight, parts: weight + 1.0)
    if layer.kept(["default"], layer.original_weight()) is None:
        pytest.skip("this adapter leaves the pattern free")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=rf"`default` into `{layer.name}` would fill \d+ of its \d+ zeros"):
        model.merge_and_unload()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@each_that_is_told
def test_targets_that_cannot_be_adapted_are_refused_by_name(kind):
    with pytest.raises(InputError, match=r"`model.embed_tokens` is a Embedding"):
        adapt(sparse_llama(), config_of(kind, target_modules=["embed_tokens"]))
    packed = copy.deepcopy(prepared("mixtral"))
    with pytest.raises(InputError, match=r"`model.layers.0.mlp.experts` holds packed experts"):
        adapt(packed, config_of(kind, target_modules=["experts"]))
    with pytest.raises(InputError, match="`target_parameters` is not supported"):
        adapt(packed, config_of(kind, target_parameters=["mlp.experts.gate_up_proj"]))
    quantised = sparse_llama()
    linear = quantised.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"`model.layers.0.mlp.up_proj` is stored as torch.int8"):
        adapt(quantised, config_of(kind, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="not found in the base model"):
        adapt(sparse_llama(), config_of(kind, target_modules=["q_prj"]))


@each_that_is_told
def test_an_unknown_architecture_asks_for_targets(kind):
    with pytest.raises(InputError, match="no list of blocks") as caught:
        adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), config_of(kind, task_type=None))
    assert "target_modules" in caught.value.hint


@each_that_is_told
def test_an_adapter_of_another_method_is_not_wrapped_twice(kind):
    from peft import LoraConfig, inject_adapter_in_model

    base = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), random_llama())
    with (
        pytest.warns(UserWarning, match="Already found a `peft_config`"),
        pytest.raises(InputError, match="has an adapter of another method"),
    ):
        inject_adapter_in_model(config_of(kind, target_modules=["q_proj"]), base, adapter_name="other")


@each_adapter
def test_a_configuration_survives_every_copy(kind):
    config = config_of(kind)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), type(config)(**config.to_dict())):
        assert other == config
        assert other.peft_type == config.peft_type
        assert other.peft_type.value.islower()
    json.dumps(config.to_dict())
    model = copy.deepcopy(adapt(sparse_llama(), config))
    assert torch.isfinite(logits(model)).all()


@each_adapter
def test_settings_out_of_range_are_refused(kind):
    with pytest.raises(InputError, match="format version 99"):
        config_of(kind, format_version=99)
    if hasattr(config_of(kind), "r"):
        for wrong in (0, -1, 1.5, True, None):
            with pytest.raises(RecipeError, match="`r` must be a whole number from 1"):
                config_of(kind, r=wrong)


@pytest.mark.parametrize("entry", [entry for entry in REGISTRY if entry.kind == "adapter"], ids=lambda e: e.name)
def test_the_registry_line_leads_to_a_configuration(entry):
    cls = entry.load()
    if entry.name == "lora":  # PEFT's own
        assert cls().peft_type == "LORA"
        return
    assert issubclass(cls, AdapterConfig)
    assert cls().peft_type == f"secateur_{cls.method}"


@pytest.mark.parametrize("entry", [entry for entry in REGISTRY if entry.kind == "adapter"], ids=lambda e: e.name)
def test_its_settings_are_listed_with_the_methods_own_first(entry, capsys):
    from secateur.cli import main
    from secateur.recipe.build import fields_of

    fields = fields_of(entry)
    own = list(vars(entry.load())["__annotations__"])
    assert next(iter(fields)) == own[0]
    assert "target_modules" in fields
    assert "base_weights" not in fields
    assert entry.load()(**fields) == entry.load()()
    assert main(["methods", entry.name]) == 0
    shown = capsys.readouterr().out
    assert "required" not in shown
    assert all(name in shown for name in fields)
