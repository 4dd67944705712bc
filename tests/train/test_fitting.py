"""Examples in the words of a tokenizer and within a length: headings, templates, and what is counted as cut."""

from __future__ import annotations

from itertools import chain

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

import secateur
from conftest import TINY_TRAINED
from secateur.core.errors import InputError
from secateur.data.instructions import load_examples
from secateur.train.fitting import check_tokenizer, data_set, fit, notes_on_length, pieces, written

TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Which tree?"},
    {"role": "assistant", "content": "An oak."},
    {"role": "tool", "content": "42"},
    {"role": "user", "content": "How old?"},
    {"role": "assistant", "content": "Forty-two."},
]
ROWS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=8)  # prompt and answer, in tokens


@pytest.fixture
def words():
    return secateur.load(str(TINY_TRAINED)).tokenizer


def tokens(sizes):
    rows = {"input_ids": [[1] * (ask + answer) for ask, answer in sizes]}
    return rows | {"labels": [[-100] * ask + [1] * answer for ask, answer in sizes]}


def test_every_turn_of_a_conversation_says_who_speaks():
    assert written(TALK[:-1]) == (
        "### System:\nBe short.\n\n### Instruction:\nWhich tree?\n\n### Response:\nAn oak.\n\n### Tool:\n42\n\n"
        "### Instruction:\nHow old?\n\n### Response:\n"
    )


def test_one_question_is_written_as_an_instruction(words):
    words.chat_template = None
    (row,) = data_set(load_examples([{"instruction": "Which tree?", "response": "An oak."}]), words)
    assert row == {"prompt": "### Instruction:\nWhich tree?\n\n### Response:\n", "completion": "An oak."}


def test_answers_of_one_conversation_share_a_beginning(words):
    words.chat_template = None
    first, second = data_set(load_examples([{"messages": TALK}]), words)
    assert second["prompt"].startswith(f"{first['prompt']}{first['completion']}\n\n")


@pytest.mark.parametrize("template", ["Hello", "{% for m in messages %}{{ m['role'] }}{% endfor %}"])
def test_a_template_that_ignores_what_is_said_is_an_error_that_says_so(words, template):
    words.chat_template = template
    with pytest.raises(InputError, match="the same text whatever the answer is") as caught:
        check_tokenizer(words, [load_examples([{"messages": TALK}])])
    assert "template" in caught.value.hint
    check_tokenizer(words, [load_examples([{"text": "plain text needs no template"}])])


def test_a_template_that_trims_what_is_said_is_none_that_ignores_it(words):
    words.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
    check_tokenizer(words, [load_examples([{"messages": TALK}])])


@given(sizes=ROWS, length=st.integers(1, 8))
def test_no_row_and_no_token_is_lost_without_being_counted(sizes, length):
    rows, found = fit(datasets.Dataset.from_dict(tokens(sizes)), length)
    learns = [ask + answer for ask, answer in sizes if max(ask, 1) < min(ask + answer, length)]
    assert len(rows) == found.kept == len(learns)
    assert found.dropped == len(sizes) - len(learns)
    assert found.cut == sum(total > length for total in learns)
    assert found.cut_tokens == sum(max(total - length, 0) for total in learns)


def test_a_text_of_one_token_has_nothing_to_learn():
    rows, found = fit(datasets.Dataset.from_dict(tokens([(0, 1), (0, 2)])), 8)
    assert (len(rows), found.dropped) == (1, 1)


@given(sizes=ROWS, length=st.integers(1, 8))
def test_pieces_hold_every_token_once_and_none_is_too_long(sizes, length):
    rows = tokens(sizes)
    found = pieces(rows, length)
    assert all(0 < len(piece) <= length for piece in found["input_ids"])
    for name in rows:
        assert list(chain(*found[name])) == list(chain(*rows[name]))


def test_what_was_left_out_is_said_and_nothing_left_is_an_error():
    data = load_examples([{"instruction": "Which tree?", "response": "An oak."}] * 2)
    _, found = fit(datasets.Dataset.from_dict(tokens([(9, 2), (2, 9)])), 8)
    dropped, cut = notes_on_length(found, data, 8)
    assert dropped.startswith("1 of 2 examples have no token to learn within 8 tokens")
    assert "3 tokens at their ends were left out" in cut
    _, nothing = fit(datasets.Dataset.from_dict(tokens([(9, 2), (9, 9)])), 8)
    with pytest.raises(InputError, match="no example") as caught:
        notes_on_length(nothing, data, 8)
    assert caught.value.hint == "raise `length`"
