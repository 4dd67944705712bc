"""Adapters on whole models: what is targeted, and any training loop."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments

from adapted import adapt, config_of, each_adapter, finish, one_layer, sparse_llama, train, zeros_of
from conftest import TINY_TRAINED, random_ids
from secateur.core.errors import InputError, RecipeError
from secateur.methods.adapters.pst import PstSchedule
from secateur.train.adapter_config import rank_of
from secateur.train.adapter_linear import adapted_linears
from secateur.train.adapter_model import default_targets, without_adapters


def test_default_targets_are_the_same_with_adapters_and_without():
    model = sparse_llama()
    names = default_targets(model)
    assert len(names) == 14
    adapted = adapt(model, config_of("spp"))
    assert default_targets(adapted.base_model.model) == names
    with without_adapters(adapted):
        assert not adapted_linears(adapted)
    assert len(adapted_linears(adapted)) == 14


def test_targets_may_be_chosen_as_in_peft():
    def names(**settings):
        return sorted(layer.name for layer in adapted_linears(adapt(sparse_llama(), config_of("spp", **settings))))

    assert len(names(target_modules="all-linear")) == 14
    assert names(target_modules=["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert names(target_modules=["q_proj"], layers_to_transform=[1]) == ["model.layers.1.self_attn.q_proj"]
    assert names(target_modules=r".*\.1\..*_proj") == sorted(n for n in default_targets(sparse_llama()) if ".1." in n)
    assert len(names(exclude_modules=["down_proj"])) == 12
    with pytest.raises(RecipeError, match="`layers_to_transform` needs `target_modules` as a list"):
        config_of("spp", target_modules=".*q_proj", layers_to_transform=[0])


@each_adapter
def test_blocks_may_be_chosen_without_naming_linears(kind, tmp_path):
    def blocks(model):
        return {int(layer.name.split(".")[2]) for layer in adapted_linears(model)}

    for targets, layers in ((None, 1), (None, [1]), ("all-linear", [1])):
        assert blocks(adapt(sparse_llama(), config_of(kind, target_modules=targets, layers_to_transform=layers))) == {1}
    adapted = adapt(sparse_llama(layers=4), config_of(kind, layers_to_transform=[1, 2]))
    assert blocks(adapted) == {1, 2}
    adapted.save_pretrained(tmp_path)
    assert blocks(PeftModel.from_pretrained(sparse_llama(layers=4), tmp_path)) == {1, 2}
    with pytest.raises(RecipeError, match=r"names block 7, .* blocks 0 to 1|selects no unit"):
        adapt(sparse_llama(), config_of(kind, layers_to_transform=[1, 7] if kind != "s2ft" else [7]))


def test_a_frozen_weight_that_is_trained_after_all_gets_its_gradient():
    for kind in ("spp", "masked_lora"):
        layer, _ = one_layer(kind)
        layer.base_layer.weight.requires_grad_()
        layer.base_layer.bias.requires_grad_()
        x = torch.randn(4, 12, dtype=torch.float64)
        upstream = torch.randn(4, 8, dtype=torch.float64)
        weight, bias = layer.base_layer.weight, layer.base_layer.bias
        dense = nn.functional.linear(x, layer.combined(weight, [("default", layer.tensors("default"))]), bias)
        expected = torch.autograd.grad((dense * upstream).sum(), [weight, bias])
        found = torch.autograd.grad((layer(x) * upstream).sum(), [weight, bias])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_a_module_to_save_is_trained_beside_the_adapter():
    model = adapt(sparse_llama(), config_of("spp", modules_to_save=["lm_head"]))
    assert any("lm_head.modules_to_save" in name and p.requires_grad for name, p in model.named_parameters())
    before = model.lm_head.modules_to_save["default"].weight.clone()
    train(model)
    assert not torch.equal(model.lm_head.modules_to_save["default"].weight, before)


def arguments(folder, **more) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "seed": 0,
    }
    return TrainingArguments(**{**settings, **more})


@each_adapter
def test_the_trainer_trains_saves_and_resumes_to_the_same_bits(kind, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in random_ids(samples=8)]

    def trained(folder, resume=None, **more):
        model = adapt(sparse_llama(), config_of(kind))
        callbacks = [PstSchedule()] if kind == "pst" else []
        trainer = Trainer(model, arguments(folder, **more), train_dataset=rows, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = trained(tmp_path, save_strategy="steps", save_steps=2)
    resumed = trained(tmp_path / "again", resume=str(tmp_path / "checkpoint-2"))
    for (name, one), (_, other) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    loaded = PeftModel.from_pretrained(sparse_llama(), tmp_path / "checkpoint-4")
    ids = random_ids()
    torch.testing.assert_close(loaded.eval()(ids).logits, whole.eval()(ids).logits)


@each_adapter
def test_trl_trains_it_with_activation_checkpointing(kind, tmp_path):
    trl = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from adapted import prune_

    model = prune_(AutoModelForCausalLM.from_pretrained(TINY_TRAINED))
    wanted = zeros_of(model)
    settings = arguments(tmp_path).to_dict()
    names = ("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "use_cpu", "disable_tqdm")
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(
            **{name: settings[name] for name in names},
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            max_length=32,
            bf16=False,
            gradient_checkpointing=True,
        ),
        train_dataset=Dataset.from_list([{"text": "the gardener prunes the old tree"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(TINY_TRAINED),
        peft_config=config_of(kind),
        callbacks=[PstSchedule()] if kind == "pst" else [],
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in after if "secateur_" in name)
    assert all(torch.equal(after[name], before[name]) for name in after if "secateur_" not in name)
    if kind != "pst":
        found = zeros_of(trainer.model.merge_and_unload())
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", ["spp", "masked_lora", "pst"])
def test_a_key_that_fits_no_adapted_linear_is_refused_and_every_way_to_name_one_is_not(kind):
    plain = sparse_llama()
    for key, words in (("q_prj", "did you mean `q_proj`"), (r"layers\.7\.mlp\.up_proj", "fits no linear")):
        with pytest.raises(RecipeError, match=f"`rank_pattern` has the key .*{words}"):
            adapt(plain, config_of(kind, r=4, rank_pattern={"q_proj": 2, key: 2}))
        assert not adapted_linears(plain)
    with pytest.raises(RecipeError, match=r"`rank_pattern` has the key '\(', which is not a regular expression"):
        config_of(kind, rank_pattern={"(": 2})
    keys = [
        "q_proj",
        "mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        r"^model\.layers\.1\..*k_proj",
        "self_attn.[vo]_proj",
    ]
    model = adapt(plain, config_of(kind, r=4, rank_pattern=dict.fromkeys(keys, 2)))
    assert sum(rank_of(layer.configs["default"], layer.name) == 2 for layer in adapted_linears(model)) == 10


def test_an_adapter_on_disk_whose_ranks_have_an_idle_key_opens_as_before(tmp_path):
    model = adapt(sparse_llama(), config_of("spp", r=4))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": {"of_another_model": 2}}))
    with pytest.warns(RuntimeWarning, match="did not match any"):
        again = PeftModel.from_pretrained(sparse_llama(), tmp_path)
    assert len(adapted_linears(again)) == len(adapted_linears(model))


def test_the_model_stays_plain_if_an_adapter_does_not_fit():
    model = adapt(sparse_llama(), config_of("spp"))
    ids = random_ids()
    finish(model)
    before = model(ids).logits
    with pytest.raises(RecipeError):
        model.add_adapter("second", config_of("spp", r=7))
    assert torch.equal(model(ids).logits, before)
    assert not any(layer.has("second") for layer in adapted_linears(model))
    plain = sparse_llama()
    with pytest.raises(RecipeError):
        adapt(plain, config_of("spp", r=16, rank_pattern={"down_proj": 7}))
    assert not adapted_linears(plain)
    with pytest.raises(InputError):
        adapt(plain, config_of("spp", target_modules=["q_proj", "embed_tokens"]))
    assert not adapted_linears(plain)
