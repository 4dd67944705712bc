"""Packing a tensor: the same bits back, the promised size, and nothing believed from a stranger."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import InputError
from secateur.core.mask import pack_bits
from secateur.export import packing
from secateur.export.packing import Packed, kept_count, pack, unpack

WORDS = {
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float64: torch.int64,
}
SIGNED = {torch.int16: (-(2**15), 2**15 - 1), torch.int32: (-(2**31), 2**31 - 1), torch.int64: (-(2**63), 2**63 - 1)}


@st.composite
def tensors(draw):
    """Any bits at all: NaN payloads, infinities, denormals, both zeros."""
    dtype = draw(st.sampled_from(list(WORDS)))
    shape = draw(st.lists(st.integers(1, 11), min_size=2, max_size=3))
    low, high = SIGNED[WORDS[dtype]]
    size = torch.Size(shape).numel()
    bits = draw(st.lists(st.one_of(st.just(0), st.just(low), st.integers(low, high)), min_size=size, max_size=size))
    return torch.tensor(bits, dtype=WORDS[dtype]).view(dtype).reshape(shape)


def same_bits(left, right):
    word = WORDS[left.dtype]
    return left.dtype == right.dtype and torch.equal(left.contiguous().view(word), right.contiguous().view(word))


@given(tensor=tensors(), chunk=st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_every_bit_comes_back_whatever_the_chunks(tensor, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHUNK", chunk)
        packed = pack(tensor)
        assert same_bits(unpack(packed), tensor)
        assert kept_count(tensor) == len(packed.values)


@given(tensor=tensors())
@settings(max_examples=30, deadline=None)
def test_the_values_are_the_non_zero_bits_in_row_order_and_the_mask_is_that_of_the_project(tensor):
    kept = tensor.view(WORDS[tensor.dtype]) != 0
    packed = pack(tensor)
    assert same_bits(packed.values, tensor[kept])
    assert torch.equal(packed.bits, pack_bits(kept.reshape(-1, tensor.shape[-1])))


def test_a_negative_zero_is_kept_and_a_positive_one_is_not():
    packed = pack(torch.tensor([[0.0, -0.0, 1.0]]))
    assert packed.bits.tolist() == [[0b110]]
    assert packed.values.signbit().tolist() == [True, False]


@pytest.mark.parametrize("turn", [lambda weight: weight.T, lambda weight: weight[:, ::2], lambda weight: weight[3:]])
def test_views_pack_like_their_copies(turn):
    weight = turn(torch.randn(16, 24, generator=torch.Generator().manual_seed(0)).relu())
    assert same_bits(unpack(pack(weight)), weight.contiguous())


def test_half_of_a_bfloat16_matrix_takes_nine_sixteenths():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator).to(torch.bfloat16)
    weight[:, torch.randperm(512, generator=generator)[:256]] = 0
    packed = pack(weight)
    assert packed.values.nbytes + packed.bits.nbytes == weight.nbytes * 9 // 16


MATRIX = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
GOOD = pack(MATRIX)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (GOOD._replace(values=GOOD.values[:-1]), r"`w` keeps more than the 2 values"),
        (GOOD._replace(values=torch.ones(4)), r"`w` keeps 3 values, but 4 are stored"),
        (GOOD._replace(bits=GOOD.bits ^ 8), r"`w` keeps columns after the last, which is 2"),
        (GOOD._replace(bits=GOOD.bits[:1]), r"the bit mask of `w` is torch.uint8 \[1, 1\].*\[2, 1\]"),
        (GOOD._replace(bits=GOOD.bits.to(torch.int16)), r"the bit mask of `w` is torch.int16"),
        (GOOD._replace(values=GOOD.values.reshape(1, -1)), r"the kept values of `w`"),
        (GOOD._replace(shape=(2, 30)), r"the shape \[2, 30\] needs torch.uint8 \[2, 4\]"),
        (GOOD._replace(shape=(6,)), r"`w` is packed with the shape \[6\], which is no matrix"),
        (GOOD._replace(shape=(2**60, 0)), r"which is no matrix"),
        (GOOD._replace(shape=(-2, -3)), r"which is no matrix"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused_by_name(bad, message):
    with pytest.raises(InputError, match=message):
        unpack(bad, "w")
    assert torch.equal(unpack(Packed(*GOOD), "w"), MATRIX)
