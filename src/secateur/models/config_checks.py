"""What a model's configuration may say before a library acts on it: sizes within reason, no code, no foreign files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from secateur.core.errors import InputError

# (least, most) of every size that decides how much a model allocates or how long it is built; wide, since they only
# have to stop absurd values: whether the sizes fit the weights is checked tensor by tensor
_HIDDEN, _INNER, _VOCABULARY = (1, 2**20), (0, 2**24), (1, 2**27)
_LAYERS, _HEADS, _EXPERTS, _POSITIONS = (1, 10_000), (0, 2**16), (0, 100_000), (0, 2**31)
BOUNDS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim", "embedding_size"), _HIDDEN
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "moe_intermediate_size"), _INNER
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "head_dim", "v_head_dim", "qk_head_dim"), _HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"), _EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "n_group", "topk_group"), _EXPERTS),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), _POSITIONS
    ),
    "vocab_size": _VOCABULARY,
}
_SIZE_WORDS = re.compile(r"_(size|dim|rank|layers|heads|experts|channels|length)$")
_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")

_QUANTISED = ("quantization_config", "compression_config", "quantization")
_FOREIGN = {
    "transformers_weights": "names another weights file",
    "fusion_config": "replaces modules while loading",
}
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?$")


def check_config(config: Mapping[str, Any], where: str, *, trust_remote_code: bool = False) -> None:
    """Check a model's configuration.

    Args:
        config: the content of `config.json`, nested configurations included.
        where: the file, for messages.
        trust_remote_code: let it name code of its own folder.

    Raises:
        InputError: naming the field and its value.
    """
    check_code(config, where, trust_remote_code=trust_remote_code)
    for place, part in _parts(config):
        for field, value in part.items():
            key = str(field)  # a live configuration has numbers too, as in `id2label`
            name = f"{place}{key}"
            if key in _QUANTISED and value not in (None, {}):
                method = value.get("quant_method") if isinstance(value, Mapping) else None
                raise InputError(
                    f"`{name}` in `{where}` says that the weights are quantised or compressed"
                    + (f" ({str(method)[:40]})" if method else ""),
                    hint="decompress first: save the model in float32, bfloat16 or float16",
                )
            if key in _FOREIGN and value is not None:
                raise InputError(
                    f"`{name}` in `{where}` {_FOREIGN[key]}, which is not followed", hint="remove the field"
                )
            if _IMPLEMENTATION.fullmatch(key):
                _check_implementation(name, value, where)
            _check_size(key, name, value, where)
    if config.get("is_encoder_decoder") is True:
        raise InputError(
            f"`is_encoder_decoder` is true in `{where}`: only decoder language models are supported",
            hint="choose a causal language model",
        )
    architectures = config.get("architectures")
    if architectures is not None and not _is_texts(architectures):
        raise InputError(f"`architectures` in `{where}` must be a list of class names")
    if not isinstance(config.get("model_type", ""), str):
        raise InputError(f"`model_type` in `{where}` must be a text")


def check_code(config: Mapping[str, Any], where: str, *, trust_remote_code: bool) -> None:
    """Refuse a configuration that asks for Python code.

    Raises:
        InputError: it has an `auto_map`, and code is not trusted or comes from another repository.
    """
    for place, part in _parts(config):
        found = part.get("auto_map")
        if not found:
            continue
        if not trust_remote_code:
            raise InputError(
                f"`{place}auto_map` in `{where}` asks for Python code that comes with the model; it was not run",
                hint="read the code, then pass --trust-remote-code (a Hub id also needs --revision)",
            )
        if "--" in str(found):
            raise InputError(
                f"`{place}auto_map` in `{where}` asks for code of another repository, whose version cannot be pinned",
                hint="copy the code into the model's folder",
            )


def layers(config: Mapping[str, Any]) -> int:
    """Return the largest number of layers any part of a checked configuration states, 0 if none does."""
    found = [part.get(key) for _, part in _parts(config) for key in _LAYER_KEYS]
    return max((value for value in found if type(value) is int), default=0)


def _parts(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the configuration and every object nested in it, with the prefix of its names."""
    yield place, config
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _parts(value, f"{place}{key}.")


def _check_size(key: str, name: str, value: Any, where: str) -> None:
    bounds = BOUNDS.get(key)
    if bounds is None:
        if _SIZE_WORDS.search(key) and type(value) is int and abs(value) > 2**40:
            raise InputError(f"`{name}` in `{where}` is {_short(value)}, which is no possible size")
        return
    if value is None:
        return
    for item in value if isinstance(value, list) else [value]:  # one value, or one for each layer
        if type(item) is not int:
            raise InputError(f"`{name}` in `{where}` is {_short(item)}, but must be a whole number")
        if not bounds[0] <= item <= bounds[1]:
            raise InputError(f"`{name}` in `{where}` is {_short(item)}, but must be {bounds[0]} to {bounds[1]:,}")


def _check_implementation(name: str, value: Any, where: str) -> None:
    """Refuse names of kernels, which the library would download and run."""
    for item in value.values() if isinstance(value, Mapping) else [value]:
        if item is not None and not (isinstance(item, str) and re.fullmatch(r"[a-z0-9_]+", item)):
            raise InputError(
                f"`{name}` in `{where}` is {_short(item)}, but must be a name like `sdpa`: kernels are not fetched"
            )


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    shown = repr(value)
    return f"`{shown if len(shown) <= 60 else shown[:57] + '...'}`"
