"""The tiny trained model is what its users in other tests take it for."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.data.text import load_text, tokenise

LENGTH = 128  # tokens of a window
WINDOWS = 24


@pytest.fixture(scope="module")
def tokenizer(trained_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(trained_folder)


@pytest.fixture
def model(trained_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(trained_folder).eval()


@pytest.fixture(scope="module")
def held_out(tokenizer):
    return tokenise(load_text("builtin:tiny-evaluation"), tokenizer)


@torch.no_grad()
def perplexity(model, ids):
    rows = ids[: WINDOWS * LENGTH].reshape(WINDOWS, LENGTH)
    return math.exp(model(input_ids=rows, labels=rows, use_cache=False).loss.item())


def prune_linears_by_magnitude_(model, sparsity):
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers."):
            cut = module.weight.abs().flatten().kthvalue(int(sparsity * module.weight.numel())).values
            module.weight.data.masked_fill_(module.weight.abs() <= cut, 0.0)


def test_model_is_small_float32_llama_with_grouped_queries_and_tied_head(trained_folder, model):
    assert sum(file.stat().st_size for file in trained_folder.iterdir()) < 3_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.model_type == "llama"
    assert model.config.num_attention_heads == 2 * model.config.num_key_value_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.max_position_embeddings == 256


def test_tokenizer_gives_back_every_text_and_has_its_special_tokens(tokenizer, model):
    for text in (load_text("builtin:tiny-evaluation").joined(), "tabs\t  spaces \n\n, émigré 東京 🙂 !", " a", ""):
        assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) == text
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name) == getattr(model.generation_config, name)


def test_tokenizer_pads_batches(tokenizer):
    batch = tokenizer(["one longer text", "a"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(dim=1).tolist() == [
        len(tokenizer(t)["input_ids"]) for t in ("one longer text", "a")
    ]
    assert batch["input_ids"][1, -1] == tokenizer.pad_token_id


def test_perplexity_is_five_times_below_a_unigram_model_that_knows_the_text(model, tokenizer, held_out):
    counts = torch.bincount(held_out, minlength=len(tokenizer)).double()
    share = counts / counts.sum()
    unigram = math.exp(-(share * share.clamp(min=1e-12).log()).sum().item())
    assert perplexity(model, held_out) < unigram / 5


def test_magnitude_pruning_to_seventy_percent_hurts(model, held_out):
    dense = perplexity(model, held_out)
    prune_linears_by_magnitude_(model, 0.7)
    assert perplexity(model, held_out) > 1.5 * dense


def test_model_continues_a_text_with_words(model, tokenizer):
    start = tokenizer("The economy of the country", return_tensors="pt")
    ids = model.generate(**start, max_new_tokens=24, do_sample=False)
    told = tokenizer.decode(ids[0, start["input_ids"].shape[1] :])
    known = set(load_text("builtin:tiny-calibration").joined().lower().split())
    words = told.lower().split()
    assert len(words) >= 4
    assert sum(word in known for word in words) >= len(words) / 2
