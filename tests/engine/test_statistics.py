from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from secateur.core.errors import InputError
from secateur.engine.statistics import STATISTICS, LayerStats

WIDTHS = st.integers(1, 40)
TOKENS = st.integers(1, 30)
SEEDS = st.integers(0, 2**16)


def tokens(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) + 0.3


def collect(width: int, *batches: tuple[Tensor, Tensor | None, Tensor | None]) -> LayerStats:
    stats = LayerStats(width, STATISTICS)
    for sparse, dense, keep in batches:
        stats.update(sparse, dense, keep)
    return stats


def assert_same(left: LayerStats, right: LayerStats) -> None:
    assert left.count == right.count
    for name in STATISTICS:
        torch.testing.assert_close(getattr(left, name), getattr(right, name), rtol=1e-5, atol=1e-5)


@given(count=TOKENS, width=WIDTHS, seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_means_equal_their_definition_in_float64(count, width, seed):
    x, dense = tokens(count, width, seed), tokens(count, width, seed + 1)
    stats = collect(width, (x, dense, None))
    x64, dense64 = x.double(), dense.double()
    expected = {
        "diag": x64.square().mean(0),
        "mean": x64.mean(0),
        "gram": x64.T @ x64 / count,
        "cross": dense64.T @ x64 / count,
    }
    for name, value in expected.items():
        result = getattr(stats, name)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), value, rtol=1e-5, atol=1e-5)


@given(count=TOKENS, width=WIDTHS, cut=st.integers(0, 30), seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_the_split_into_batches_does_not_matter(count, width, cut, seed):
    x, dense = tokens(count, width, seed), tokens(count, width, seed + 1)
    whole = collect(width, (x, dense, None))
    parts = collect(width, (x[:cut], dense[:cut], None), (x[cut:], dense[cut:], None))
    assert_same(whole, parts)


@given(count=TOKENS, width=WIDTHS, cut=st.integers(0, 30), seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_merged_shards_equal_one_pass(count, width, cut, seed):
    x, dense = tokens(count, width, seed), tokens(count, width, seed + 1)
    left, right = collect(width, (x[:cut], dense[:cut], None)), collect(width, (x[cut:], dense[cut:], None))
    left.merge(right)
    assert_same(left, collect(width, (x, dense, None)))


@given(count=TOKENS, width=WIDTHS, seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_padding_counts_for_nothing_whatever_it_holds(count, width, seed):
    x, dense = tokens(count, width, seed), tokens(count, width, seed + 1)
    keep = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.6
    only_real = collect(width, (x[keep], dense[keep], None))
    x[~keep], dense[~keep] = float("nan"), float("inf")
    assert_same(only_real, collect(width, (x, dense, keep)))


def test_leading_dimensions_are_tokens():
    x = tokens(12, 8, 0)
    keep = torch.arange(12) % 4 != 3
    assert_same(collect(8, (x, x, keep)), collect(8, (x.reshape(3, 4, 8), x.reshape(3, 4, 8), keep.reshape(3, 4))))


@pytest.mark.parametrize("width", [1, 7, 8, 9, 65])
def test_gram_is_exactly_symmetric(width):
    stats = LayerStats(width, {"gram"})
    stats.update(tokens(50, width, 3))
    assert stats.gram is not None
    assert torch.equal(stats.gram, stats.gram.T)
    assert torch.equal(stats.gram.diagonal(), stats.diag)


def test_equal_paths_have_a_cross_gram_equal_to_the_gram():
    x = tokens(64, 16, 1)
    stats = collect(16, (x, x, None))
    torch.testing.assert_close(stats.cross, stats.gram)


def test_long_batches_are_cut_without_a_difference():
    x = tokens(2500, 5, 2)
    assert_same(collect(5, (x, x, None)), collect(5, *[(row, row, None) for row in x.split(7)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    x = (tokens(3000, 4, 4) * 100).to(dtype)
    stats = LayerStats(4, {"gram", "mean"})
    stats.update(x)
    torch.testing.assert_close(stats.gram.double(), x.double().T @ x.double() / 3000, rtol=1e-5, atol=1e-3)


def test_only_what_is_asked_for_is_kept():
    diag = LayerStats(100, {"diag"})
    diag.update(tokens(3, 100, 0))
    assert diag.gram is None
    assert diag.mean is None
    assert diag.cross is None
    assert diag.nbytes() == 4 * 100
    gram = LayerStats(100, {"gram", "diag"})
    assert gram.nbytes() == 4 * 100 * 100


def test_diag_alone_equals_the_diagonal_of_the_gram():
    x = tokens(700, 9, 5)
    alone, gram = LayerStats(9, {"diag"}), LayerStats(9, {"gram"})
    alone.update(x)
    gram.update(x)
    torch.testing.assert_close(alone.diag, gram.diag, rtol=1e-6, atol=0)


def test_an_expert_without_tokens_gives_zeros():
    stats = LayerStats(6, STATISTICS)
    stats.update(torch.empty(0, 6), torch.empty(0, 6))
    assert stats.count == 0
    for name in STATISTICS:
        assert not getattr(stats, name).any()


def test_inputs_and_other_shards_are_left_alone():
    x = tokens(10, 6, 0)
    copy = x.clone()
    left, right = LayerStats(6, {"gram"}), LayerStats(6, {"gram"})
    left.update(x)
    right.update(x)
    before = right.gram
    left.merge(right)
    left.update(x)
    assert torch.equal(x, copy)
    assert torch.equal(right.gram, before)


def test_no_graph_is_kept():
    stats = LayerStats(4, STATISTICS)
    x = tokens(5, 4, 0).requires_grad_()
    stats.update(x, x)
    assert not stats.gram.requires_grad
    assert not stats.cross.requires_grad


def test_the_triangle_costs_nine_sixteenths_of_the_full_product():
    stats = LayerStats(64, {"gram"})

    def flops(total_shape: tuple[int, int], left: tuple[int, int], right: tuple[int, int], **_: object) -> int:
        return 2 * left[0] * left[1] * right[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: flops}) as counter:
        stats.update(tokens(100, 64, 0))
    assert counter.get_total_flops() == 2 * 100 * 64 * 64 * 9 // 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 5),), "4 features"),
        ((torch.zeros(3, 4), torch.zeros(2, 4)), "dense path"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(2, dtype=torch.bool)), "per token"),
        ((torch.zeros(3, 4), torch.zeros(3, 4), torch.ones(3)), "bool"),
        ((torch.zeros(3, 4),), "dense path"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        LayerStats(4, STATISTICS).update(*arguments)


def test_unknown_statistics_and_unlike_shards_are_refused():
    with pytest.raises(InputError, match="kurtosis"):
        LayerStats(4, {"kurtosis"})
    with pytest.raises(InputError, match="cannot be added"):
        LayerStats(4, {"diag"}).merge(LayerStats(4, {"gram"}))
    with pytest.raises(InputError, match="cannot be added"):
        LayerStats(4, {"diag"}).merge(LayerStats(5, {"diag"}))
