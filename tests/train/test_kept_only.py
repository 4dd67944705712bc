"""Full fine-tuning of a sparse model: zeros stay, and the optimizer's memory is that of the kept weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from adapted import prune_, sparse_llama, zeros_of
from conftest import random_ids, random_llama
from families import prepared
from secateur.core.errors import InputError
from secateur.models.linears import sparsity
from secateur.train.masking import FixedMasks, KeptOnly
from secateur.train.trainer import KeepZeros

BUILDS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01),
}


def bytes_of(state: dict) -> int:
    return sum(
        value.numel() * value.element_size()
        for one in state["state"].values()
        for value in one.values()
        if isinstance(value, torch.Tensor) and value.dim()
    )


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 4, masks: FixedMasks | None = None) -> None:
    ids = random_ids()
    for _ in range(count):
        model(input_ids=ids, labels=ids).loss.backward()
        if masks is not None:
            masks.mask_gradients_()
        optimizer.step()
        model.zero_grad()


@pytest.mark.parametrize("build", BUILDS.values(), ids=list(BUILDS))
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_it_is_the_optimizer_on_masked_gradients_with_less_memory(build, family):
    kept, plain = (prune_(copy.deepcopy(prepared(family)), 0.7).train(False) for _ in range(2))
    wanted = zeros_of(kept)
    masks = FixedMasks.from_zeros(kept)
    optimizer = KeptOnly(build, kept.parameters(), masks)
    dense = build(plain.parameters())
    steps(kept, optimizer)
    steps(plain, dense, masks=FixedMasks.from_zeros(plain))
    for one, other in zip(kept.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    found = zeros_of(kept)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    masked = sum(parameter.numel() for parameter, _ in masks.pairs())
    pruned = sum(int((~mask).sum()) for _, mask in masks.pairs())
    assert pruned > 0.6 * masked
    per_weight = bytes_of(dense.state_dict()) / sum(parameter.numel() for parameter in plain.parameters())
    assert bytes_of(optimizer.state_dict()) == pytest.approx(bytes_of(dense.state_dict()) - per_weight * pruned)


def test_nothing_of_the_weights_is_held_between_steps():
    model = sparse_llama()
    optimizer = KeptOnly(BUILDS["adamw"], model.parameters(), FixedMasks.from_zeros(model))
    steps(model, optimizer, 1)
    sizes = [p.numel() for group in optimizer.inner.param_groups for p in group["params"]]
    assert sizes.count(0) == 14


def test_it_resumes_and_follows_a_schedule():
    def fresh():
        model = sparse_llama()
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = KeptOnly(lambda g: torch.optim.AdamW(g, lr=0.01), groups, FixedMasks.from_zeros(model))
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    model, optimizer, schedule = fresh()
    steps(model, optimizer, 2)
    schedule.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    steps(model, optimizer, 2)
    assert [group["lr"] for group in optimizer.inner.param_groups] == [0.005, 0.005]
    assert [group["weight_decay"] for group in optimizer.inner.param_groups] == [0.1, 0.0]
    again, resumed, other = fresh()
    for target, state in zip((again, resumed, other), saved, strict=True):
        target.load_state_dict(state)
    steps(again, resumed, 2)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_closure_is_run_with_gradients():
    model = sparse_llama()
    optimizer = KeptOnly(BUILDS["sgd"], model.parameters(), FixedMasks.from_zeros(model))
    ids = random_ids()

    def closure():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > 0


def test_a_dense_model_has_no_masks_to_read():
    with pytest.raises(InputError, match="the model is not sparse"):
        FixedMasks.from_zeros(random_llama())


def arguments(folder, **more) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        seed=0,
        **more,
    )


@pytest.mark.parametrize("compact", [False, True])
def test_the_trainer_keeps_zeros_and_clips_by_the_kept_weights(compact, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in random_ids(samples=8)]
    model = sparse_llama()
    wanted, before = zeros_of(model), sparsity(model)
    seen = []
    hook = model.model.layers[0].mlp.up_proj.weight
    optimizers = (None, None)
    if compact:
        optimizers = (KeptOnly(BUILDS["adamw"], model.parameters(), FixedMasks.from_zeros(model)), None)
    callback = KeepZeros()
    trainer = Trainer(
        model,
        arguments(tmp_path, weight_decay=0.1, max_grad_norm=0.1),
        train_dataset=rows,
        callbacks=[callback],
        optimizers=optimizers,
    )
    clip = trainer._clip_grad_norm

    def note(model):
        seen.append(bool((hook.grad[hook == 0] == 0).all()))
        return clip(model)

    trainer._clip_grad_norm = note
    trainer.train()
    found = zeros_of(model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert sparsity(model) == before
    assert seen == [True] * 4
    hook.grad = None
    hook.sum().backward()
    assert hook.grad.all()  # the guard is lifted
