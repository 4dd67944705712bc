from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.core import select
from secateur.core.select import CHUNK, WORDS, cut_, top_of_groups, top_of_lanes, top_of_matrix, top_of_rows
from strategies import random_weight, seeds

quick = settings(max_examples=40, deadline=None)


def scores(rows: int, columns: int, seed: int, ties: bool) -> Tensor:
    score = random_weight(rows, columns, seed)
    return score.round() if ties else score


def oracle(score: Tensor, keep: int | list[int]) -> Tensor:
    """Rank by score, then by index, one row at a time, in plain Python."""
    mask = torch.zeros(score.shape, dtype=torch.bool)
    for row, values in enumerate(score.tolist()):
        count = keep if isinstance(keep, int) else keep[row]
        ranked = sorted(range(len(values)), key=lambda j, values=values: (-values[j], j))
        mask[row, ranked[: max(count, 0)]] = True
    return mask


@given(rows=st.integers(1, 6), columns=st.integers(1, 20), keep=st.integers(0, 20), seed=seeds, ties=st.booleans())
@quick
def test_rows_keep_the_largest_and_the_lower_index_of_equals(rows, columns, keep, seed, ties):
    keep = min(keep, columns)
    score = scores(rows, columns, seed, ties)
    assert torch.equal(top_of_rows(score, keep), oracle(score, keep))


@given(rows=st.integers(1, 6), columns=st.integers(1, 20), seed=seeds, ties=st.booleans())
@quick
def test_every_row_may_have_its_own_count(rows, columns, seed, ties):
    score = scores(rows, columns, seed, ties)
    keep = torch.randint(columns + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(top_of_rows(score, keep), oracle(score, keep.tolist()))


@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 5),
    width=st.integers(1, 20),
    n=st.integers(0, 20),
    seed=seeds,
    ties=st.booleans(),
)
@quick
def test_groups_keep_exactly_n_of_every_m(rows, groups, width, n, seed, ties):
    n = min(n, width)
    score = scores(rows, width * groups, seed, ties)
    expected = oracle(score.reshape(-1, width), n)
    assert torch.equal(top_of_groups(score, n, width), expected.reshape(score.shape))
    assert torch.equal(top_of_lanes(score.reshape(-1, width).T.contiguous(), n).T, expected)


@given(rows=st.integers(1, 6), columns=st.integers(1, 12), share=st.floats(0, 1), seed=seeds, ties=st.booleans())
@quick
def test_a_matrix_is_one_long_row(rows, columns, share, seed, ties):
    score, keep = scores(rows, columns, seed, ties), round(share * rows * columns)
    assert torch.equal(top_of_matrix(score, keep), oracle(score.reshape(1, -1), keep).reshape(rows, columns))


@pytest.mark.parametrize("width", sorted(WORDS))
def test_groups_beyond_one_chunk_are_ranked_alike(width):
    score = random_weight(3, CHUNK // 2, seed=1).round()
    last = score[:, -8 * width :].contiguous()
    assert torch.equal(top_of_groups(score, 1, width)[:, -8 * width :], top_of_groups(last, 1, width))
    assert (top_of_groups(score, 1, width).reshape(-1, width).sum(1) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_equal_values_does_not_matter(dtype):
    score = random_weight(8, 32, seed=2).to(dtype)
    wide = score.double()
    assert torch.equal(top_of_rows(score, 10), top_of_rows(wide, 10))
    assert torch.equal(top_of_groups(score, 2, 4), top_of_groups(wide, 2, 4))


@pytest.mark.parametrize("ties", [False, True])
def test_other_devices_select_alike(monkeypatch, ties):
    score = scores(6, 48, 5, ties)
    jobs = [
        lambda: top_of_rows(score, 20),
        lambda: top_of_matrix(score, 100),
        lambda: top_of_groups(score, 2, 4),
        lambda: top_of_groups(score, 3, 6),
        lambda: top_of_groups(score, 11, 24),
        lambda: top_of_lanes(score, 2),
    ]
    expected = [job() for job in jobs]
    monkeypatch.setattr(select, "_by_numpy", lambda tensor: False)
    for job, mask in zip(jobs, expected, strict=True):
        assert torch.equal(job(), mask)


def test_infinities_are_ordinary_scores():
    score = torch.tensor([[1.0, float("inf"), float("-inf"), 2.0, float("-inf"), float("inf")]])
    assert top_of_rows(score, 2)[0].tolist() == [False, True, False, False, False, True]
    assert top_of_rows(score, 5)[0].tolist() == [True, True, True, True, False, True]
    assert top_of_groups(score, 1, 2)[0].tolist() == [False, True, False, True, False, True]


def test_negative_zero_equals_zero():
    assert top_of_rows(torch.tensor([[-0.0, 0.0, -0.0]]), 1)[0].tolist() == [True, False, False]


def test_views_are_read_as_they_look():
    score = random_weight(12, 8, seed=3)
    assert torch.equal(top_of_rows(score.T, 5), oracle(score.T.contiguous(), 5))
    assert torch.equal(top_of_groups(score.T, 1, 4), top_of_groups(score.T.contiguous(), 1, 4))
    assert torch.equal(top_of_matrix(score[:, ::2], 7), top_of_matrix(score[:, ::2].contiguous(), 7))


def test_an_empty_matrix_has_an_empty_mask():
    assert top_of_groups(torch.empty(0, 8), 2, 4).shape == (0, 8)
    assert top_of_rows(torch.empty(0, 8), 2).shape == (0, 8)
    assert top_of_matrix(torch.empty(0, 8), 0).shape == (0, 8)


def test_nothing_is_written_to_the_score():
    score = random_weight(4, 16, seed=4)
    copy = score.clone()
    top_of_rows(score, 3)
    top_of_groups(score, 2, 8)
    top_of_groups(score, 2, 16)
    assert torch.equal(score, copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_cut_keeps_what_the_mask_keeps_and_may_write_over_its_values(dtype):
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = values > 0
    wanted = values.clone().masked_fill_(~mask, 0.0)
    assert torch.equal(cut_(values, mask, out=torch.full_like(values, 7.0)), wanted)
    assert cut_(values, mask, out=values) is values
    assert torch.equal(values, wanted)
