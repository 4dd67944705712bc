"""What is asked of shards in one process: settings, refusals, and a model that is emptied and filled again."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from adapted import adapt, config_of, each_adapter, shake, sparse_llama
from conftest import random_ids, random_llama
from secateur.core.errors import RecipeError
from secateur.train.masking import FixedMasks
from secateur.train.sharding import (
    SETTINGS,
    accelerate_settings,
    check_sharded,
    check_sharding,
    emptied,
    in_any_process,
    is_asked_for,
    whole_again,
    whole_masks,
)
from secateur.train.trainer import KeepZeros


def same(one, other):
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


@each_adapter
def test_an_emptied_model_that_is_filled_is_the_model(kind):
    model = adapt(sparse_llama(), config_of(kind)).eval()
    shake(model)
    empty = emptied(model)
    assert all(parameter.is_meta for parameter in empty.parameters())
    found = whole_again(empty, model)
    assert same(found, model)
    wanted = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    assert [(name, parameter.requires_grad) for name, parameter in found.named_parameters()] == wanted
    with torch.no_grad():
        assert torch.equal(found(random_ids()).logits, model(random_ids()).logits)
        for parameter in found.parameters():
            parameter.zero_()
        assert any(bool(parameter.any()) for parameter in model.parameters())  # nothing is shared


def test_ties_dtypes_and_names_survive_what_accelerate_does_to_a_model():
    model = random_llama(tie_word_embeddings=True).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    empty = emptied(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()  # master weights of mixed precision
    layers = model.model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    found = whole_again(empty, model)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert all(torch.equal(before[name], tensor) for name, tensor in found.state_dict().items())
    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.bfloat16}


def test_masks_by_name_keep_the_zeros_that_masks_of_parameters_keep():
    model = sparse_llama()
    masks = FixedMasks.from_zeros(model)
    callback = KeepZeros(whole_masks(model, masks.pairs()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    model(input_ids=random_ids(), labels=random_ids()).loss.backward()
    optimizer.step()
    callback.on_train_end(None, None, None)
    assert all(not parameter[~mask].any() for parameter, mask in masks.pairs())
    with pytest.raises(RecipeError, match="a mask is given for `nothing`"):
        KeepZeros({"nothing": torch.ones(1)}).on_train_begin(None, None, None, model=model, optimizer=optimizer)


def test_settings_are_those_of_the_launcher_again_afterwards(monkeypatch):
    first, second = SETTINGS
    monkeypatch.setenv(first, "true")
    monkeypatch.delenv(second, raising=False)
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    with accelerate_settings():
        assert not is_asked_for()
        assert os.environ[first] == "true"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "True")
    with accelerate_settings():
        assert is_asked_for()
        assert {name: os.environ[name] for name in SETTINGS} == SETTINGS
    assert os.environ[first] == "true"
    assert second not in os.environ


def test_a_launcher_that_says_no_version_asks_for_the_first(monkeypatch):
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    with pytest.raises(RecipeError, match="FSDP version 1") as caught:
        check_sharding()
    assert "--fsdp_version 2" in caught.value.hint
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_sharding()


def test_accelerate_that_leaves_the_model_whole_is_found_out():
    def trainer(processes, enabled):
        accelerator = SimpleNamespace(num_processes=processes, is_fsdp2=enabled, device=torch.device("cpu"))
        return SimpleNamespace(is_fsdp_enabled=enabled, accelerator=accelerator)

    check_sharded(trainer(2, True))
    check_sharded(trainer(1, False))
    with pytest.raises(RecipeError, match="makes none on `cpu`"):
        check_sharded(trainer(2, False))


@pytest.mark.parametrize("flag", [True, False])
def test_one_process_asks_nobody(flag):
    assert in_any_process(flag, torch.device("cpu")) is flag
