"""The packed folder: bit-exact for every family, read back whole or refused."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from secateur.core import faults
from secateur.core.errors import InputError, ResourceError
from secateur.export.bitmask import MODEL, WEIGHTS, fingerprint, is_packed, read, write
from secateur.models.publish import publish

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = {
    "llama": ("Llama", GATED),
    "mistral": ("Mistral", GATED),
    "qwen2": ("Qwen2", {**GATED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**GATED, "head_dim": 8}),
    "gemma2": ("Gemma2", {**GATED, "head_dim": 8}),
    "gemma3": ("Gemma3Text", {**GATED, "head_dim": 8}),
    "phi3": ("Phi3", GATED),
    "opt": ("OPT", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": ("GPT2", {**SMALL, "n_positions": 64}),
    "gpt_neox": ("GPTNeoX", {**SMALL, "intermediate_size": 48}),
    "bloom": ("Bloom", SMALL),
    "falcon": ("Falcon", SMALL),
    "mixtral": ("Mixtral", {**GATED, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**GATED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}


def build(family, dtype=torch.float32):
    """Return a model half of whose matrices are zero, with rotary tables as a loaded model has them."""
    kind, settings = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
                if parameter.dim() > 1:
                    parameter.masked_fill_(torch.rand(parameter.shape) < 0.6, 0)
    return model


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_model(left, right):
    first, second = left.state_dict(), right.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(bits(tensor), bits(second[name])), name


@pytest.fixture
def llama():
    return build("llama")


@pytest.fixture
def packed(llama, tmp_path):
    folder = tmp_path / "packed"
    folder.mkdir()
    write(llama, None, folder, {"pattern": "60%"})
    return folder


def small_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2, "<end>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")


def rewrite(folder, change, **metadata):
    """Write the weights file again after `change` edited its tensors."""
    path = folder / WEIGHTS
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {name: value for name, value in (header | metadata).items() if value is not None})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_bit_for_bit_with_the_same_logits(family, tmp_path):
    model = build(family)
    write(model, None, tmp_path, None)
    state = torch.get_rng_state()
    again, tokenizer = read(tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert tokenizer is None
    assert type(again) is type(model)
    assert not again.training
    assert_same_model(model, again)
    assert len(list(again.parameters())) == len(list(model.parameters()))  # ties are ties again
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert (tmp_path / WEIGHTS).stat().st_size < sum(value.nbytes for value in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bfloat16_runs_like_the_checkpoint_it_came_from(family, tmp_path):
    model = build(family, torch.bfloat16)
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.bfloat16)
    (tmp_path / "packed").mkdir()
    write(loaded, None, tmp_path / "packed", None)
    again, _ = read(tmp_path / "packed")
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, loaded(ids).logits)
    assert again.config.dtype == torch.bfloat16


def test_negative_zeros_and_nan_payloads_survive(llama, tmp_path):
    weight = llama.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight.view(torch.int32)[0, :3] = torch.tensor([-(2**31), 0x7FC12345, 0x7F800000], dtype=torch.int32)
    write(llama, None, tmp_path, None)
    assert_same_model(llama, read(tmp_path)[0])


def test_mixed_dtypes_are_kept_apart(llama, tmp_path):
    llama.model.layers[0].mlp.to(torch.bfloat16)
    llama.model.norm.to(torch.float64)
    write(llama, None, tmp_path, None)
    assert_same_model(llama, read(tmp_path)[0])


def test_a_dtype_may_be_asked_for(packed, llama):
    again, _ = read(packed, dtype=torch.bfloat16)
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}
    assert_same_model(llama.to(torch.bfloat16), again)


def test_a_model_untied_against_its_configuration_stays_untied(tmp_path):
    model = build("qwen2")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    write(model, None, tmp_path, None)
    again, _ = read(tmp_path)
    assert_same_model(model, again)
    assert again.lm_head.weight is not again.model.embed_tokens.weight


def test_a_tied_head_is_stored_once_and_is_one_parameter_again(tmp_path):
    write(build("qwen2"), None, tmp_path, None)
    assert not [name for name in load_file(tmp_path / WEIGHTS) if name.startswith("lm_head")]
    again, _ = read(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_only_what_gets_smaller_is_packed(llama, tmp_path):
    dense = torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) + 1
    llama.model.layers[0].self_attn.q_proj.weight = torch.nn.Parameter(dense)
    write(llama, None, tmp_path, None)
    entries = load_file(tmp_path / WEIGHTS)
    assert torch.equal(entries["model.layers.0.self_attn.q_proj.weight"], dense)
    assert "model.layers.0.mlp.down_proj.weight" not in entries
    assert entries["model.layers.0.mlp.down_proj.weight.shape"].tolist() == [32, 48]
    assert entries["model.layers.0.mlp.down_proj.weight.bitmask"].shape == (32, 6)
    assert entries["model.norm.weight"].shape == (32,)


def test_tokenizer_generation_settings_and_history_come_along(llama, tmp_path):
    llama.generation_config.max_new_tokens = 7
    llama.generation_config.temperature = 0.3  # without do_sample: transformers refuses to save this
    write(llama, small_tokenizer(), tmp_path, {"base": "tiny"})
    again, tokenizer = read(tmp_path)
    assert tokenizer("one two")["input_ids"] == [1, 2]
    assert again.generation_config.max_new_tokens == 7
    assert json.loads((tmp_path / "secateur.json").read_text())["base"] == "tiny"
    told = {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "_name_or_path": str(tmp_path)}
    assert again.config.to_dict() == llama.config.to_dict() | told


def test_the_model_that_is_written_is_not_changed(llama, tmp_path):
    before, config = {name: value.clone() for name, value in llama.state_dict().items()}, llama.config.to_dict()
    write(llama, None, tmp_path, None)
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())
    assert llama.config.to_dict() == config


def test_a_model_that_was_read_trains(packed):
    again, _ = read(packed)
    ids = torch.arange(3, 20).unsqueeze(0)
    again(ids, labels=ids).loss.backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in again.parameters())


def test_editing_what_was_read_does_not_change_the_file(packed, llama):
    again, _ = read(packed)
    with torch.no_grad():
        for value in again.parameters():
            value.zero_()
    assert_same_model(llama, read(packed)[0])


def test_the_same_model_gives_the_same_bytes(llama, packed, tmp_path):
    (tmp_path / "again").mkdir()
    write(llama, None, tmp_path / "again", {"pattern": "60%"})
    names = sorted(path.relative_to(packed) for path in packed.rglob("*") if path.is_file())
    assert names == [Path(MODEL) / "config.json", Path(MODEL) / "generation_config.json", *names[2:]]
    assert all((packed / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_transformers_cannot_open_the_folder_and_fill_it_with_random_weights(packed):
    for folder in (packed, packed / MODEL):
        with pytest.raises((OSError, ValueError)):
            transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_the_format_is_recognised_and_named_by_its_content(packed, llama, tmp_path):
    assert is_packed(packed)
    assert not is_packed(packed / MODEL)
    assert not is_packed(tmp_path / "nothing")
    name = fingerprint(packed)
    os.utime(packed / WEIGHTS, (1, 1))
    assert fingerprint(packed) == name
    with torch.no_grad():
        llama.model.norm.weight[0] = 3
    (tmp_path / "other").mkdir()
    write(llama, None, tmp_path / "other", None)
    assert fingerprint(tmp_path / "other") != name


# what cannot be written


def test_a_class_that_transformers_lacks_is_refused(tmp_path):
    class OwnLlama(transformers.LlamaForCausalLM):
        pass

    with pytest.raises(InputError, match="`OwnLlama` is no model class of transformers"):
        write(OwnLlama(transformers.LlamaConfig(**GATED)), None, tmp_path, None)


def test_a_model_on_the_meta_device_is_refused_and_nothing_is_written(llama, tmp_path):
    with pytest.raises(InputError, match="is not in memory"):
        write(llama.to("meta"), None, tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_model_is_refused(llama, tmp_path):
    llama.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(InputError, match="quantised"):
        write(llama, None, tmp_path, None)


def test_a_dtype_without_a_name_is_refused(llama, tmp_path):
    llama.model.norm.weight.data = llama.model.norm.weight.data.to(torch.complex64)
    with pytest.raises(InputError, match=r"`model.norm.weight` has the dtype torch.complex64"):
        write(llama, None, tmp_path, None)


@pytest.mark.parametrize("count", [1, 5, 12])
def test_a_full_disk_leaves_the_earlier_output_whole(llama, tmp_path, monkeypatch, count):
    output = tmp_path / "out"
    with publish(output, overwrite=False) as folder:
        write(llama, None, folder, None)
    before = (output / WEIGHTS).read_bytes()
    with torch.no_grad():
        llama.model.norm.weight[0] = 3
    faults.forget()
    monkeypatch.setenv("SECATEUR_FAULT", f"container.write:{count}:enospc")
    with pytest.raises(ResourceError, match="No space left"), publish(output, overwrite=True) as folder:
        write(llama, None, folder, None)
    assert (output / WEIGHTS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# what cannot be read

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks tensor `model\.norm\.weight`"),
        (lambda t: t.update(extra=torch.zeros(3)), r"has the unknown tensor `extra`"),
        (lambda t: t.pop(DOWN + ".shape"), r"has `.*down_proj\.weight\.\w+`, but no `.*down_proj\.weight\.shape`"),
        (lambda t: t.pop(DOWN + ".bitmask"), r"but no `.*down_proj\.weight\.bitmask`"),
        (lambda t: t.update({DOWN: torch.zeros(32, 48)}), r"down_proj\.weight` both packed and plain"),
        (lambda t: t.update({DOWN + ".compressed": t[DOWN + ".compressed"][:-1]}), r"keeps more than the \d+ values"),
        (lambda t: t[DOWN + ".bitmask"].bitwise_xor_(1), r"down_proj\.weight` keeps"),
        (lambda t: t.update({DOWN + ".compressed": t[DOWN + ".compressed"].long()}), r"is stored as I64"),
        (lambda t: t.update({DOWN + ".bitmask": t[DOWN + ".bitmask"].short()}), r"the bit mask of .* is torch\.int16"),
        (lambda t: t.update({DOWN + ".shape": torch.tensor([48, 32])}), r"has the shape \[48, 32\].*\[32, 48\]"),
        (lambda t: t.update({DOWN + ".shape": torch.tensor([2**62, 2**62])}), r"has the shape \[4611686018427387904"),
        (lambda t: t.update({DOWN + ".shape": torch.tensor([32.0, 48.0])}), r"has the shape"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(33)}), r"has the shape \[33\].*\[32\]"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(32).int()}), r"is stored as I32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(packed, change, message):
    rewrite(packed, change)
    with pytest.raises(InputError, match=message):
        read(packed)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"version": "2"}, r"has version `2`.*reads version 1"),
        ({"version": None}, r"has version `None`"),
        ({"format": "pt"}, r"has the format `pt`"),
        ({"architecture": None}, r"does not say its `architecture`"),
        ({"architecture": "GPT2LMHeadModel"}, r"`GPT2LMHeadModel` does not belong to a LlamaConfig"),
        ({"architecture": "pipeline"}, r"`pipeline` does not belong"),
        ({"architecture": "PreTrainedModel"}, r"`PreTrainedModel` does not belong"),
        ({"tied": "["}, r"tied` is not valid JSON"),
        ({"tied": "[1]"}, r"must map names to names"),
        ({"tied": '{"lm_head.weight": "nothing"}'}, r"ties `lm_head.weight` to `nothing`"),
    ],
)
def test_a_header_of_another_kind_is_refused(packed, metadata, message):
    rewrite(packed, lambda tensors: None, **metadata)
    with pytest.raises(InputError, match=message):
        read(packed)


@pytest.mark.parametrize("size", [0, 5, 400, -1])
def test_a_truncated_file_is_refused(packed, size):
    content = (packed / WEIGHTS).read_bytes()
    (packed / WEIGHTS).write_bytes(content[:size])
    with pytest.raises(InputError, match=r"truncated|header|not valid"):
        read(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 9999}, r"states 9,999 layers for \d+ tensors"),
        ({"num_hidden_layers": 10**12}, r"num_hidden_layers"),
        ({"hidden_size": 64}, r"the configuration says"),
        ({"hidden_size": 10**12}, r"hidden_size"),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, r"auto_map"),
        ({"model_type": "no such"}, r"cannot be loaded"),
        ({"vocab_size": "many"}, r"vocab_size"),
        ({"num_attention_heads": 7}, r"cannot be loaded"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(packed, change, message):
    path = packed / MODEL / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read(packed)


@pytest.mark.parametrize("name", [WEIGHTS, f"{MODEL}/config.json"])
def test_a_missing_file_is_named(packed, name):
    (packed / name).unlink()
    with pytest.raises(InputError, match=Path(name).name):
        read(packed)


def test_a_tokenizer_that_asks_for_code_is_refused_and_the_code_not_run(llama, tmp_path):
    write(llama, small_tokenizer(), tmp_path, None)
    path = tmp_path / MODEL / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}))
    (tmp_path / MODEL / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="auto_map"):
        read(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_tokenizer_is_refused(llama, tmp_path):
    write(llama, small_tokenizer(), tmp_path, None)
    (tmp_path / MODEL / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(InputError, match="tokenizer"):
        read(tmp_path)


def test_whatever_is_done_to_the_files_is_an_input_error_or_harmless(llama, tmp_path):
    write(llama, small_tokenizer(), tmp_path, None)
    generator = random.Random(0)
    files = [tmp_path / WEIGHTS, *sorted((tmp_path / MODEL).glob("*.json"))]
    for _ in range(40):
        path = generator.choice(files)
        content = path.read_bytes()
        damaged = bytearray(content)
        for _ in range(generator.choice([1, 3])):
            place = generator.randrange(min(len(damaged), 3000))
            match generator.randrange(3):
                case 0:
                    damaged[place] = generator.randrange(256)
                case 1:
                    del damaged[place : place + generator.randrange(1, 9)]
                case _:
                    damaged[place:place] = generator.choice([b"0", b"{", b"null", b'"', b"99999999999", b","])
        path.write_bytes(damaged)
        with contextlib.suppress(InputError):
            assert isinstance(read(tmp_path)[0], transformers.LlamaForCausalLM)
        path.write_bytes(content)
    assert_same_model(llama, read(tmp_path)[0])
