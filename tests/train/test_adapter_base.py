"""The record of the model that an adapter was made for."""

from __future__ import annotations

import torch

from secateur.train.adapter_base import described


def test_the_record_of_a_weight_sees_zeros_exactly_and_values_by_samples():
    weight = torch.randn(40, 300)
    assert described(weight) == described(weight.clone())
    assert described(weight).split()[:2] == ["40x300", "float32"]
    assert described(weight.bfloat16()).split()[2:] == described(weight).split()[2:]
    one_less = weight.clone()
    one_less[17, 123] = 0.0
    assert described(one_less).split()[2] != described(weight).split()[2]
    assert described(weight * 1.1).split()[2] == described(weight).split()[2]
    assert described(weight * 1.1).split()[3] != described(weight).split()[3]
