"""Instruction data: what is read from which record, and what is said about records that cannot be used."""

from __future__ import annotations

import json

import pytest

from secateur.core.errors import InputError, RecipeError
from secateur.data.instructions import load_examples

ASKED = [{"role": "user", "content": "two and two?"}]
ANSWER = [{"role": "assistant", "content": "four"}]


def write(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "two and two?", "response": "four"},
        {"instruction": "two and two?", "input": "", "output": "four"},
        {"prompt": "two and two?", "completion": "four"},
        {"question": "two and two?", "answer": "four", "source": "x"},
        {"messages": [*ASKED, *ANSWER]},
        {"conversations": [{"from": "human", "value": "two and two?"}, {"from": "gpt", "value": "four"}]},
        {"prompt": ASKED, "completion": ANSWER},
    ],
    ids=lambda record: "-".join(record),
)
def test_the_usual_records_give_the_same_example(tmp_path, record):
    found = load_examples(write(tmp_path / "a.jsonl", record))
    assert found.rows == ({"prompt": ASKED, "completion": ANSWER},)
    assert found.answers


def test_an_input_follows_its_instruction_and_a_system_text_comes_first(tmp_path):
    record = {"system": "Be short.", "instruction": "Add.", "input": "2 2", "output": "4"}
    (row,) = load_examples(write(tmp_path / "a.jsonl", record)).rows
    assert row["prompt"] == [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Add.\n\n2 2"}]


def test_each_answer_of_a_conversation_is_an_example_with_all_that_was_said_before(tmp_path):
    said = [*ASKED, *ANSWER, {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes"}]
    rows = load_examples(write(tmp_path / "a.jsonl", {"messages": said})).rows
    assert [len(row["prompt"]) for row in rows] == [1, 3]
    assert rows[1] == {"prompt": said[:3], "completion": said[3:]}


def test_named_fields_are_taken(tmp_path):
    path = write(tmp_path / "a.jsonl", {"q": "two and two?", "a": "four", "text": "not this"})
    found = load_examples(path, instruction_field="q", response_field="a")
    assert found.rows == ({"prompt": ASKED, "completion": ANSWER},)


def test_one_named_field_alone_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="belong together"):
        load_examples(write(tmp_path / "a.jsonl", {"q": "x"}), instruction_field="q")


def test_text_is_taken_whole(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert load_examples(tmp_path / "a.txt").rows == ({"text": "one\ntwo\n"},)
    assert load_examples(write(tmp_path / "b.jsonl", {"body": "one"}), field="body").rows == ({"text": "one"},)


def test_parquet_and_records_in_memory_read_alike(tmp_path):
    import pyarrow
    import pyarrow.parquet

    records = [{"instruction": "two and two?", "response": "four"}, {"instruction": "more?", "response": "no"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    stored, given = load_examples(tmp_path / "a.parquet"), load_examples(records)
    assert stored.rows == given.rows == load_examples(write(tmp_path / "a.jsonl", *records)).rows
    assert stored.digest == given.digest


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"instruction": "a"}, "line 2: no field `response`"),
        ({"instruction": "a", "response": ""}, "line 2: field `response` is empty"),
        ({"instruction": "a", "response": 4}, "line 2: field `response` holds a int"),
        ({"instruction": None, "response": "b"}, "line 2: field `instruction` holds a NoneType"),
        (["a", "b"], "line 2: holds a list"),
    ],
)
def test_a_record_that_cannot_be_used_is_told_by_its_line(tmp_path, record, said):
    path = write(tmp_path / "a.jsonl", {"instruction": "x", "response": "y"}, record)
    with pytest.raises(InputError) as caught:
        load_examples(path)
    assert said in str(caught.value)
    kept = load_examples(path, skip_bad=1)
    assert len(kept.rows) == 1
    assert len(kept.notes) == 1


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "is empty"),
        ("hello", "holds a str"),
        ([{"role": "user", "content": "a"}], "no message of the role `assistant`"),
        ([{"role": "wizard", "content": "a"}, *ANSWER], "message 1 of `messages` has the role `wizard`"),
        ([*ASKED, {"role": "assistant", "content": None}], "message 2 of `messages` has no text"),
        ([*ASKED, "four"], "message 2 of `messages` is a str"),
    ],
)
def test_a_conversation_that_cannot_be_used_says_which_message(tmp_path, messages, said):
    with pytest.raises(InputError) as caught:
        load_examples(write(tmp_path / "a.jsonl", {"messages": messages}))
    assert "line 1" in str(caught.value)
    assert said in str(caught.value)


def test_a_line_that_is_no_json_is_told_by_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "response": "b"}\n{"instruction": \n', encoding="utf-8")
    with pytest.raises(InputError, match="line 2: no JSON"):
        load_examples(tmp_path / "a.jsonl")


def test_a_record_that_has_a_key_twice_is_bad(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a", "response": "b"}\n{"instruction": "a", "response": "b", "response": "c"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl` has malformed lines .*line 2: the key `response` is there twice"):
        load_examples(path)
    assert len(load_examples(path, skip_bad=1).rows) == 1


def test_unknown_fields_are_named(tmp_path):
    with pytest.raises(InputError, match="only `foo`, `bar`"):
        load_examples(write(tmp_path / "a.jsonl", {"foo": "a", "bar": "b"}))


def test_the_first_good_record_decides_the_kind_of_all(tmp_path):
    with pytest.raises(InputError, match="line 2: no field `instruction`"):
        load_examples(write(tmp_path / "a.jsonl", {"instruction": "a", "response": "b"}, {"text": "plain"}))


def test_empty_and_missing_data_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n", encoding="utf-8")
    with pytest.raises(InputError, match="no example"):
        load_examples(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="does not exist"):
        load_examples(tmp_path / "b.jsonl")
    with pytest.raises(InputError, match="no file and no known name"):
        load_examples("nothing")


def test_reading_stops_at_the_limit_with_a_note(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"instruction": str(i), "response": "x"} for i in range(5)])
    found = load_examples(path, limit=3)
    assert len(found.rows) == 3
    assert "only the first 3 records" in found.notes[0]


def test_the_builtin_set_has_two_parts_without_a_common_answer():
    learned, held_out = (
        load_examples("builtin:tiny-instructions", role=role) for role in ("calibration", "evaluation")
    )
    answers = [{row["completion"][0]["content"] for row in part.rows} for part in (learned, held_out)]
    assert len(learned.rows) > len(held_out.rows) > 10
    assert not answers[0] & answers[1]
    assert load_examples("builtin:tiny-instructions-evaluation").digest == held_out.digest


def test_a_builtin_text_can_be_learned_as_text():
    assert "text" in load_examples("builtin:tiny").rows[0]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"instruction": "a", "response": "\0"}, "NUL"),
        ({"instruction": "a", "input": 3, "response": "b"}, "`input` holds a int"),
        ({"instruction": "a", "system": ["x"], "response": "b"}, "`system` holds a list"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", "content": "b"}]}, "assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "more than text"),
    ],
)
def test_what_would_be_left_out_unseen_is_refused(record, said):
    with pytest.raises(InputError, match=said):
        load_examples([record])


def test_a_completion_of_several_turns_is_an_example_for_each_answer():
    said = [{"role": role, "content": role[0] + str(place)} for place, role in enumerate(["user", "assistant"] * 2)]
    assert (
        load_examples([{"prompt": said[:1], "completion": said[1:]}]).rows == load_examples([{"messages": said}]).rows
    )


def test_content_in_parts_of_text_is_one_text():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]}
    assert load_examples([record]).rows[0]["prompt"][0]["content"] == "one\ntwo"
