"""Saving: an ordinary checkpoint, byte for byte, streamed, with nothing of the model changed."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from bad import models as bad
from secateur.core.errors import InputError
from secateur.models import weights
from secateur.models.files import load
from secateur.models.pages import Mappings
from secateur.models.save import save_model
from secateur.models.weights import write_weights


def files(path: Path) -> dict[str, bytes]:
    return {str(entry.relative_to(path)): entry.read_bytes() for entry in path.rglob("*") if entry.is_file()}


def equal(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def logits(model, count: int = 12) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(count)[None] % model.config.vocab_size, use_cache=False).logits


def resident(kind: str = "RssAnon") -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("tied", [True, False])
def test_a_round_trip_keeps_every_byte_and_the_tie(make_llama, tmp_path, tied):
    model = make_llama(tie_word_embeddings=tied)
    save_model(model, None, tmp_path / "first", None)
    first = load(tmp_path / "first").model
    save_model(first, None, tmp_path / "second", None)
    second = load(tmp_path / "second").model
    assert equal(model, first) and equal(first, second)
    assert torch.equal(logits(model), logits(second))
    assert (second.lm_head.weight.data_ptr() == second.model.embed_tokens.weight.data_ptr()) is tied
    assert files(tmp_path / "first") == files(tmp_path / "second")


def families():
    from transformers import BloomConfig, GPT2Config, MixtralConfig, Qwen3MoeConfig

    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {**small, "num_key_value_heads": 1, "intermediate_size": 24}
    return {
        "gpt2": GPT2Config(
            vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
        ),
        "bloom": BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2),
        "mixtral": MixtralConfig(**experts, num_local_experts=4, num_experts_per_tok=2),
        "qwen3_moe": Qwen3MoeConfig(
            **experts, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8, decoder_sparse_step=1
        ),
    }


@pytest.mark.parametrize("family", ["gpt2", "bloom", "mixtral", "qwen3_moe"])
def test_the_streamed_file_holds_what_transformers_would_write(family, tmp_path):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(families()[family]).eval()
    save_model(model, None, tmp_path / "ours", None)
    model.save_pretrained(tmp_path / "theirs")
    with (
        safe_open(tmp_path / "ours" / "model.safetensors", "pt") as ours,
        safe_open(tmp_path / "theirs" / "model.safetensors", "pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
        assert all(torch.equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in ours.keys())  # noqa: SIM118
    loaded = load(tmp_path / "ours").model
    assert equal(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    save_model(loaded, None, tmp_path / "again", None)
    assert files(tmp_path / "again")["model.safetensors"] == files(tmp_path / "ours")["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_are_cut_at_their_size_and_load_again(make_llama, tmp_path, dtype):
    model = make_llama().to(dtype)
    model.model.norm.float()  # one wider tensor, which must stay aligned
    save_model(model, None, tmp_path / "model", None, max_shard=8_000)
    names = sorted(entry.name for entry in (tmp_path / "model").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    loaded = load(tmp_path / "model")
    assert loaded.source.notes[0].startswith("tensors stored as F32 were converted to")
    assert loaded.model.dtype == dtype
    assert torch.equal(loaded.model.lm_head.weight, model.lm_head.weight)


def test_saving_changes_nothing_about_the_model(make_llama, tmp_path):
    model = make_llama()
    before = (model.config.to_dict(), model.generation_config.to_dict())
    save_model(model, None, tmp_path / "model", None)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before


def test_the_configuration_stays_clean(make_llama, tmp_path):
    model = make_llama()
    model.config.sparsity_config = {"format": "dense"}
    save_model(model, None, tmp_path / "model", {"weights": {}})
    config = json.loads((tmp_path / "model" / "config.json").read_bytes())
    assert not {"quantization_config", "compression_config", "sparsity_config", "secateur"} & config.keys()
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert str(tmp_path) not in json.dumps(config)


def test_the_side_file_says_how_the_model_was_made(make_llama, tmp_path):
    side = {
        "base_model": {"spec": "x"},
        "metrics": {"loss": float("inf")},
        "path": Path("a"),
        "names": {"b", "a"},
    }
    save_model(make_llama(), None, tmp_path / "model", side)
    found = json.loads((tmp_path / "model" / "secateur.json").read_bytes())
    assert found["format_version"] == 1
    assert found["versions"].keys() == {"secateur", "torch", "transformers", "safetensors"}
    assert found["base_model"] == {"spec": "x"}
    assert found["metrics"] == {"loss": None}
    assert (found["path"], found["names"]) == ("a", ["a", "b"])
    save_model(make_llama(), None, tmp_path / "plain", None)
    assert not (tmp_path / "plain" / "secateur.json").exists()


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"temperature": 0.7}, "sampling settings without `do_sample`"),
        ({"num_beams": 1, "length_penalty": 2.0}, "sampling settings"),
        ({"num_return_sequences": 3}, "was not saved"),
        ({"do_sample": True, "temperature": 0.7}, None),
    ],
)
def test_an_invalid_generation_configuration_does_not_fail_the_save(make_llama, tmp_path, settings, note):
    model = make_llama()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    notes = save_model(model, None, tmp_path / "model", None)
    assert [note in line for line in notes] == ([True] if note else [])
    load(tmp_path / "model")


def test_a_model_without_values_is_not_saved(make_llama, tmp_path):
    model = make_llama().to("meta")
    with pytest.raises(InputError, match="has no values"):
        save_model(model, None, tmp_path / "model", None)


def test_a_quantised_model_is_not_saved(make_llama, tmp_path):
    model = make_llama()
    model.is_quantized = True
    with pytest.raises(InputError, match="quantised"):
        save_model(model, None, tmp_path / "model", None)
    assert not (tmp_path / "model").exists()


def test_a_head_that_left_its_tie_is_not_lost_silently(make_llama, tmp_path):
    model = make_llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    with pytest.raises(InputError, match="the configuration ties them"):
        save_model(model, None, tmp_path / "model", None)


def test_a_stored_head_beside_a_stated_tie_is_kept_and_told(tmp_path):
    bad.sound_folder(tmp_path / "model")
    bad.set_config(tmp_path / "model", tie_word_embeddings=True)
    first = load(tmp_path / "model", tokenizer=False)
    assert "the stored head differs and was kept" in first.source.notes[0]
    assert "set to false" in save_model(first.model, None, tmp_path / "out", None)[0]
    second = load(tmp_path / "out", tokenizer=False)
    assert second.source.notes == () and second.model.config.tie_word_embeddings is False
    assert first.model.config.tie_word_embeddings is True
    assert equal(first.model, second.model)


def test_tensors_shared_without_a_tie_are_written_twice(make_llama, tmp_path):
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    save_model(model, None, tmp_path / "model", None)
    assert equal(load(tmp_path / "model").model, model)


def test_saving_a_mapped_model_keeps_it_out_of_memory(make_llama, tmp_path, monkeypatch):
    save_model(make_llama(layers=6, hidden=768, vocabulary=500), None, tmp_path / "model", None)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    model = load(tmp_path / "model").model
    before, seen = resident("VmRSS"), []
    write = weights._write_tensor

    def watched(file, tensor):
        write(file, tensor)
        seen.append(resident("VmRSS") - before)

    monkeypatch.setattr(weights, "_write_tensor", watched)
    (tmp_path / "out").mkdir()
    write_weights(model, tmp_path / "out", 10**10)
    assert size > 90_000_000
    assert max(seen) < size // 3
    assert files(tmp_path / "out")["model.safetensors"] == files(tmp_path / "model")["model.safetensors"]


def test_releasing_pages_keeps_what_was_written(tmp_path):
    big = tmp_path / "big.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({"x": torch.arange(100_000.0)}, big)
    tensor = load_file(big)["x"]
    tensor[50_000] = -1
    mappings = Mappings()
    assert mappings.hold(tensor) and not mappings.hold(torch.zeros(3))
    mappings.release([tensor, torch.zeros(3)])
    wanted = torch.arange(100_000.0)
    wanted[50_000] = -1
    assert torch.equal(tensor, wanted)


def test_a_full_disk_is_an_os_error_with_its_number(make_llama, tmp_path):
    model = make_llama()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # Python ignores the signal of this limit
    try:
        with pytest.raises(OSError) as caught:
            write_weights(model, tmp_path, 10**10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG


def test_weights_can_be_written_without_a_library_model(tmp_path):
    files = write_weights(nn.Sequential(nn.Linear(3, 2)), tmp_path, 10**9)
    assert [file.name for file in files] == ["model.safetensors"]
