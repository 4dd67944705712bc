"""GGUF files: broken ones are refused, sound ones load unpacked."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.core.errors import InputError
from secateur.models.files import load, save_model


def logits(model, count: int = 12) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(count)[None] % model.config.vocab_size, use_cache=False).logits


def gguf(path: Path, *, count: int = 1, values: dict[str, int] | None = None, name: bytes = b"x", end: int = 64):
    """Write a file with one tensor of 16 numbers, or what pretends to be one."""

    def text(data: bytes) -> bytes:
        return struct.pack("<Q", len(data)) + data

    found = {"llama.block_count": 1, **(values or {})}
    data = b"GGUF" + struct.pack("<IQQ", 3, count, 1 + len(found))
    data += text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    for key, value in found.items():
        data += text(key.encode()) + struct.pack("<IQ", 10, value)
    data += text(name) + struct.pack("<IQIQ", 1, 16, 0, 0)
    path.write_bytes(data + bytes(-len(data) % 32) + bytes(end))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"count": 2**40}, "no possible model"),
        ({"count": 2}, "overlaps another"),
        ({"values": {"llama.block_count": 10**12}}, "must be 1 to"),
        ({"values": {"llama.block_count": 5000}}, "5,000 blocks for 1 tensors"),
        ({"values": {"llama.embedding_length": 10**12}}, "llama.embedding_length"),
        ({"name": b"\xff\xfe"}, "not UTF-8"),
        ({"end": 63}, "truncated"),
        ({"values": {"general.alignment": 3}}, "power of two"),
    ],
)
def test_a_broken_gguf_file_is_refused(tmp_path, change, part):
    gguf(tmp_path / "model.gguf", **change)
    with pytest.raises(InputError) as caught:
        load(tmp_path / "model.gguf")
    assert part in str(caught.value)


def test_a_gguf_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"hello" * 10)
    with pytest.raises(InputError, match="is not a GGUF file"):
        load(tmp_path / "model.gguf")
    gguf(tmp_path / "model.gguf")
    for length in range(24, 150, 7):
        (tmp_path / "cut.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:length])
        with pytest.raises(InputError, match=r"truncated|not a GGUF"):
            load(tmp_path / "cut.gguf")


def test_without_the_gguf_package_the_extra_is_named(tmp_path, monkeypatch):
    gguf(tmp_path / "model.gguf")
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda: False)
    with pytest.raises(InputError, match="`gguf` is needed") as caught:
        load(tmp_path / "model.gguf")
    assert caught.value.hint == "pip install 'secateur[gguf]'"


def write_gguf(path: Path, hidden: int = 32) -> None:
    """Write a whole LLaMA with one block and a word for each byte."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(2 * hidden)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    words = [f"w{number}" for number in range(18)] + ["w0w1", "w2w3"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["w0 w1", "w2 w3"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    for name, *shape in [
        ("token_embd.weight", 20, hidden),
        ("blk.0.attn_norm.weight", hidden),
        ("blk.0.attn_q.weight", hidden, hidden),
        ("blk.0.attn_k.weight", hidden // 2, hidden),
        ("blk.0.attn_v.weight", hidden // 2, hidden),
        ("blk.0.attn_output.weight", hidden, hidden),
        ("blk.0.ffn_norm.weight", hidden),
        ("blk.0.ffn_gate.weight", 2 * hidden, hidden),
        ("blk.0.ffn_up.weight", 2 * hidden, hidden),
        ("blk.0.ffn_down.weight", hidden, 2 * hidden),
        ("output_norm.weight", hidden),
        ("output.weight", 20, hidden),
    ]:
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_loads_unpacked_and_can_be_saved(tmp_path):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf")
    loaded = load(tmp_path / "tiny.gguf")
    assert loaded.source.kind == "gguf"
    assert loaded.model.dtype == torch.float32
    save_model(loaded.model, loaded.tokenizer, tmp_path / "model", None)
    again = load(tmp_path / "model")
    assert torch.equal(logits(again.model), logits(loaded.model))
    assert again.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
