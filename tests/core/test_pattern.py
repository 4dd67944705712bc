from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import NumericError, PatternError
from secateur.core.pattern import NM, Unstructured, parse_pattern, pruned_count
from strategies import patterns, random_weight, seeds, weights

quick = settings(max_examples=60, deadline=None)


@given(data=st.data(), weight=weights(), scope=st.sampled_from(["row", "layer"]))
@quick
def test_a_mask_passes_its_own_check(data, weight, scope):
    pattern = data.draw(patterns(weight.shape[1]))
    pattern.check(pattern.mask(weight.abs(), scope), scope)


@given(rows=st.integers(1, 6), groups=st.integers(1, 5), seed=seeds)
@quick
def test_nm_mask_keeps_exactly_n_of_every_m(rows, groups, seed):
    score = random_weight(rows, 4 * groups, seed)
    kept = NM(2, 4).mask(score).reshape(rows, groups, 4).sum(-1)
    assert (kept == 2).all()


@given(sparsity=st.integers(0, 100), rows=st.integers(1, 6), columns=st.integers(1, 20), seed=seeds)
@quick
def test_budgets_are_exact_even_with_ties(sparsity, rows, columns, seed):
    score = random_weight(rows, columns, seed).round()
    row = Unstructured(sparsity / 100, "row").mask(score)
    assert (row.sum(1) == columns - sparsity * columns // 100).all()
    layer = Unstructured(sparsity / 100, "layer").mask(score)
    assert int(layer.sum()) == rows * columns - sparsity * rows * columns // 100


@given(first=st.floats(0, 1), second=st.floats(0, 1), weight=weights(), scope=st.sampled_from(["row", "layer"]))
@quick
def test_nested_sparsities_give_nested_masks(first, second, weight, scope):
    dense, sparse = sorted((first, second))
    wide, narrow = Unstructured(dense, scope).mask(weight.abs()), Unstructured(sparse, scope).mask(weight.abs())
    assert not (narrow & ~wide).any()


@pytest.mark.parametrize("size", [1, 100, 1000, 576 * 1536])
def test_decimal_fractions_are_counted_as_they_are_written(size):
    for percent in range(101):
        assert pruned_count(percent / 100, size) == percent * size // 100


def test_kept_entries_are_never_smaller_than_pruned_ones():
    score = random_weight(8, 40, seed=1).abs()
    mask = Unstructured(0.6, "layer").mask(score)
    assert score[mask].min() >= score[~mask].max()


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("70%", Unstructured(0.7)),
        ("0.7", Unstructured(0.7)),
        (0.7, Unstructured(0.7)),
        (0, Unstructured(0.0)),
        (1, Unstructured(1.0)),
        (" 62.5 % row ", Unstructured(0.625, "row")),
        ("70% LAYER", Unstructured(0.7, "layer")),
        ("50% model", Unstructured(0.5, "model")),
        ("2:4", NM(2, 4)),
        (" 4 : 8 ", NM(4, 8)),
        ("1e-1", Unstructured(0.1)),
        (NM(1, 2), NM(1, 2)),
    ],
)
def test_patterns_are_read_from_text(text, pattern):
    assert parse_pattern(text) == pattern


@given(
    pattern=patterns(24)
    | st.builds(Unstructured, st.floats(0, 1).map(lambda p: round(p, 6)), st.sampled_from([None, "row", "model"]))
)
@quick
def test_text_and_pattern_are_inverse(pattern):
    again = parse_pattern(str(pattern))
    assert type(again) is type(pattern)
    assert math.isclose(again.sparsity, pattern.sparsity, abs_tol=1e-12)
    assert str(again) == str(pattern)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "70",
        "170%",
        "-1%",
        "nan",
        "inf",
        "-inf%",
        "0.5.5",
        "3:2",
        "-1:4",
        "1:0",
        "2:4:8",
        "70% column",
        True,
        None,
        [2, 4],
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(PatternError):
        parse_pattern(text)


@pytest.mark.parametrize(("n", "m"), [(3, 2), (-1, 4), (0, 0)])
def test_impossible_groups_are_refused(n, m):
    with pytest.raises(PatternError, match="must keep N of M"):
        NM(n, m)


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan, math.inf])
def test_sparsities_outside_zero_to_one_are_refused(sparsity):
    with pytest.raises(PatternError, match="between 0 and 1"):
        Unstructured(sparsity)


def test_an_unknown_scope_is_refused():
    with pytest.raises(PatternError, match="scope `column`"):
        Unstructured(0.5, "column")


def test_a_width_that_groups_do_not_divide_is_refused_by_name():
    with pytest.raises(PatternError, match=r"needs in_features divisible by 4, `mlp.down` has 10"):
        NM(2, 4).fit(3, 10, "mlp.down")
    with pytest.raises(PatternError, match="divisible"):
        NM(2, 4).mask(torch.ones(3, 10))


def test_a_model_budget_must_be_divided_first():
    with pytest.raises(PatternError, match="whole model"):
        Unstructured(0.5, "model").mask(torch.ones(2, 2))


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5, "row"), Unstructured(0.5, "layer")])
def test_nan_scores_are_refused(pattern):
    score = torch.ones(2, 4)
    score[1, 2] = math.nan
    with pytest.raises(NumericError, match="NaN"):
        pattern.mask(score)


def test_opposite_infinities_are_no_nan():
    score = torch.tensor([[math.inf, -math.inf, 1.0, 2.0]])
    assert Unstructured(0.5, "row").mask(score)[0].tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("pattern", "mask"),
    [
        (NM(2, 4), [[1, 1, 1, 0], [1, 1, 0, 0]]),
        (Unstructured(0.5, "row"), [[1, 1, 1, 0], [1, 0, 0, 0]]),
        (Unstructured(0.5, "layer"), [[1, 1, 1, 1], [1, 0, 0, 0]]),
    ],
)
def test_a_broken_mask_fails_the_check(pattern, mask):
    with pytest.raises(PatternError):
        pattern.check(torch.tensor(mask, dtype=torch.bool))


def test_sparsity_and_stride_describe_a_pattern():
    assert (NM(2, 8).sparsity, NM(2, 8).stride) == (0.75, 8)
    assert (Unstructured(0.3).sparsity, Unstructured(0.3).stride) == (0.3, None)


def test_patterns_are_read_without_torch():
    code = "import sys, secateur.core.pattern as p; p.parse_pattern('2:4'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
