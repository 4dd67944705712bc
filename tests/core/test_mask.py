from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.core.errors import InputError
from secateur.core.mask import Masks, pack_bits, unpack_bits
from strategies import seeds


def random_mask(rows: int, columns: int, seed: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(rows=st.integers(0, 6), columns=st.integers(1, 40), seed=seeds)
@settings(max_examples=40, deadline=None)
def test_bits_come_back_as_they_were(rows, columns, seed):
    mask = random_mask(rows, columns, seed)
    packed = pack_bits(mask)
    assert packed.shape == (rows, -(-columns // 8))
    assert torch.equal(unpack_bits(packed, columns), mask)


def test_the_lowest_column_is_the_lowest_bit():
    mask = torch.tensor([[True, False, False, True, False, False, False, False, True]])
    assert pack_bits(mask).tolist() == [[0b1001, 1]]


def test_masks_are_kept_at_one_bit_a_weight():
    masks = Masks({"a": random_mask(16, 64, 0)})
    assert masks.packed()["a"].nbytes == 16 * 64 // 8
    assert torch.equal(masks["a"], random_mask(16, 64, 0))


def test_sparsity_is_weighted_by_size():
    masks = Masks({"a": torch.zeros(1, 4, dtype=torch.bool), "b": torch.ones(3, 4, dtype=torch.bool)})
    assert masks.sparsity() == 0.25
    assert Masks().sparsity() == 0.0


def test_packed_masks_come_back():
    masks = Masks({"a": random_mask(5, 13, 1), "b": random_mask(2, 8, 2)})
    again = Masks.from_packed(masks.packed(), masks.widths())
    assert list(again) == ["a", "b"]
    assert len(again) == 2
    assert all(torch.equal(again[name], masks[name]) for name in masks)


def test_a_view_packs_like_its_copy():
    mask = random_mask(12, 10, 3)
    assert torch.equal(pack_bits(mask.T), pack_bits(mask.T.contiguous()))


@pytest.mark.parametrize("wrong", [torch.ones(2, 2), torch.ones(4, dtype=torch.bool)])
def test_what_is_no_bool_matrix_is_refused(wrong):
    with pytest.raises(InputError, match="mask of `a` must be a bool matrix"):
        Masks({"a": wrong})


def test_a_transposed_mask_is_packed_as_files_want_it():
    mask = torch.rand(5, 19, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_bits(mask.T.contiguous().T)
    assert packed.is_contiguous()
    assert torch.equal(packed, pack_bits(mask))
