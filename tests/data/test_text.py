from __future__ import annotations

import random
import socket
import sys
import tracemalloc
import types
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bad import text as bad
from secateur.core.errors import InputError, RecipeError
from secateur.data.text import Text, _pieces, load_text, overlap, tokenise

WORDS = [f"word{k}" for k in range(400)]


class Letters:
    """A tokenizer with one token per character, which puts 1 before and 2 after every text."""

    def __init__(self):
        self.calls = []

    def __call__(self, text, *, add_special_tokens, verbose):
        assert verbose is False
        self.calls.append(text)
        ids = [ord(letter) for letter in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a text made a request")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def data_sets(monkeypatch):
    """A stand-in for the package `datasets` that records how it is asked; `rows` is what it answers."""
    fake = types.ModuleType("datasets")
    fake.asked, fake.rows = [], [{"text": ""}, {"text": " = Title = \n"}, {"text": " Words . \n"}]

    def load_dataset(path, config, **settings):
        fake.asked.append((path, config, settings))
        if isinstance(fake.rows, Exception):
            raise fake.rows
        return fake.rows

    fake.load_dataset = load_dataset
    fake.DownloadConfig = lambda **settings: settings
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return fake


# Plain text files


def test_txt_is_one_document_exactly_as_it_is(tmp_path):
    path = tmp_path / "a file with ünicode name.txt"
    path.write_text(" \n = Title = \n \n Some  words, \ttabs\n\n\nend\n", encoding="utf-8")
    text = load_text(str(path))
    assert text.documents == (path.read_text(encoding="utf-8"),)
    assert text.joined() == path.read_text(encoding="utf-8")
    assert text.notes == ()
    assert text.source == str(path)


def test_lines_are_joined_by_two_newlines_and_keep_their_spaces(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_bytes(b" = Title = \r\n \r\n\r\n One paragraph . \r\n Another .\r\n")
    expected = " = Title = \n\n One paragraph . \n\n Another ."
    assert load_text(path).joined(lines=True) == expected
    assert load_text(path, lines=True).joined() == expected


def test_invalid_bytes_are_replaced_and_counted(tmp_path):
    text = load_text(bad.invalid_bytes(tmp_path))
    assert text.documents == ("good \ufffd\ufffd word \ufffd \ufffd(\ufffd",)
    assert len(text.notes) == 1
    assert "4 bytes that are no UTF-8" in text.notes[0]


def test_byte_order_mark_returns_and_nul_are_handled(tmp_path):
    text = load_text(bad.mark_and_returns(tmp_path))
    assert text.documents == ("one\ntwo\nthree\n",)
    assert any("2 CRLF or CR line ends" in note for note in text.notes)
    assert any("1 NUL" in note for note in text.notes)


@settings(deadline=None)
@given(st.text(alphabet="aé𝄞\r\n\ufffd ", min_size=1), st.integers(1, 7))
def test_reading_in_pieces_changes_nothing(tmp_path_factory, content, chunk):
    path = tmp_path_factory.mktemp("pieces") / "x.txt"
    path.write_bytes(("x" + content).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.data.textfile._CHUNK", chunk)
        text = load_text(path)
    assert text.documents == (("x" + content).replace("\r\n", "\n").replace("\r", "\n"),)
    assert not any("UTF-8" in note for note in text.notes)


@pytest.mark.parametrize("make", [bad.empty, bad.blank, bad.only_nul])
def test_text_without_a_word_is_refused(tmp_path, make):
    with pytest.raises(InputError, match="is empty"):
        load_text(make(tmp_path))


@pytest.mark.parametrize(("make", "kind"), [(bad.utf16, "UTF-16"), (bad.archive, "gzip")])
def test_foreign_files_are_named(tmp_path, make, kind):
    with pytest.raises(InputError, match=kind):
        load_text(make(tmp_path))


def test_line_of_a_gigabyte_is_read_in_bounded_memory(tmp_path):
    path = bad.one_line(tmp_path, 2**30)
    tracemalloc.start()
    text = load_text(path, limit=2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(text.joined()) == 2**20
    assert peak < 16 * 2**20
    assert any("only the first 1,048,576 characters" in note for note in text.notes)


def test_reading_exactly_to_the_limit_gives_no_note(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("12345678")
    assert load_text(path, limit=8).notes == ()
    assert load_text(path, limit=7).documents == ("1234567",)


# JSON lines


def test_jsonl_takes_the_field_asked_for(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one", "body": "eins"}\n\n{"text": "two\\r\\n", "body": "zwei"}')
    assert load_text(path).documents == ("one", "two\n")
    assert load_text(path, field="body").documents == ("eins", "zwei")
    assert load_text(path, field="body").joined() == "eins\n\nzwei"


def test_every_bad_line_is_named_with_its_reason(tmp_path):
    with pytest.raises(InputError) as caught:
        load_text(bad.broken_json(tmp_path))
    message = str(caught.value)
    assert "line 2: no JSON" in message
    assert "line 4: no field `text`, only `content`, `id`" in message
    assert "line 5: field `text` holds a int" in message
    assert "line 6: holds a list" in message
    assert "line 7: no JSON" in message
    assert "line 9" not in message
    assert "skip_bad" in caught.value.hint


def test_a_key_that_is_there_twice_is_a_bad_line_however_deep_it_stands(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"text": "one"}\n{"text": "two", "n": 1, "text": "three"}\n{"text": "four", "at": [{"a": 1, "a": 1, "a": 2}]}'
    )
    with pytest.raises(InputError) as caught:
        load_text(path)
    assert f"`{path}`" in str(caught.value)
    assert "line 2: the key `text` is there twice; line 3: the key `a` is there 3 times" in str(caught.value)
    found = load_text(path, skip_bad=2)
    assert found.documents == ("one",)
    assert "2 malformed lines left out" in found.notes[0]


def test_bad_lines_may_be_left_out_up_to_a_number(tmp_path):
    path = bad.broken_json(tmp_path)
    text = load_text(path, skip_bad=5)
    assert text.documents == ("A good record.",) * 3
    assert "5 malformed lines left out (line 2:" in text.notes[0]
    with pytest.raises(InputError, match="4 allowed"):
        load_text(path, skip_bad=4)
    with pytest.raises(RecipeError, match="skip_bad"):
        load_text(path, skip_bad=-1)


def test_endless_record_is_refused_at_the_limit(tmp_path):
    with pytest.raises(InputError, match="line 1 is longer than 1,000 characters"):
        load_text(bad.one_record(tmp_path, 5000), limit=1000)


def test_escaped_oddities_are_put_right_and_counted(tmp_path):
    text = load_text(bad.half_pair(tmp_path))
    assert text.documents == ("a\ufffd bc\nd",)
    assert len(text.notes) == 3
    assert text.joined().encode("utf-8")


def test_jsonl_stops_at_the_limit(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "12345"}\n' * 10)
    text = load_text(path, limit=10)
    assert len(text.documents) == 2
    assert "only the first 10 characters" in text.notes[0]


# Parquet


@pytest.fixture
def parquet(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    parquet.write_table(arrow.table({"text": ["one", None, "two"], "id": [1, 2, 3]}), path)
    return path


def test_parquet_takes_the_column_asked_for(parquet):
    assert load_text(parquet, skip_bad=1).documents == ("one", "two")
    with pytest.raises(InputError, match="row 2: `text` is null"):
        load_text(parquet)
    with pytest.raises(InputError, match="no column `body`, only `text`, `id`"):
        load_text(parquet, field="body")
    with pytest.raises(InputError, match="`id` holds int64"):
        load_text(parquet, field="id")


def test_false_parquet_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(InputError, match="no readable parquet file"):
        load_text(bad.false_parquet(tmp_path))


def test_missing_pyarrow_names_the_extra(parquet, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pyarrow") as caught:
        load_text(parquet)
    assert "secateur[data]" in caught.value.hint


# Mutations


def mutated(data, draw):
    """Flip, cut, repeat or insert a few bytes."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data))
        match draw.randrange(4):
            case 0:
                data[at] = draw.randrange(256)
            case 1:
                del data[at : at + draw.randint(1, 9)]
            case 2:
                data[at:at] = draw.choice([b"\0", b"\xff", b'"', b"[" * 2000, b"\\ud800", b"\r", b"\n", b"1e999"])
            case _:
                data[at:at] = data[at : at + 20]
        data = data or bytearray(b"x")
    return bytes(data)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_mutated_files_give_text_or_an_input_error(tmp_path, parquet, suffix):
    draw = random.Random(0)
    good = parquet.read_bytes() if suffix == ".parquet" else b'{"text": "one \\u00e9 \xc3\xa9", "id": 3}\n' * 5
    path = tmp_path / f"mutated{suffix}"
    outcomes = set()
    for _ in range(300):
        path.write_bytes(mutated(good, draw))
        try:
            text = load_text(path, skip_bad=draw.randrange(3), limit=10_000)
            assert text.joined().encode("utf-8")
            outcomes.add("text")
        except InputError:
            outcomes.add("error")
    assert "text" in outcomes
    assert suffix == ".txt" or "error" in outcomes


# Names


def test_unknown_names_come_with_near_ones(tmp_path):
    with pytest.raises(InputError, match="did you mean `wikitext2`"):
        load_text("wikitxt2")
    with pytest.raises(InputError, match=r"did you mean .*`wiki`"):
        load_text("builtin:wki")
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(InputError, match=r"does not exist \(did you mean `corpus.txt`\?\)"):
        load_text(str(tmp_path / "corpsu.txt"))


def test_paths_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(InputError, match=r"suffix `\.csv`"):
        load_text(str(tmp_path / "x.csv"))
    with pytest.raises(InputError, match="is a folder"):
        load_text(str(tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        load_text("./owner/name")


def test_a_file_wins_over_a_data_set_of_the_same_name(tmp_path, monkeypatch, data_sets):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name.txt").write_text("local")
    assert load_text("owner/name.txt").documents == ("local",)
    with pytest.raises(InputError, match="does not exist"):
        load_text("owner/other.txt")
    assert data_sets.asked == []


def test_offline_switch_is_honoured(monkeypatch, data_sets):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data_sets.rows = ConnectionError("no")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE") as caught:
        load_text("wikitext2")
    assert "builtin:wiki" in caught.value.hint
    assert data_sets.asked[0][2]["download_config"] == {"local_files_only": True}
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        load_text("c4")
    assert len(data_sets.asked) == 1


def test_offline_uses_the_local_cache_of_data_sets(monkeypatch, data_sets):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load_text("owner/name").documents == ("", " = Title = \n", " Words . \n")


# Data sets of the hub


@pytest.mark.parametrize(
    ("spec", "options", "path", "config", "split"),
    [
        ("wikitext2", {}, "Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ("wikitext2", {"role": "evaluation"}, "Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("wikitext2:validation", {}, "Salesforce/wikitext", "wikitext-2-raw-v1", "validation"),
        ("wikitext2", {"split": "validation"}, "Salesforce/wikitext", "wikitext-2-raw-v1", "validation"),
        ("o/n", {}, "o/n", None, "train"),
        ("o/n:test", {}, "o/n", None, "test"),
        ("o/n:train[:10%]", {}, "o/n", None, "train[:10%]"),
        ("o/n:en:train[5:9]", {}, "o/n", "en", "train[5:9]"),
        ("o/n:a:b:c", {}, None, None, None),
        ("o/n:en", {}, "o/n", "en", "train"),
        ("o/n:en:dev", {}, "o/n", "en", "dev"),
    ],
)
def test_data_set_names_say_path_configuration_and_split(data_sets, spec, options, path, config, split):
    if path is None:
        with pytest.raises(InputError, match="owner/name:config:split"):
            load_text(spec, **options)
        return
    text = load_text(spec, **options)
    asked_path, asked_config, settings = data_sets.asked[0]
    assert (asked_path, asked_config, settings["split"]) == (path, config, split)
    assert text.source == ":".join(word for word in (path, config, split) if word)


def test_wikitext_rows_are_joined_as_published(data_sets):
    assert load_text("wikitext2").joined() == "\n\n = Title = \n\n\n Words . \n"


def test_c4_streams_one_shard_up_to_the_limit(data_sets):
    data_sets.rows = ({"text": "x" * 100} for _ in range(10**9))
    text = load_text("c4", limit=250)
    assert len(text.documents) == 3
    _, _, settings = data_sets.asked[0]
    assert settings["streaming"] is True
    assert settings["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}


def test_data_set_faults_are_input_errors(data_sets):
    with pytest.raises(InputError, match="no column `body`, only `text`"):
        load_text("o/n", field="body")
    with pytest.raises(InputError, match="says split `test`, but `split` says `train`"):
        load_text("o/n:test", split="train")
    with pytest.raises(InputError, match="has no split `test`"):
        load_text("c4:test")
    data_sets.rows = [{"text": None}]
    with pytest.raises(InputError, match="row 1"):
        load_text("o/n")
    data_sets.rows = ValueError("Unknown split\nmore")
    with pytest.raises(InputError, match=r"cannot be loaded: Unknown split$"):
        load_text("o/n")


def test_missing_datasets_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="datasets") as caught:
        load_text("wikitext2")
    assert "secateur[data]" in caught.value.hint


# The object


def test_digest_sees_every_character_and_every_border():
    digests = {Text(documents, "x").digest for documents in [("ab",), ("a", "b"), ("a", "b", ""), ("aB",)]}
    assert len(digests) == 4
    assert Text(("ab",), "x").digest == Text(("ab",), "y", ("note",)).digest


# Tokens


def test_text_is_tokenised_once_with_the_tokenizers_own_special_tokens():
    letters = Letters()
    ids = tokenise("abc", letters)
    assert ids.dtype is torch.int64
    assert ids.tolist() == [1, 97, 98, 99, 2]
    assert letters.calls == ["abc"]
    assert tokenise("abc", letters, special_tokens=False).tolist() == [97, 98, 99]
    assert tokenise(Text(("a", "b"), "x"), letters).tolist() == [1, 97, 10, 10, 98, 2]
    assert tokenise("", letters, special_tokens=False).shape == (0,)


@settings(deadline=None)
@given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 9))
def test_long_text_in_pieces_gives_the_same_tokens(text, size):
    pieces = list(_pieces(text, size))
    assert "".join(pieces) == text
    assert all(len(piece) <= size for piece in pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.data.text._PIECE", size)
        assert tokenise(text, Letters()).tolist() == [1, *map(ord, text), 2]


def test_pieces_of_a_real_text_give_the_tokens_of_the_whole(trained_folder, monkeypatch):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained_folder)
    text = load_text("builtin:tiny-evaluation")
    whole = tokenise(text, tokenizer)
    monkeypatch.setattr("secateur.data.text._PIECE", 500)
    assert len(list(_pieces(text.joined(), 500))) > 60
    assert torch.equal(tokenise(text, tokenizer), whole)


def test_tokenising_a_long_text_neither_warns_nor_logs(trained_folder, caplog):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained_folder)
    long = "some words " * 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = tokenise(long, tokenizer)
    assert len(ids) > tokenizer.model_max_length
    assert caplog.records == []
    assert tokenizer.decode(ids) == long


# Overlap


def test_overlap_counts_shared_runs_of_words():
    first = Text((" ".join(WORDS[:200]),), "a")
    second = Text((" ".join(WORDS[100:300]).upper(),), "b")
    assert overlap(first, first) == 1.0
    assert overlap(first, Text((" ".join(WORDS[200:]),), "c")) == 0.0
    assert overlap(first, second) == pytest.approx(88 / 188)


def test_overlap_of_short_texts_uses_shorter_runs():
    assert overlap(Text(("one two three four",), "a"), Text(("two three",), "b")) == 1.0
    assert overlap(Text(("one two three four",), "a"), Text(("three two",), "b")) == 0.0
    assert overlap(Text(("",), "a"), Text(("three two",), "b")) == 0.0
