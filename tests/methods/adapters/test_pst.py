"""PST: its score, its ramp, its gradients through the mask, its fixed end."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from adapted import adapt, config_of, one_layer, shake, sparse_llama
from conftest import random_ids, random_llama
from secateur.core.errors import PatternError, RecipeError, StateError
from secateur.core.mask import pack_bits
from secateur.core.pattern import NM, Unstructured, pruned_count
from secateur.methods.adapters.pst import PstConfig, PstSchedule, advance_pst_, ramped_sparsity, unpacked
from secateur.train.adapter_linear import adapted_linears
from strategies import seeds


@given(rows=st.integers(1, 5), columns=st.integers(1, 19), seed=seeds)
def test_masks_are_unpacked_where_they_are(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(unpacked(pack_bits(mask), columns), mask)


@given(
    total=st.integers(1, 500),
    initial=st.floats(0, 0.5),
    final=st.floats(0.5, 0.99),
    warmup=st.floats(0, 0.4),
    cooldown=st.floats(0, 0.5),
)
def test_the_ramp_is_flat_then_rises_then_is_flat(total, initial, final, warmup, cooldown):
    ramp = [ramped_sparsity(step, total, initial, final, warmup, cooldown) for step in range(total + 1)]
    assert ramp[0] in (initial, final)
    assert ramp[-1] == final
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(ramp))
    for step, sparsity in enumerate(ramp):
        if step <= warmup * total and step < (1 - cooldown) * total:
            assert sparsity == initial
        if step >= (1 - cooldown) * total:
            assert sparsity == final


def naive(layer, x, up, down, score_up, score_down, rows, columns, *, moving: bool):
    """The straight-through graph, every matrix in full."""
    config = layer.configs["default"]
    weight = layer.base_layer.weight + config.scaling * up @ down
    mask = layer.mask("default").double()
    if moving:
        score = weight.abs() + config.importance_scaling * score_up @ score_down
        score = score + config.structure_scaling * (rows + columns)
        mask = mask + score - score.detach()
    return F.linear(x, mask * weight, layer.base_layer.bias)


@pytest.mark.parametrize("moving", [True, False])
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.97])
def test_gradients_are_those_of_the_straight_through_graph(moving, sparsity):
    layer, _ = one_layer("pst", scaling=0.5, importance_scaling=2.0, structure_scaling=-1.5)
    layer.choose_mask_("default", Unstructured(sparsity), fix=not moving)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 8, dtype=torch.float64)
    leaves = [x, *layer.tensors("default")]
    dense, output = naive(layer, *leaves, moving=moving), layer(x)
    torch.testing.assert_close(output, dense, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad((dense * upstream).sum(), leaves, allow_unused=True)
    found = torch.autograd.grad((output * upstream).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        other = torch.zeros_like(one) if other is None else other
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_at_the_start_the_mask_is_the_one_of_magnitudes():
    layer, config = one_layer("pst", sparse=False)
    layer.add_adapter("default", config)  # anew, with nothing learned
    layer.choose_mask_("default", Unstructured(0.6), fix=False)
    expected = Unstructured(0.6).mask(layer.base_layer.weight.abs(), "layer")
    assert torch.equal(layer.mask("default"), expected)


def test_learned_scores_overrule_magnitudes():
    layer, config = one_layer("pst", sparse=False)
    layer.add_adapter("default", config)
    with torch.no_grad():
        layer.secateur_pst_score_rows["default"][3] = 100.0
        layer.secateur_pst_score_columns["default"][0, 5] = 100.0
    layer.choose_mask_("default", Unstructured(0.7), fix=False)
    assert layer.mask("default")[3].all()
    assert layer.mask("default")[:, 5].all()


@pytest.mark.parametrize("pattern", ["60%", "50% row", "2:4", "1:4"])
def test_masks_meet_the_pattern_exactly_and_stay(pattern):
    model = adapt(random_llama(), config_of("pst", pattern=pattern, warmup=0.0, cooldown=0.4))
    sparsities = []
    for step in range(11):
        shake(model, seed=step)
        advance_pst_(model, step, 10)
        layer = adapted_linears(model)[0]
        sparsities.append(1 - float(layer.mask("default").float().mean()))
        assert layer.is_fixed("default") == (step >= 6)
        if step == 6:
            fixed = layer.mask("default")
    assert sparsities[0] == 0
    assert sorted(sparsities) == sparsities
    assert torch.equal(layer.mask("default"), fixed)
    merged = model.merge_and_unload()
    wanted = layer.configs["default"].pattern_at(10, 10)
    for block in merged.model.layers:
        for linear in block.modules():
            if isinstance(linear, nn.Linear):
                wanted.check(linear.weight != 0)
                if isinstance(wanted, Unstructured) and wanted.scope is None:
                    zeros = int((linear.weight == 0).sum())
                    assert zeros == pruned_count(wanted.sparsity, linear.weight.numel())


def test_masks_are_chosen_every_interval_and_when_the_ramp_ends():
    model = adapt(random_llama(), config_of("pst", interval=3, warmup=0.0, cooldown=0.5))
    layer, seen = adapted_linears(model)[0], []
    for step in range(12):
        before = layer.mask("default")
        advance_pst_(model, step, 11)
        if not torch.equal(layer.mask("default"), before):
            seen.append(step)
    assert seen == [3, 6]


def test_a_moving_mask_is_not_merged():
    model = adapt(random_llama(), config_of("pst"))
    advance_pst_(model, 5, 10)
    with pytest.raises(StateError, match=r"still moving, with \d+\.\d% zeros on the way to `60%`"):
        model.merge_and_unload()
    advance_pst_(model, 10, 10)
    assert model.merge_and_unload()


def test_masks_move_with_the_trainer_and_survive_saving(tmp_path):
    torch.manual_seed(0)
    model = adapt(random_llama(), config_of("pst", warmup=0.0))
    rows = [{"input_ids": row, "labels": row} for row in random_ids()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[PstSchedule()])
    trainer.train()
    assert all(layer.is_fixed("default") for layer in adapted_linears(model))
    model.save_pretrained(tmp_path / "adapter")
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(random_llama(), tmp_path / "adapter")
    for one, other in zip(adapted_linears(loaded), adapted_linears(model), strict=True):
        assert torch.equal(one.mask("default"), other.mask("default"))
        assert one.is_fixed("default")
    ids = random_ids()
    merged = copy.deepcopy(loaded).merge_and_unload().eval()
    torch.testing.assert_close(merged(ids).logits, loaded.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_weight_pruned_by_its_magnitude_comes_back_if_the_loss_wants_it():
    """The smaller weight carries the signal: magnitude prunes it, PST's scores bring it back."""
    base = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0.8]]))
    config = PstConfig(r=1, importance_r=1, pattern="50%")
    from secateur.methods.adapters.pst import PstLinear

    layer = PstLinear(base.requires_grad_(False), "linear")
    layer._active_adapter = ["default"]
    layer.add_adapter("default", config)
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 0.1
    target = 0.8 * x[:, 1:]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    layer.choose_mask_("default", Unstructured(0.5), fix=False)
    assert layer.mask("default").tolist() == [[True, False]]
    for _ in range(60):
        ((layer(x) - target) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        layer.choose_mask_("default", Unstructured(0.5), fix=False)
    assert layer.mask("default").tolist() == [[False, True]]


def test_two_masks_cannot_be_active_together():
    model = adapt(sparse_llama(), config_of("pst"))
    model.add_adapter("second", config_of("pst"))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(RecipeError, match="`default`, `second` choose different masks"):
        model(random_ids())


def test_n_falls_step_by_step_for_groups():
    config = PstConfig(pattern="2:4", warmup=0.0, cooldown=0.2)
    found = [config.pattern_at(step, 10) for step in range(11)]
    assert found[0] == NM(4, 4)
    assert found[-1] == NM(2, 4)
    assert NM(3, 4) in found


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pattern": "100%"}, "would leave no weight"),
        ({"pattern": "50% model"}, "counts over the whole model"),
        ({"pattern": "much"}, "is not understood"),
        ({"warmup": 0.7}, "`warmup` \\+ `cooldown` must be below 1"),
        ({"initial_sparsity": 0.95}, "is more than the 0.9"),
        ({"interval": 0}, "`interval` must be a whole number from 1"),
        ({"importance_r": 0}, "`importance_r` must be a whole number from 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises((RecipeError, PatternError), match=words):
        PstConfig(**settings)


def test_misuse_of_the_schedule_is_refused():
    with pytest.raises(RecipeError, match="no PST adapter"):
        advance_pst_(sparse_llama(), 0, 1)
    model = adapt(sparse_llama(), config_of("pst"))
    with pytest.raises(RecipeError, match="no PST adapter called `other`"):
        advance_pst_(model, 0, 1, "other")
    with pytest.raises(RecipeError, match="got 3 of 2"):
        advance_pst_(model, 3, 2)
    with pytest.raises(PatternError, match="divisible by 5"):
        adapt(random_llama(), config_of("pst", pattern="2:5"))


def test_masks_that_accelerate_would_not_send_to_other_processes_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(RecipeError, match="not PST's masks"):
        adapt(random_llama(), config_of("pst"))
