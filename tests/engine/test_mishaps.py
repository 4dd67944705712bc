"""What a sweep survives: batches that overflow, memory that runs out, Grams without a factor; and what it does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from secateur.core import faults
from secateur.core.errors import NumericError, ResourceError
from secateur.core.problem import LayerProblem, Pruned
from secateur.engine.batches import Batches
from secateur.engine.budget import assign
from secateur.engine.journal import Journal
from secateur.engine.sweep import Sweep
from secateur.models.linears import find_all_linears


def weights(model):
    """Return all linears of the blocks, flat."""
    return torch.cat([linear.read().reshape(-1) for linear in find_all_linears(model)])


@pytest.fixture
def overflowing(monkeypatch):
    """A function that makes the forward of one batch of ids give NaN in one block."""

    def arrange(marker: int, block: int):
        real = Batches.lane

        def lane(self, work, inputs, batch):
            forward = real(self, work, inputs, batch)

            def broken():
                if work.index == block and int(self.ids[batch][0, 0]) == marker:
                    work.module.input_layernorm.weight.data[0] = torch.nan
                try:
                    return forward()
                finally:
                    work.module.input_layernorm.weight.data[0] = 1.0

            return broken

        monkeypatch.setattr(Batches, "lane", lane)

    return arrange


def marked(ids):
    """Return ids whose first token is the number of the sample."""
    ids = ids.clone()
    ids[:, 0] = torch.arange(len(ids))
    return ids


def sweep_of(model, pruner, **settings):
    return Sweep(patterns=assign(model, "50%"), pruner=pruner, batch_tokens=24, **settings)


def test_a_batch_that_is_not_finite_is_an_error_that_names_it(tiny_llama, ids, pruner, overflowing):
    overflowing(2, 0)
    with pytest.raises(NumericError, match="NaN or infinity") as caught:
        sweep_of(tiny_llama, pruner).run(tiny_llama, marked(ids))
    assert caught.value.where == "batch 2"
    assert "skip-batch" in caught.value.hint


def test_a_batch_left_out_counts_nowhere(make_llama, ids, pruner, overflowing):
    ids = marked(ids)
    expected = make_llama()
    sweep_of(expected, pruner).run(expected, ids[[0, 1, 3]])
    overflowing(2, 0)
    model = make_llama()
    report = sweep_of(model, pruner, nonfinite="skip-batch").run(model, ids)
    assert torch.equal(weights(model), weights(expected))
    assert ["batch 2 was left out" in warning for warning in report.warnings] == [True]
    assert report.blocks[0].mishaps == ("drop 2",)


def test_more_bad_batches_than_one_in_a_hundred_are_refused(tiny_llama, ids, pruner, overflowing):
    overflowing(0, 0)
    same = marked(ids)
    same[:, 0] = 0
    with pytest.raises(NumericError, match="more batches hold NaN"):
        sweep_of(tiny_llama, pruner, nonfinite="skip-batch").run(tiny_llama, same)


def test_a_resumed_sweep_leaves_out_the_same_batch(make_llama, ids, pruner, overflowing, monkeypatch, tmp_path):
    ids = marked(ids)
    overflowing(1, 0)
    expected = make_llama(layers=3)
    sweep_of(expected, pruner, nonfinite="skip-batch").run(expected, ids)
    monkeypatch.setenv("SECATEUR_FAULT", "sweep.block:3:raise")
    faults.forget()
    first = make_llama(layers=3)
    journal = Journal(tmp_path, {"run": 1}, resume=False)
    with pytest.raises(faults.InjectedError):
        sweep_of(first, pruner, nonfinite="skip-batch").run(first, ids, journal=journal)
    journal.close(remove=False)
    monkeypatch.delenv("SECATEUR_FAULT")
    for damaged in (False, True):
        if damaged:  # the hidden states are gone, so finished blocks are walked again
            for file in tmp_path.glob("hidden-*"):
                file.write_bytes(b"")
        model = make_llama(layers=3)
        journal = Journal(tmp_path, {"run": 1}, resume=True)
        sweep = sweep_of(model, pruner, nonfinite="skip-batch")
        if damaged:
            sweep.run(model, ids, journal=journal)
            assert torch.equal(weights(model), weights(expected))
        journal.close(remove=False)


def test_out_of_memory_halves_the_batches_and_changes_nothing(make_llama, ids, pruner, monkeypatch):
    expected = make_llama()
    Sweep(patterns=assign(expected, "50%"), pruner=pruner, batch_tokens=48).run(expected, ids)
    model, seen = make_llama(), []
    real = Batches.lane

    def lane(self, work, inputs, batch):
        forward = real(self, work, inputs, batch)

        def scarce():
            seen.append(len(self.ids[batch]))
            if len(self.ids[batch]) > 1:
                raise torch.OutOfMemoryError("the device is full")
            return forward()

        return scarce

    monkeypatch.setattr(Batches, "lane", lane)
    report = Sweep(patterns=assign(model, "50%"), pruner=pruner, batch_tokens=48).run(model, ids)
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-5, atol=1e-7)
    assert seen[0] == 2
    assert set(seen[1:]) == {1}
    assert report.blocks[0].mishaps == ("halve",)
    assert report.warnings == ["memory ran out, so the calibration batches were cut in halves"]


def test_out_of_memory_with_single_sequences_is_an_error_with_advice(tiny_llama, ids, pruner, monkeypatch):
    def lane(self, work, inputs, batch):
        def scarce():
            raise MemoryError("no memory")

        return scarce

    monkeypatch.setattr(Batches, "lane", lane)
    with pytest.raises(ResourceError, match="memory ran out, with batches cut in halves 1 times") as caught:
        Sweep(patterns=assign(tiny_llama, "50%"), pruner=pruner, batch_tokens=48).run(tiny_llama, ids)
    assert "--length" in caught.value.hint


def test_weights_that_are_not_finite_become_zero_only_on_request(make_llama, ids, pruner):
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, :2] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(NumericError):
        sweep_of(model, pruner).run(model, ids)
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, :2] = torch.tensor([torch.nan, torch.inf])
    report = sweep_of(model, pruner, nonfinite="zero").run(model, ids)
    assert report.warnings == [
        "2 values of `model.layers.1.mlp.up_proj.weight` were NaN or infinite and were set to zero"
    ]
    assert torch.isfinite(weights(model)).all()


@dataclass(frozen=True)
class NeedsDiagonal:
    """A pruner that fails wherever inputs are correlated."""

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    scope: ClassVar[str] = "row"

    def prune(self, problem: LayerProblem) -> Pruned:
        gram = problem.need("gram")
        if not torch.equal(gram, torch.diag(gram.diagonal())):
            raise NumericError("no damping makes the Gram matrix positive definite")
        return Pruned.keep(problem.weight, problem.select(problem.weight.abs() * gram.diagonal().sqrt(), "row"))


def test_a_gram_without_a_factor_falls_back_to_its_diagonal_only_on_request(make_llama, ids):
    model = make_llama()
    with pytest.raises(NumericError, match="positive definite"):
        sweep_of(model, NeedsDiagonal()).run(model, ids)
    model = make_llama()
    report = sweep_of(model, NeedsDiagonal(), fallback="diag").run(model, ids)
    lines = [layer for block in report.blocks for layer in block.layers]
    assert all(layer.notes[0].startswith("degraded: solved on the diagonal") for layer in lines)
    assert len(report.warnings) == len(lines)
    assert report.sparsity == 0.5
