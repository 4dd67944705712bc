"""Models of the Hub, from a cache that is laid out as the library does it."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from bad import models as bad
from secateur.core.errors import InputError, ResourceError
from secateur.models import hub
from secateur.models.files import load


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a local model must not cause a request")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A Hub cache with one model, as the Hub's library lays it out."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    commit = "0123456789abcdef" * 2 + "01234567"
    home = cache / "models--someone--tiny"
    source = bad.sharded_folder(tmp_path / "source")
    bad.write_tokenizer(source)
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots" / commit).mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, home / "blobs" / f"{number:040x}")
        (home / "snapshots" / commit / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return home / "snapshots" / commit


def test_a_hub_model_comes_from_the_cache_with_its_commit(hub_cache):
    loaded = load("someone/tiny")
    assert loaded.source.kind == "hub"
    assert loaded.source.revision == hub_cache.name
    assert loaded.source.path == hub_cache
    assert loaded.tokenizer is not None


def test_a_hub_model_that_is_not_cached_is_not_fetched_offline(hub_cache):
    with pytest.raises(ResourceError, match="downloads are switched off"):
        load("someone/other")


def test_a_hub_index_is_checked_before_its_shards_are_fetched(hub_cache, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "_fetch", lambda name, revision, patterns: asked.append(patterns) or hub_cache)
    index = hub_cache / bad.INDEX
    index.unlink()
    index.write_text('{"metadata": {}, "weight_map": {"a": "../../../x.safetensors"}}')
    with pytest.raises(InputError, match="only plain names"):
        hub.snapshot("someone/tiny", None)
    assert asked == [["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]]


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0123456"])
def test_code_of_the_hub_needs_a_full_commit(hub_cache, revision):
    with pytest.raises(InputError, match="pinned revision"):
        load("someone/tiny", trust_remote_code=True, revision=revision)


def test_hub_ids_are_told_from_paths():
    assert all(hub.is_hub_id(name) for name in ("gpt2", "meta-llama/Llama-3.2-1B", "a_b/c.d"))
    assert not any(hub.is_hub_id(name) for name in ("/a/b", "./a", "a/b/c", "../a", "a//b", "", "a b", "a--b/c", "~/x"))
