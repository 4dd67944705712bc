"""A short name for the bytes of a model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from bad import models as bad
from secateur.core.errors import InputError
from secateur.models.fingerprint import fingerprint


@pytest.fixture
def folder(tmp_path) -> Path:
    path = bad.sound_folder(tmp_path / "model")
    bad.write_tokenizer(path)
    return path


def test_a_fingerprint_tells_models_apart_and_knows_copies(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("words")
    (copy / "secateur.json").write_text("{}")
    assert fingerprint(copy) == fingerprint(folder)
    with (copy / bad.SINGLE).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert fingerprint(copy) != fingerprint(folder)
    with pytest.raises(InputError, match="cannot be read"):
        fingerprint(tmp_path / "none")


def test_a_large_file_is_sampled_in_header_and_body(tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.models.fingerprint.WHOLE", 1000)
    path = tmp_path / "model.safetensors"
    data = bytearray(200_000)
    data[:8] = (5000).to_bytes(8, "little")
    path.write_bytes(data)
    first = fingerprint(path)
    for place in (100, 5000, 120_000, 199_999):
        data[place] ^= 1
        path.write_bytes(data)
        assert fingerprint(path) != first
        data[place] ^= 1
