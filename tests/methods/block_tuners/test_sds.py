"""SDS by gradients: masks that move, exact budgets, a block error that falls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import secateur
from secateur.core.contracts import BlockTask, BlockTuner, Tuned
from secateur.core.errors import InputError, NumericError
from secateur.core.pattern import NM, Pattern, Unstructured, parse_pattern
from secateur.methods.block_tuners.ebft import EBFT
from secateur.methods.block_tuners.sds import SDSBlocks
from secateur.models.linears import find_all_linears
from secateur.recipe.build import build_method

HIDDEN = 8
PATTERNS: list[Pattern] = [NM(2, 4), Unstructured(0.5, "row"), Unstructured(0.6, "layer")]
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


class ToyBlock(nn.Module):
    """Up, activation, dropout, down, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 16)
        self.dropout = nn.Dropout(0.5)
        self.down = nn.Linear(16, HIDDEN, bias=False)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(self.dropout(torch.nn.functional.silu(self.up(x))))
        return result


def correlated(sequences: int, tokens: int, seed: int) -> Tensor:
    """Hidden states `(sequences, tokens, HIDDEN)` with correlated channels of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(HIDDEN, HIDDEN, generator=generator) * torch.logspace(0, -1, HIDDEN)
    return torch.randn(sequences, tokens, HIDDEN, generator=generator) @ mixing


def toy_task(pattern: Pattern = PATTERNS[0], keep: Callable[[int], Tensor | None] | None = None) -> BlockTask:
    """A toy block pruned by magnitude; the targets are what it gave before."""
    block = ToyBlock().eval()
    inputs = [correlated(size, 10, seed) for seed, size in enumerate((6, 6, 5))]
    with torch.no_grad():
        targets = [block(hidden) for hidden in inputs]
    masked = []
    for weight in (block.up.weight, block.down.weight):
        mask = pattern.mask(weight.detach().abs(), "layer")
        weight.data.mul_(mask)
        masked.append((weight, mask))
    return BlockTask(
        block=block,
        masked=masked,
        inputs=inputs,
        targets=targets,
        call=lambda module, batch, rows: module(inputs[batch] if rows is None else inputs[batch][rows]),
        keep=keep or (lambda batch: None),
        generator=torch.Generator().manual_seed(0),
        select=[lambda score: pattern.mask(score, "layer")] * 2,
    )


def tune(task: BlockTask, **fields: Any) -> Tuned:
    return SDSBlocks(**{"learning_rate": 0.1, "holdout": 0.0, **fields}).tune(task)


def mean_error(task: BlockTask) -> float:
    """The mean squared error of the block relative to each token's target."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch, target in enumerate(task.targets):
            error = (task.call(task.block, batch, None) - target).square().mean(-1) / target.square().mean(-1)
            total, count = total + float(error.sum()), count + error.numel()
    return total / count


@each_pattern
def test_masks_move_inside_the_pattern_and_the_error_falls(pattern):
    task = toy_task(pattern)
    before, first = [mask.clone() for _, mask in task.masked], mean_error(task)
    tuned = tune(task)
    for (parameter, mask), old in zip(task.masked, before, strict=True):
        pattern.check(mask, "layer")
        assert not parameter.detach()[~mask].any()
        assert not torch.signbit(parameter.detach()[~mask]).any()
        assert mask.sum() == old.sum()
    assert any(bool((mask != old).any()) for (_, mask), old in zip(task.masked, before, strict=True))
    assert "of the kept weights are new" in tuned.notes[0]
    assert tuned.before == pytest.approx(first, rel=1e-4)
    assert tuned.after == pytest.approx(mean_error(task), rel=1e-4)
    assert tuned.after < 0.5 * tuned.before


@each_pattern
def test_moving_masks_reaches_further_than_fixed_ones(pattern):
    fixed, moving = toy_task(pattern), toy_task(pattern)
    kept = EBFT(learning_rate=0.1, holdout=0.0, epochs=20, min_gain=0.0).tune(fixed)
    moved = tune(moving, dense_epochs=2, soft_epochs=10, settling_epochs=8)
    assert moved.after < kept.after


@pytest.mark.parametrize(
    "fields",
    [
        {"dense_epochs": 0},
        {"dense_epochs": 3, "soft_epochs": 0},
        {"settling_epochs": 0},
        {"dense_epochs": 0, "soft_epochs": 0},
        {"l1": 0.5, "l2": 0.5},
        {"decay": 0.0},
        {"decay": 100.0},
        {"scaled": False},
        {"loss": "mse"},
        {"holdout": 0.3},
        {"learning_rate": 1e4},
    ],
    ids=str,
)
def test_no_setting_breaks_the_pattern_or_raises_the_error(fields):
    task = toy_task()
    tuned = tune(task, **fields)
    assert tuned.after <= tuned.before
    for parameter, mask in task.masked:
        NM(2, 4).check(mask)
        assert not parameter.detach()[~mask].any()


def test_without_soft_epochs_only_the_second_pruning_moves_the_mask():
    task = toy_task()
    before = [mask.clone() for _, mask in task.masked]
    tune(task, dense_epochs=0, soft_epochs=0)
    assert all(torch.equal(mask, old) for (_, mask), old in zip(task.masked, before, strict=True))
    tune(task, dense_epochs=3, soft_epochs=0)
    assert any(bool((mask != old).any()) for (_, mask), old in zip(task.masked, before, strict=True))


def test_no_epochs_change_nothing():
    task = toy_task()
    before = [(parameter.detach().clone(), mask.clone()) for parameter, mask in task.masked]
    tuned = tune(task, dense_epochs=0, soft_epochs=0, settling_epochs=0)
    assert (tuned.before, tuned.epochs) == (tuned.after, 0)
    for (parameter, mask), (weight, old) in zip(task.masked, before, strict=True):
        assert torch.equal(parameter.detach(), weight)
        assert torch.equal(mask, old)


def test_equal_tasks_are_tuned_alike():
    first, second = toy_task(), toy_task()
    tune(first)
    tune(second)
    for (one, mask), (other, same) in zip(first.masked, second.masked, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(mask, same)


def test_only_masked_weights_change_and_the_block_is_left_as_it_was():
    task = toy_task()
    bias = task.block.up.bias.detach().clone()
    task.block.train()
    tune(task)
    assert torch.equal(task.block.up.bias, bias)
    assert task.block.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in task.block.parameters())
    assert not task.block.up._forward_pre_hooks


def test_padding_is_not_looked_at():
    def keep(batch: int) -> Tensor:
        mask = torch.ones(6 if batch < 2 else 5, 10, dtype=torch.bool)
        mask[:, 7:] = False
        return mask

    plain, spoiled = toy_task(keep=keep), toy_task(keep=keep)
    for target in spoiled.targets:
        target[:, 7:] = 1e4
    assert tune(plain, scaled=False).after == tune(spoiled, scaled=False).after


def test_a_task_whose_masks_must_stay_is_refused():
    task = toy_task()
    task.select = ()
    with pytest.raises(InputError, match="2 of 2 come without a way to select"):
        tune(task)


def test_an_error_that_is_not_finite_is_refused():
    task = toy_task()
    task.targets[0][0, 0, 0] = torch.nan
    with pytest.raises(NumericError, match="NaN or infinite before tuning"):
        tune(task)


def test_progress_ends_with_everything_done():
    task = toy_task()
    told: list[float] = []
    task.progress = told.append
    tuned = tune(task)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len(told) == tuned.epochs == 10


@pytest.mark.parametrize(
    ("field", "value"),
    [("dense_epochs", -1), ("batch_size", 0), ("learning_rate", 0.0), ("l1", -1.0), ("decay", -0.1), ("target", "kd")],
)
def test_senseless_settings_are_refused(field, value):
    with pytest.raises(ValidationError, match=field):
        SDSBlocks(**{field: value})


def test_the_shelf_knows_it():
    tuner = build_method("sds-blocks", "block tuner")
    assert tuner == SDSBlocks()
    assert isinstance(tuner, BlockTuner)
    assert not build_method({"name": "sds-blocks", "target": "dense_block"}, "block tuner").dense_path


@pytest.mark.parametrize("pattern", ["2:4", "70%"])
def test_a_trained_model_gets_better_with_exact_budgets(trained_folder, pattern):
    found = secateur.prune(
        trained_folder,
        method="wanda",
        tuner={"name": "sds-blocks", "soft_epochs": 2, "settling_epochs": 1},
        pattern=pattern,
        calibration="builtin:tiny-calibration",
        samples=8,
        length=32,
    )
    for block in found.report["blocks"]:
        assert block["error_after"] < 0.99 * block["error_before"]
    for linear in find_all_linears(found.model):
        parse_pattern(pattern).check(linear.read() != 0, "row")


def test_a_sparse_model_is_tuned_inside_the_pattern_it_has(trained_folder):
    settings = {"calibration": "builtin:tiny-calibration", "samples": 8, "length": 32}
    sparse = secateur.prune(trained_folder, method="wanda", pattern="2:4", **settings)
    before = {linear.name: linear.read() != 0 for linear in find_all_linears(sparse.model)}
    tuned = secateur.tune(
        sparse.model,
        secateur.load(trained_folder).tokenizer,
        teacher=trained_folder,
        method={"name": "sds-blocks", "soft_epochs": 2, "settling_epochs": 1},
        **settings,
    )
    after = {linear.name: linear.read() != 0 for linear in find_all_linears(tuned.model)}
    assert any(not torch.equal(after[name], before[name]) for name in after)
    for mask in after.values():
        NM(2, 4).check(mask)
