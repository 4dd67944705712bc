"""Tiny random models of many families, all through one function."""

from __future__ import annotations

import functools

import torch
import transformers

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = {
    "llama": ("Llama", GATED),
    "mistral": ("Mistral", {**GATED, "sliding_window": 6}),
    "qwen2": ("Qwen2", GATED),
    "qwen3": ("Qwen3", {**GATED, "head_dim": 8}),
    "gemma2": ("Gemma2", {**GATED, "head_dim": 8, "sliding_window": 6}),
    "gemma3": (
        "Gemma3",
        {**GATED, "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "phi3": ("Phi3", GATED),
    "opt": ("OPT", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.3}),
    "gpt2": ("GPT2", {**SMALL, "n_positions": 64, "attn_pdrop": 0.3}),
    "gpt_neox": ("GPTNeoX", {**SMALL, "intermediate_size": 48, "hidden_dropout": 0.3}),
    "bloom": ("Bloom", SMALL),
    "falcon-7b": ("Falcon", {**SMALL, "multi_query": True, "parallel_attn": True, "alibi": False}),
    "falcon-40b": ("Falcon", {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": ("Falcon", {**SMALL, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    "mixtral": ("Mixtral", {**GATED, "num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**GATED, "head_dim": 8, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "gpt_oss": ("GptOss", {**GATED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


@functools.cache
def prepared(family: str, attention: str | None = None):
    kind, settings = FAMILIES[family]
    if family == "gemma3":
        settings = {**settings, "num_hidden_layers": 4}
    config = getattr(transformers, "Gemma3TextConfig" if family == "gemma3" else f"{kind}Config")(**settings)
    name = {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    if attention is not None:
        config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, name)(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)  # biases too; larger than usual, so that routing differs
    return model.train()  # dropout on: capture and replay must not care
