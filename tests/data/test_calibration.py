from __future__ import annotations

import random

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import InputError, RecipeError
from secateur.data.calibration import from_ids, from_texts, sample
from secateur.data.text import Text


class Numbers:
    """A tokenizer whose tokens are the numbers written in the text; two newlines are token 0."""

    def __init__(self):
        self.calls = 0

    def __call__(self, text, *, add_special_tokens, verbose):
        self.calls += 1
        return {"input_ids": [int(word) for word in text.replace("\n\n", " 0 ").split()]}


def numbers(count, start=1):
    return " ".join(str(k) for k in range(start, start + count))


# Crops of a text


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 20))
def test_crops_follow_the_published_protocol(seed, samples, length):
    text = Text((numbers(60), numbers(90, start=100)), "numbers")
    whole = [*range(1, 61), 0, *range(100, 190)]
    tokenizer = Numbers()
    found = sample(text, tokenizer, samples=samples, length=length, seed=seed)
    draw = random.Random(seed)
    expected = []
    for _ in range(samples):
        start = draw.randint(0, len(whole) - length - 1)
        expected.append(whole[start : start + length])
    assert found.ids.tolist() == expected
    assert found.ids.dtype is torch.int64
    assert tokenizer.calls == 1
    assert (found.samples, found.length, found.tokens) == (samples, length, samples * length)


def test_sampling_leaves_the_global_generators_alone():
    random.seed(3)
    before = random.getstate(), torch.get_rng_state()
    sample(numbers(50), Numbers(), samples=3, length=5, seed=0)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_same_seed_same_digest_other_seed_other_digest():
    digests = [sample(numbers(500), Numbers(), samples=4, length=9, seed=seed).digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(("tokens", "samples", "length"), [(39, 4, 10), (10, 1, 10), (1, 1, 1), (5, 1, 8)])
def test_too_short_text_is_refused_with_asked_and_found(tokens, samples, length):
    asked = max(samples * length, length + 1)
    with pytest.raises(InputError, match=rf"asked {asked} .*found {tokens}$"):
        sample(numbers(tokens), Numbers(), samples=samples, length=length, seed=0)


def test_shortest_sufficient_text_is_taken():
    assert sample(numbers(11), Numbers(), samples=1, length=10, seed=0).ids.tolist() == [list(range(1, 11))]
    assert sample(numbers(40), Numbers(), samples=4, length=10, seed=0).samples == 4


def test_token_outside_the_vocabulary_is_refused_with_both_numbers():
    with pytest.raises(InputError, match=r"largest token id is 50, .* has 50 rows"):
        sample(numbers(50), Numbers(), samples=1, length=5, seed=0, vocabulary=50)
    assert sample(numbers(50), Numbers(), samples=1, length=5, seed=0, vocabulary=51).length == 5


def test_length_beyond_the_models_positions_is_refused_or_cut_when_asked():
    with pytest.raises(InputError, match="length is 8 tokens, but the model takes at most 5") as caught:
        sample(numbers(50), Numbers(), samples=2, length=8, seed=0, max_positions=5)
    assert "5" in caught.value.hint
    cut = sample(numbers(50), Numbers(), samples=2, length=8, seed=0, max_positions=5, truncate=True)
    assert cut.length == 5
    assert "cut from 8 tokens to the 5" in cut.notes[0]


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"length": 0}, {"samples": -1}])
def test_counts_below_one_are_refused(wrong):
    with pytest.raises(RecipeError, match="must be 1 or more"):
        sample(numbers(50), Numbers(), **{"samples": 2, "length": 5, "seed": 0, **wrong})


def test_notes_of_the_text_go_with_its_samples():
    text = Text((numbers(50),), "x", ("something was put right",))
    assert sample(text, Numbers(), samples=1, length=5, seed=0).notes == ("something was put right",)


def test_repeated_samples_and_repeated_tokens_are_told():
    found = sample("7 " * 50, Numbers(), samples=3, length=5, seed=0)
    assert "2 of 3 samples repeat another sample" in found.notes[0]
    assert "3 of 3 samples are one repeated token" in found.notes[1]
    assert sample(numbers(500), Numbers(), samples=3, length=5, seed=0).notes == ()


# Texts


def test_texts_become_rows_with_their_padding_excluded():
    found = from_texts(["5 6 7", "8", "1 2 3 4 5 6"], Numbers(), length=4)
    assert found.ids.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [1, 2, 3, 4]]
    assert found.keep.tolist() == [[True, True, True, False], [True, False, False, False], [True] * 4]
    assert found.tokens == 8
    assert "2 of 3 are shorter than 4 tokens and padded" in found.notes[0]


def test_texts_of_one_length_need_no_padding():
    found = from_texts(["5 6", "7 8"], Numbers(), length=2048, max_positions=16)
    assert found.keep is None
    assert found.ids.tolist() == [[5, 6], [7, 8]]


def test_fewer_texts_than_asked_and_empty_texts_are_told():
    found = from_texts(["5 6", " ", "7 8"], Numbers(), samples=8, length=2)
    assert found.samples == 2
    assert "1 of 3 are empty" in found.notes[0]
    assert "8 samples asked, 2 found" in found.notes[1]


def test_more_texts_than_asked_are_chosen_by_the_seed():
    texts = [f"{k} {k + 1}" for k in range(1, 30)]
    chosen = [from_texts(texts, Numbers(), samples=5, length=2, seed=seed).ids[:, 0].tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] == sorted(chosen[0])


@pytest.mark.parametrize("texts", [[], [""], [" ", "\n"], "one string", ["5", 6]])
def test_texts_without_tokens_or_of_another_type_are_refused(texts):
    with pytest.raises((InputError, RecipeError)):
        from_texts(texts, Numbers(), length=4)


def test_texts_longer_than_the_model_are_refused_or_cut():
    with pytest.raises(InputError, match="takes at most 3"):
        from_texts([numbers(5)], Numbers(), length=10, max_positions=3)
    assert from_texts([numbers(5)], Numbers(), length=10, max_positions=3, truncate=True).length == 3


# Token ids


@pytest.mark.parametrize("make", [torch.tensor, numpy.array, list, lambda rows: torch.tensor(rows, dtype=torch.int16)])
def test_ids_of_any_integer_type_are_taken(make):
    found = from_ids(make([[1, 2, 3], [4, 5, 6]]), vocabulary=7)
    assert found.ids.dtype is torch.int64
    assert found.ids.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert found.keep is None


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.ones(3, dtype=torch.int64), "must be .samples, length."),
        (torch.ones(0, 4, dtype=torch.int64), "must be .samples, length."),
        (torch.ones(2, 3), "must be integers"),
        (torch.ones(2, 3, dtype=torch.bool), "must be integers"),
        ([[1, 2], [3]], "rectangular"),
        ([["a"]], "rectangular"),
        ([[1, -2]], "smallest token id is -2"),
        ([[1, 9]], "largest token id is 9, .* has 9 rows"),
    ],
)
def test_ids_that_are_no_samples_are_refused(ids, message):
    with pytest.raises(InputError, match=message):
        from_ids(ids, vocabulary=9)


def test_padding_is_excluded_and_never_looked_up():
    ids = torch.tensor([[5, 6, -100], [7, -100, -100]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = from_ids(ids, mask, vocabulary=8)
    assert found.keep.dtype is torch.bool
    assert found.tokens == 3
    assert found.ids.min() >= 0
    assert ids.min() == -100
    assert from_ids(ids, mask.bool(), vocabulary=8).digest == found.digest
    assert from_ids(ids.clamp(min=0), vocabulary=8).digest != found.digest


def test_mask_of_ones_is_no_mask():
    assert from_ids([[1, 2]], [[1, 1]]).keep is None


@pytest.mark.parametrize(
    ("keep", "message"),
    [([[1, 1]], "shape"), ([[1, 2], [1, 1]], "only 0"), ([[1, 1], [0, 0]], "no token in sample 1")],
)
def test_wrong_masks_are_refused(keep, message):
    with pytest.raises(InputError, match=message):
        from_ids([[1, 2], [3, 4]], keep)


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.booleans())
def test_batches_hold_every_sample_once_in_order(samples, sequences, padded):
    ids = torch.arange(samples * 3).reshape(samples, 3)
    keep = (torch.arange(3) < 2).expand(samples, 3) if padded else None
    found = list(from_ids(ids, keep).batches(sequences))
    assert torch.equal(torch.cat([batch for batch, _ in found])[:, :2], ids[:, :2])
    assert all(len(batch) == sequences for batch, _ in found[:-1])
    for batch, kept in found:
        assert (kept is None) is not padded
        assert kept is None or kept.shape == batch.shape


def test_batches_of_no_sequence_are_refused():
    with pytest.raises(RecipeError, match="must have 1 or more"):
        next(from_ids([[1, 2]]).batches(0))
