"""CrAM: its step against closed forms, weights that always come back, exact masks, training that survives pruning."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainingArguments

from conftest import random_ids, random_llama
from families import prepared
from secateur.core.errors import NumericError, PatternError, RecipeError, StateError
from secateur.core.pattern import NM, Unstructured, parse_pattern
from secateur.methods.optimizers.cram import CrAM, top_of_all
from secateur.models.linears import find_all_linears
from secateur.train.trainer import TwoPassTrainer
from strategies import seeds


def network(seed: int = 0, width: int = 16) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 4))


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 8, generator=generator), torch.randint(4, (32,), generator=generator)


def closure_of(model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor]):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0]), data[1])
        loss.backward()
        return loss

    return closure


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def gradients_at(model: nn.Module, values: list[Tensor], data) -> list[Tensor]:
    other = copy.deepcopy(model)
    for parameter, value in zip(other.parameters(), values, strict=True):
        parameter.data.copy_(value)
    return list(torch.autograd.grad(F.cross_entropy(other(data[0]), data[1]), list(other.parameters())))


@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=4),
    share=st.floats(0, 1),
    levels=st.integers(1, 40),
    seed=seeds,
)
def test_the_largest_of_all_are_exact_with_ties_to_the_earlier(shapes, share, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randint(-levels, levels + 1, shape, generator=generator) / 7 for shape in shapes]
    flat = torch.cat([value.flatten() for value in values]).abs()
    keep = round(share * len(flat))
    expected = torch.zeros(len(flat), dtype=torch.bool)
    expected[flat.sort(descending=True, stable=True).indices[:keep]] = True
    found = top_of_all(values, keep)
    assert torch.equal(torch.cat([mask.flatten() for mask in found]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_largest_of_all_reach_the_ends_of_the_range(dtype):
    big, small = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    values = [torch.tensor([0.0, small, -1.0], dtype=dtype), torch.tensor([big, -0.0], dtype=dtype)]
    assert [mask.tolist() for mask in top_of_all(values, 2)] == [[False, False, True], [True, False]]
    assert not any(mask.any() for mask in top_of_all(values, 0))
    assert all(mask.all() for mask in top_of_all(values, 5))


@pytest.mark.parametrize("plus", [False, True])
def test_without_climb_and_compression_it_is_the_optimizer_inside(plus):
    ours, theirs, data = network(), network(), batch()
    inner = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    optimizer = CrAM(rho=0.0, patterns=["0%"], plus=plus).around(inner)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.step(closure_of(ours, optimizer, data))
        closure_of(theirs, plain, data)()
        if plus:
            for parameter in theirs.parameters():
                parameter.grad.mul_(2)
        plain.step()
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_without_compression_it_is_sam():
    model, data = network(), batch()
    start = weights(model)
    first = gradients_at(model, start, data)
    norm = torch.sqrt(sum((gradient**2).sum() for gradient in first))
    second = gradients_at(model, [w + 0.3 * g / norm for w, g in zip(start, first, strict=True)], data)
    settings = CrAM(rho=0.3, patterns=["0%"], plus=False, normalise=True)
    optimizer = settings.around(torch.optim.SGD(model.parameters(), lr=1.0))
    optimizer.step(closure_of(model, optimizer, data))
    for after, before, gradient in zip(model.parameters(), start, second, strict=True):
        torch.testing.assert_close(after, before - gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("text", ["60%", "60% layer", "50% row", "2:4"])
def test_the_gradient_is_that_of_the_weights_uphill_and_compressed(text, sparse):
    model, data, rho = network(), batch(), 0.2
    start = weights(model)
    first = gradients_at(model, start, data)
    uphill = [w + rho * g for w, g in zip(start, first, strict=True)]
    matrices = [w for w in uphill if w.dim() > 1]
    pattern = parse_pattern(text)
    if text == "60%":
        masks = top_of_all(matrices, sum(m.numel() for m in matrices) - int(0.6 * sum(m.numel() for m in matrices)))
    else:
        masks = [pattern.mask(matrix.abs(), "layer") for matrix in matrices]
    found = iter(masks)
    masks = [next(found) if w.dim() > 1 else torch.ones_like(w, dtype=torch.bool) for w in uphill]
    second = gradients_at(model, [w * mask for w, mask in zip(uphill, masks, strict=True)], data)
    optimizer = CrAM(rho=rho, patterns=[text], sparse_gradient=sparse).around(
        torch.optim.SGD(model.parameters(), lr=1.0)
    )
    closure_of(model, optimizer, data)()
    with optimizer.second_pass():
        for parameter, mask in zip(model.parameters(), masks, strict=True):
            assert torch.equal(parameter != 0, mask & (parameter != 0))
            assert not parameter[~mask].any()
        F.cross_entropy(model(data[0]), data[1]).backward()
    for parameter, before in zip(model.parameters(), start, strict=True):
        assert torch.equal(parameter, before)
    for parameter, g1, g2, mask in zip(model.parameters(), first, second, masks, strict=True):
        expected = g1 + (g2 * mask if sparse else g2)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6)


def test_weights_and_gradients_come_back_if_the_second_pass_fails():
    model, data = network(), batch()
    optimizer = CrAM().around(torch.optim.SGD(model.parameters(), lr=0.1))
    closure_of(model, optimizer, data)()
    before, gradients = weights(model), [p.grad.clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt), optimizer.second_pass():
        raise KeyboardInterrupt
    assert all(torch.equal(p, b) and torch.equal(p.grad, g) for p, b, g in zip(model.parameters(), before, gradients))  # noqa: B905
    with pytest.raises(StateError, match="needs a second pass"):
        optimizer.step()
    with pytest.raises(StateError, match="has begun already"), optimizer.second_pass(), optimizer.second_pass():
        pass
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_weight_without_gradient_in_either_pass_is_restored():
    model, data = network(), batch()
    extra = nn.Parameter(torch.randn(4, 4))
    before = extra.detach().clone()
    optimizer = CrAM(patterns=["50% layer"]).around(torch.optim.SGD([*model.parameters(), extra], lr=0.1))
    closure_of(model, optimizer, data)()
    with optimizer.second_pass():
        assert int((extra == 0).sum()) == 8
        model[0](data[0]).sum().backward()  # the last linear gets no second gradient
    assert torch.equal(extra, before)
    assert extra.grad is None
    assert model[3].weight.grad is not None
    optimizer.step()
    assert torch.equal(extra, before)


def test_values_that_are_not_finite_are_refused_and_nothing_has_changed():
    model, data = network(), batch()
    optimizer = CrAM().around(torch.optim.SGD(model.parameters(), lr=0.1))
    closure_of(model, optimizer, data)()
    model[0].weight.grad[0, 0] = float("nan")
    before = weights(model)
    with pytest.raises(NumericError, match="NaN or infinite"), optimizer.second_pass():
        pass
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_statistics_of_batch_norms_see_the_dense_pass_only():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 4, 4))
    images, labels = torch.randn(6, 4, 4, 4), torch.randint(4, (6,))
    once = copy.deepcopy(model)
    F.cross_entropy(once(images), labels).backward()
    optimizer = CrAM(patterns=["2:4", "50%"]).around(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer._norms = [model[1]]
    optimizer.step(closure_of(model, optimizer, (images, labels)))
    for name, buffer in once.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name
    assert model[1].track_running_stats


def test_groups_of_a_convolution_run_along_its_channels():
    conv = nn.Conv2d(8, 3, 2, bias=False)
    optimizer = CrAM(rho=0.0, patterns=["1:4"]).around(torch.optim.SGD(conv.parameters(), lr=0.1))
    conv(torch.randn(1, 8, 2, 2)).sum().backward()
    with optimizer.second_pass():
        kept = (conv.weight != 0).movedim(1, -1).reshape(-1, 4).sum(1)
        assert (kept == 1).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_with_the_model_known_its_prunable_linears_are_compressed(family):
    model = copy.deepcopy(prepared(family))
    optimizer = CrAM(patterns=["2:4"]).around(torch.optim.SGD(model.parameters(), lr=0.1), model)
    ids = random_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    embedding = model.get_input_embeddings().weight
    with optimizer.second_pass():
        for view in find_all_linears(model):
            NM(2, 4).check(view.read() != 0)
        assert (embedding != 0).all()
        model(input_ids=ids, labels=ids).loss.backward()


def test_patterns_are_drawn_alike_everywhere_and_after_resuming():
    model, data = network(), batch()
    settings = CrAM(patterns=["10%", "50%", "2:4", "90%"], seed=3)
    optimizer = settings.around(torch.optim.AdamW(model.parameters(), lr=0.01))
    state, drawn = torch.random.get_rng_state(), []
    for step in range(12):
        if step == 5:
            saved, middle = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
        drawn.append(str(optimizer.pattern()))
        optimizer.step(closure_of(model, optimizer, data))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(set(drawn)) == 4
    resumed = settings.around(torch.optim.AdamW(middle.parameters(), lr=0.01))
    resumed.load_state_dict(saved)
    again = []
    for _ in range(7):
        again.append(str(resumed.pattern()))
        resumed.step(closure_of(middle, resumed, data))
    assert again == drawn[5:]
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), middle.parameters(), strict=True))


def test_a_schedule_reaches_the_optimizer_inside():
    model, data = network(), batch()
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = CrAM().around(inner)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step(closure_of(model, optimizer, data))
    schedule.step()
    assert inner.param_groups[0]["lr"] == 0.5
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_takes_two_passes_over_every_batch(accumulation, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in random_ids(samples=4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.5,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    settings = CrAM(rho=0.1, patterns=["50%", "2:4"])
    trained = random_llama()
    optimizer = settings.around(torch.optim.SGD(trained.parameters(), lr=0.1), trained)
    TwoPassTrainer(trained, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    by_hand = random_llama().train()
    optimizer = settings.around(torch.optim.SGD(by_hand.parameters(), lr=0.1), by_hand)
    ids = random_ids(samples=4)
    for _ in range(3):
        by_hand(input_ids=ids, labels=ids).loss.backward()
        with optimizer.second_pass():
            by_hand(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(trained.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_training_with_it_survives_one_shot_pruning_better():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 4, generator=generator)
    inputs = torch.randn(512, 8, generator=generator)
    data = (inputs, (inputs @ teacher + (inputs**2) @ torch.randn(8, 4, generator=generator)).argmax(1))

    def pruned_loss(optimizer_of) -> float:
        losses = []
        for seed in range(2):
            model = network(seed, width=48)
            optimizer = optimizer_of(model)
            for _ in range(80):
                optimizer.step(closure_of(model, optimizer, data))
            for linear in (model[0], model[3]):
                linear.weight.data *= Unstructured(0.8).mask(linear.weight.detach().abs())
            losses.append(float(F.cross_entropy(model(data[0]), data[1]).detach()))
        return sum(losses) / 2

    def plain(model):
        return torch.optim.Adam(model.parameters(), lr=0.01)

    ours = pruned_loss(lambda model: CrAM(rho=0.05, patterns=["80% layer"]).around(plain(model)))
    assert ours < 0.8 * pruned_loss(plain)


def test_misuse_is_refused():
    model = network()
    optimizer = CrAM().around(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(StateError, match="no weight has a gradient"), optimizer.second_pass():
        pass
    with pytest.raises(RecipeError, match="no weight that CrAM could compress"):
        CrAM().around(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1))
    with pytest.raises(PatternError, match="divisible by 3"):
        CrAM(patterns=["1:3"]).around(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(PatternError, match="leaves no weight to train"):
        CrAM(patterns=["100%"])
    for wrong in ({"rho": -1.0}, {"rho": float("inf")}, {"patterns": []}, {"roh": 0.1}):
        with pytest.raises(ValidationError):
            CrAM(**wrong)
