"""Zeros stay zeros, whatever is done to the weights around them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from secateur.core.errors import InputError
from secateur.train.masking import FixedMasks

INFINITY, NAN = float("inf"), float("nan")


def pruned_parameter(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 8, generator=generator) > 0.5
    return nn.Parameter(torch.randn(6, 8, generator=generator).masked_fill(~mask, 0.0).to(dtype)), mask


def all_positive_zeros(values: Tensor) -> bool:
    return bool((values == 0).all()) and not bool(torch.signbit(values).any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_pruned_weights_are_zero_and_the_others_untouched(dtype: torch.dtype) -> None:
    parameter, mask = pruned_parameter(dtype=dtype)
    gradient = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    parameter.grad = gradient.clone()
    FixedMasks([(parameter, mask)]).mask_gradients_()
    assert all_positive_zeros(parameter.grad[~mask])
    assert torch.equal(parameter.grad[mask], gradient[mask])


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY, -1.0, -0.0])
def test_no_value_survives_on_a_pruned_position(value: float) -> None:
    parameter, mask = pruned_parameter()
    parameter.grad = torch.full((6, 8), value)
    parameter.data.fill_(value)
    masks = FixedMasks([(parameter, mask)])
    masks.mask_gradients_()
    masks.apply_()
    assert all_positive_zeros(parameter.grad[~mask])
    assert all_positive_zeros(parameter.detach()[~mask])
    torch.testing.assert_close(
        parameter.detach()[mask], torch.full_like(parameter.detach()[mask], value), equal_nan=True
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda weights: torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1),
        lambda weights: torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1, fused=True),
        lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda weights: torch.optim.RMSprop(weights, lr=0.1, centered=True),
    ],
    ids=["adamw", "fused adamw", "sgd", "rmsprop"],
)
def test_masked_gradients_alone_keep_zeros_and_moments_zero(
    build: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    parameter, mask = pruned_parameter()
    optimizer = build([parameter])
    masks = FixedMasks([(parameter, mask)])
    before = parameter.detach().clone()
    for step in range(5):
        optimizer.zero_grad()
        (parameter * torch.randn(6, 8, generator=torch.Generator().manual_seed(step))).sum().backward()
        masks.mask_gradients_()
        optimizer.step()
    assert all_positive_zeros(parameter.detach()[~mask])
    assert not torch.equal(parameter.detach()[mask], before[mask])
    moments = [value for value in optimizer.state[parameter].values() if value is not None and value.shape == (6, 8)]
    assert moments
    assert all(bool((moment[~mask] == 0).all()) for moment in moments)


def test_an_attached_guard_holds_zeros_against_older_moments_until_it_is_removed() -> None:
    parameter, mask = pruned_parameter()
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(6, 8)
    optimizer.step()  # the momentum now pulls at every position
    handles = FixedMasks([(parameter, mask)]).attach(optimizer)
    parameter.grad = torch.ones(6, 8)
    optimizer.step()
    assert all_positive_zeros(parameter.detach()[~mask])
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert not bool((parameter.detach()[~mask] == 0).any())


def test_a_parameter_without_gradient_is_passed_over() -> None:
    parameter, mask = pruned_parameter()
    FixedMasks([(parameter, mask)]).mask_gradients_()
    assert parameter.grad is None


def test_a_transposed_gradient_is_masked_in_place() -> None:
    parameter, mask = pruned_parameter()
    parameter.grad = torch.ones(8, 6).T
    FixedMasks([(parameter, mask)]).mask_gradients_()
    assert torch.equal(parameter.grad, mask.float())


@pytest.mark.parametrize("mask", [torch.ones(8, 6, dtype=torch.bool), torch.ones(6, 8)], ids=["shape", "dtype"])
def test_a_mask_that_does_not_fit_is_refused(mask: Tensor) -> None:
    parameter, _ = pruned_parameter()
    with pytest.raises(InputError, match=r"must be bool with its parameter's shape \(6, 8\)"):
        FixedMasks([(parameter, mask)])
