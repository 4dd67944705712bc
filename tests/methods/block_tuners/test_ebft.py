"""EBFT on toy blocks small enough to know the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from secateur.core.contracts import BlockTask, BlockTuner, Tuned
from secateur.core.errors import InputError, NumericError
from secateur.core.linalg import refit
from secateur.core.pattern import NM, Unstructured
from secateur.methods.block_tuners.ebft import EBFT, rate_factor, rate_units
from secateur.train.reconstruction import token_errors

HIDDEN = 8
HALF = Unstructured(0.5, "row")


class Gain(nn.Module):
    """A norm's gain and a bias, the vectors that a block has beside its linears."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HIDDEN))
        self.bias = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (HIDDEN,), self.weight, self.bias)


class ToyBlock(nn.Module):
    """Norm, up, activation, dropout, down, residual."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.norm = Gain()
        self.up = nn.Linear(HIDDEN, 16)
        self.dropout = nn.Dropout(0.5)
        self.down = nn.Linear(16, HIDDEN, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in (self.up.weight, self.up.bias, self.down.weight):
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(self.dropout(torch.nn.functional.silu(self.up(self.norm(x)))))
        return result


def correlated(sequences: int, tokens: int, seed: int = 0) -> Tensor:
    """Hidden states `(sequences, tokens, HIDDEN)` with correlated channels of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(HIDDEN, HIDDEN, generator=generator) * torch.logspace(0, -1, HIDDEN)
    return torch.randn(sequences, tokens, HIDDEN, generator=generator) @ mixing


def task_of(
    block: nn.Module,
    masked: list[tuple[nn.Parameter, Tensor]],
    inputs: list[Tensor],
    *,
    targets: list[Tensor] | None = None,
    keep: list[Tensor] | None = None,
    seed: int = 0,
    call: Callable[[nn.Module, Tensor], Tensor] | None = None,
) -> BlockTask:
    """Prune `block` to its masks; the targets are what it gave before."""
    run = call or (lambda module, hidden: module(hidden))
    if targets is None:
        with torch.no_grad():
            block.eval()
            targets = [run(block, hidden) for hidden in inputs]
    for parameter, mask in masked:
        parameter.data.masked_fill_(~mask, 0.0)
    return BlockTask(
        block=block,
        masked=masked,
        inputs=inputs,
        targets=targets,
        call=lambda module, batch, rows: run(module, inputs[batch] if rows is None else inputs[batch][rows]),
        keep=lambda batch: None if keep is None else keep[batch],
        generator=torch.Generator().manual_seed(seed),
    )


def toy_task(sizes: tuple[int, ...] = (6, 6, 5), pattern: Any = HALF, **more: Any) -> BlockTask:
    block = ToyBlock()
    masked = [(weight, pattern.mask(weight.detach().abs(), "row")) for weight in (block.up.weight, block.down.weight)]
    return task_of(block, masked, [correlated(size, 10, seed) for seed, size in enumerate(sizes)], **more)


def tune(task: BlockTask, **fields: Any) -> Tuned:
    return EBFT(**{"epochs": 3, "batch_size": 2, **fields}).tune(task)


def weights(task: BlockTask) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in task.block.named_parameters()}


def mean_error(task: BlockTask, loss: str = "relative") -> float:
    with torch.no_grad():
        errors = [
            token_errors(task.call(task.block, batch, None), task.targets[batch], loss)  # type: ignore[arg-type]
            for batch in range(len(task.inputs))
        ]
    return float(torch.cat([error.flatten() for error in errors]).mean())


def test_it_is_a_block_tuner_of_the_dense_path_unless_told_otherwise() -> None:
    assert isinstance(EBFT(), BlockTuner)
    assert EBFT().dense_path
    assert not EBFT(target="dense_block").dense_path


def test_a_linear_converges_to_the_masked_least_squares() -> None:
    block = nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=torch.float64)
    block.weight.data = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    dense = block.weight.detach().clone()
    noise = torch.randn(8, 16, HIDDEN, generator=torch.Generator().manual_seed(2))
    inputs = [(correlated(8, 16, 1) + noise).double()]
    mask = torch.rand(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(4)) > 0.5
    task = task_of(block, [(block.weight, mask)], inputs)
    tune(task, epochs=200, loss="mse", holdout=0.0, min_gain=0.0, batch_size=8, warmup=0.0)
    rows = inputs[0].reshape(-1, HIDDEN)
    best = refit(dense, rows.T @ rows, mask, damping=0.0)
    torch.testing.assert_close(block.weight.detach(), best, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loss", ["relative", "mse"])
def test_nothing_changes_where_nothing_was_pruned(loss: str) -> None:
    task = toy_task(pattern=Unstructured(0.0))
    before = weights(task)
    tuned = tune(task, loss=loss)
    assert (tuned.before, tuned.after, tuned.epochs) == (0.0, 0.0, 0)
    assert all(torch.equal(value, before[name]) for name, value in weights(task).items())


@pytest.mark.parametrize("loss", ["relative", "mse"])
def test_the_error_falls_and_is_what_it_is_said_to_be(loss: str) -> None:
    task = toy_task()
    before = mean_error(task, loss)
    tuned = tune(task, loss=loss, holdout=0.0, epochs=5)
    assert tuned.before == pytest.approx(before, rel=1e-5)
    assert tuned.after == pytest.approx(mean_error(task, loss), rel=1e-5)
    assert tuned.after < 0.9 * tuned.before


def test_the_scale_is_the_mean_square_of_the_targets_or_one() -> None:
    square = torch.cat(list(toy_task().targets)).square().mean()
    assert tune(toy_task(), loss="mse", holdout=0.0).scale == pytest.approx(float(square), rel=1e-5)
    assert tune(toy_task(), loss="relative").scale == 1.0


@pytest.mark.parametrize("rate", [1e-3, 10.0, 1e6])
def test_the_error_on_held_out_sequences_never_ends_above_its_start(rate: float) -> None:
    tuned = tune(toy_task(), learning_rate=rate, min_gain=0.0)
    assert tuned.after <= tuned.before


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 8), Unstructured(0.7, "row"), Unstructured(1.0)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_pruned_weights_are_exact_positive_zeros_afterwards(pattern: Any, decay: float) -> None:
    task = toy_task(pattern=pattern)
    before = weights(task)
    tune(task, weight_decay=decay, min_gain=0.0)
    for parameter, mask in task.masked:
        pruned = parameter.detach()[~mask]
        assert bool((pruned == 0).all()) and not bool(torch.signbit(pruned).any())
        pattern.check(mask, "row")
    if pattern.sparsity < 1:
        assert not torch.equal(weights(task)["up.weight"], before["up.weight"])


def test_negative_zeros_of_a_model_pruned_by_a_product_become_positive() -> None:
    task = toy_task()
    parameter, mask = task.masked[0]
    parameter.data[~mask] = -0.0
    tune(task, epochs=0)
    assert not bool(torch.signbit(parameter.detach()[~mask]).any())


def test_only_masked_weights_are_trained_unless_norms_are_asked_for() -> None:
    plain, whole = toy_task(), toy_task()
    before = weights(plain)
    tune(plain)
    tune(whole, train_norms=True)
    for name in ("norm.weight", "norm.bias", "up.bias"):
        assert torch.equal(weights(plain)[name], before[name])
        assert not torch.equal(weights(whole)[name], before[name])


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not() -> None:
    first, again, other = toy_task(seed=1), toy_task(seed=1), toy_task(seed=2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for task in (first, again, other):
        tune(task)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights(first)[name]) for name, value in weights(again).items())
    assert not torch.equal(weights(first)["up.weight"], weights(other)["up.weight"])


def test_flags_modes_and_gradients_are_put_back() -> None:
    task = toy_task()
    task.block.train()
    task.block.get_submodule("norm").eval()
    task.block.up.weight.requires_grad_(False)
    with torch.no_grad():
        tune(task)
    assert not task.block.up.weight.requires_grad
    assert task.block.norm.weight.requires_grad
    assert task.block.dropout.training and not task.block.norm.training
    assert all(parameter.grad is None for parameter in task.block.parameters())


def test_an_error_inside_leaves_flags_as_they_were() -> None:
    task = toy_task()
    task.call = lambda block, batch, rows: torch.full_like(task.targets[batch], float("nan"))[rows]
    with pytest.raises(NumericError, match="NaN or infinite before tuning"):
        tune(task)
    assert all(parameter.requires_grad for parameter in task.block.parameters())


class Spoiling(ToyBlock):
    """Gives NaN gradients in the steps with these numbers."""

    def __init__(self, steps: set[int]) -> None:
        super().__init__()
        self.steps = steps
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        if torch.is_grad_enabled():
            self.count += 1
            if self.count in self.steps:
                result = result * float("nan")
        return result


def spoiled_task(steps: set[int]) -> BlockTask:
    block = Spoiling(steps)
    mask = HALF.mask(block.up.weight.detach().abs())
    return task_of(block, [(block.up.weight, mask)], [correlated(8, 10)])


def test_an_epoch_of_nan_is_undone_and_training_goes_on_at_half_the_rate() -> None:
    task = spoiled_task({2})
    tuned = tune(task, holdout=0.0, min_gain=0.0, epochs=4)
    assert tuned.epochs == 4
    assert tuned.after < tuned.before
    assert len(tuned.notes) == 1 and "epoch 1 ended at nan" in tuned.notes[0]
    assert tuned.after == pytest.approx(mean_error(task), rel=1e-5)


def test_a_second_epoch_of_nan_ends_training_with_the_best_state() -> None:
    task = spoiled_task({6, 10})  # 4 steps an epoch: the second and the third epoch
    tuned = tune(task, holdout=0.0, min_gain=0.0, epochs=8)
    assert tuned.epochs == 3
    assert len(tuned.notes) == 2
    assert tuned.after == pytest.approx(mean_error(task), rel=1e-5)
    assert tuned.after < tuned.before


def test_nan_from_the_first_step_on_leaves_the_block_as_it_came() -> None:
    task = spoiled_task(set(range(100)))
    before = weights(task)
    tuned = tune(task)
    assert tuned.after == tuned.before
    assert all(torch.equal(value, before[name]) for name, value in weights(task).items())


def test_training_stops_when_an_epoch_gains_too_little() -> None:
    assert tune(toy_task(), epochs=20, min_gain=0.99).epochs == 1
    assert tune(toy_task(), epochs=4, min_gain=0.0, learning_rate=1e-3).epochs == 4


def test_zero_epochs_only_measure() -> None:
    task = toy_task()
    before = weights(task)
    tuned = tune(task, epochs=0)
    assert tuned.before == tuned.after > 0
    assert all(torch.equal(value, before[name]) for name, value in weights(task).items())


def test_what_stands_on_padding_does_not_matter() -> None:
    keep = [torch.arange(10)[None] < torch.tensor([[10], [4], [0], [7]])]
    inputs = correlated(4, 10)
    results = []
    for junk in (0.0, 1e3):
        block = ToyBlock()
        mask = HALF.mask(block.up.weight.detach().abs())
        targets = [block.eval()(inputs).detach().masked_fill(~keep[0][..., None], junk)]
        task = task_of(block, [(block.up.weight, mask)], [inputs], targets=targets, keep=keep)
        results.append((tune(task, loss="mse"), weights(task)["up.weight"]))
    (first, first_weight), (second, second_weight) = results
    assert (first.before, first.after, first.scale) == (second.before, second.after, second.scale)
    assert torch.equal(first_weight, second_weight)


def test_every_sequence_is_seen_once_an_epoch_in_steps_of_the_batch_size_and_held_out_ones_never() -> None:
    seen: list[tuple[int, int]] = []
    task = toy_task(sizes=(7, 1, 1, 11))
    plain = task.call

    def call(block: nn.Module, batch: int, rows: slice | None) -> Tensor:
        if torch.is_grad_enabled():
            assert rows is not None and rows.stop - rows.start <= 3
            seen.extend((batch, row) for row in range(rows.start, rows.stop))
        return plain(block, batch, rows)

    task.call = call
    tune(task, epochs=2, batch_size=3, min_gain=0.0, learning_rate=1e-4)
    assert len(seen) == 2 * 18  # 20 sequences, 2 of them held out
    assert sorted(seen[:18]) == sorted(seen[18:]) and len(set(seen)) == 18
    assert seen[:18] != seen[18:]


def test_short_runs_of_several_batches_make_one_step_equal_to_that_of_one_batch() -> None:
    hidden = correlated(4, 10)
    results = []
    for inputs in ([hidden], [hidden[:1], hidden[1:2], hidden[2:3], hidden[3:]]):
        block = ToyBlock()
        mask = HALF.mask(block.up.weight.detach().abs())
        task = task_of(block, [(block.up.weight, mask)], inputs)
        tune(task, batch_size=4, holdout=0.0)
        results.append(weights(task)["up.weight"])
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-4)


def test_a_relative_loss_weighs_tokens_alike_whatever_their_size() -> None:
    target = torch.ones(1, 3, 4) * torch.tensor([1.0, 10.0, 1000.0])[None, :, None]
    torch.testing.assert_close(
        token_errors(1.1 * target, target, "relative"), torch.full((1, 3), 0.01), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        token_errors(1.1 * target, target, "mse"), torch.tensor([[1e-2, 1.0, 1e4]]), rtol=1e-4, atol=0
    )


def test_a_token_whose_target_is_zero_gives_no_nan() -> None:
    assert bool(torch.isfinite(token_errors(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), "relative")).all())


def test_clipping_acts_on_the_gradient_itself() -> None:
    free, clipped = toy_task(), toy_task()
    tune(free, epochs=1)
    tune(clipped, epochs=1, clip=1e-12)  # below the epsilon of Adam, so that steps shrink
    start = weights(toy_task())["up.weight"]
    moved, held = (float((weights(task)["up.weight"] - start).abs().max()) for task in (free, clipped))
    assert held < 0.01 * moved


def test_rates_are_measured_in_the_size_of_kept_weights() -> None:
    matrix, empty = nn.Parameter(torch.tensor([[3.0, 0.0], [-3.0, 0.0]])), nn.Parameter(torch.zeros(2, 2))
    gain, bias = nn.Parameter(torch.full((4,), 5.0)), nn.Parameter(torch.zeros(4))
    mask = torch.tensor([[True, False], [True, False]])
    masked = [(matrix, mask), (empty, torch.zeros(2, 2, dtype=torch.bool))]
    assert rate_units([matrix, empty, gain, bias], masked) == pytest.approx([3.0, 0.0, 5.0, 3.0])


def test_relative_rates_treat_a_block_of_another_scale_alike() -> None:
    results = []
    for scale in (1.0, 100.0):
        block = nn.Linear(HIDDEN, HIDDEN, bias=False)
        block.weight.data = scale * torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(3))
        task = task_of(block, [(block.weight, HALF.mask(block.weight.detach().abs()))], [correlated(8, 10)])
        tune(task)
        results.append(block.weight.detach() / scale)
    torch.testing.assert_close(results[0], results[1], atol=1e-3, rtol=1e-3)


def test_absolute_rates_bound_the_step_of_every_weight() -> None:
    task = toy_task(sizes=(4,))
    start = weights(task)["up.weight"]
    tune(task, epochs=1, batch_size=4, learning_rate=1e-3, relative_rate=False, warmup=0.0, holdout=0.0)
    moved = (weights(task)["up.weight"] - start).abs().max()
    torch.testing.assert_close(moved, torch.tensor(1e-3), rtol=1e-2, atol=0)


def test_progress_rises_to_one() -> None:
    task = toy_task()
    told: list[float] = []
    task.progress = told.append
    tune(task, min_gain=0.0)
    assert told == sorted(told) and told[-1] == pytest.approx(1.0)


def test_autocast_multiplies_in_bfloat16_and_trains_float32_weights() -> None:
    dtypes: set[torch.dtype] = set()
    task = toy_task(call=lambda block, hidden: dtypes.add((output := block(hidden)).dtype) or output - hidden + hidden)
    task.block.up.register_forward_hook(lambda module, given, output: dtypes.add(output.dtype))
    tuned = tune(task, autocast=True)
    assert torch.bfloat16 in dtypes
    assert task.block.up.weight.dtype == torch.float32
    assert tuned.after < tuned.before


def test_a_block_without_masks_is_measured_and_left() -> None:
    task = task_of(ToyBlock(), [], [correlated(4, 10)], targets=[torch.zeros(4, 10, HIDDEN)])
    tuned = tune(task, loss="mse")
    assert tuned.before == tuned.after > 0 and tuned.epochs == 0


def test_calibration_of_nothing_but_padding_is_refused() -> None:
    task = toy_task(sizes=(2,), keep=[torch.zeros(2, 10, dtype=torch.bool)])
    with pytest.raises(InputError, match="no real token"):
        tune(task)


def test_the_rate_rises_then_falls_to_zero() -> None:
    factors = [rate_factor(step / 100, 1 / 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0) and factors[10] == pytest.approx(1.0)
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0.01 / 0.9)
    assert rate_factor(0.0, 0.01, 0.0) == 1.0


@pytest.mark.parametrize(
    "fields",
    [
        {"epochs": -1},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"weight_decay": 1.0},
        {"betas": (0.9, 1.0)},
        {"warmup": 1.0},
        {"clip": 0.0},
        {"target": "dense"},
        {"loss": "l1"},
        {"holdout": 1.0},
        {"min_gain": -0.1},
        {"rate": 1e-3},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EBFT(**fields)
