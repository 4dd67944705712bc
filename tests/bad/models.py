"""A sound model folder made byte by byte, and the ways to break it; no binary file is kept anywhere."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

HIDDEN, INNER, VOCABULARY = 8, 16, 12
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, list[int]] = {
    "model.embed_tokens.weight": [VOCABULARY, HIDDEN],
    "model.layers.0.input_layernorm.weight": [HIDDEN],
    "model.layers.0.mlp.down_proj.weight": [HIDDEN, INNER],
    "model.layers.0.mlp.gate_proj.weight": [INNER, HIDDEN],
    "model.layers.0.mlp.up_proj.weight": [INNER, HIDDEN],
    "model.layers.0.post_attention_layernorm.weight": [HIDDEN],
    "model.layers.0.self_attn.k_proj.weight": [HIDDEN // 2, HIDDEN],
    "model.layers.0.self_attn.o_proj.weight": [HIDDEN, HIDDEN],
    "model.layers.0.self_attn.q_proj.weight": [HIDDEN, HIDDEN],
    "model.layers.0.self_attn.v_proj.weight": [HIDDEN // 2, HIDDEN],
    "model.norm.weight": [HIDDEN],
    "lm_head.weight": [VOCABULARY, HIDDEN],
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def values(name: str) -> bytes:
    """Return float32 values for a tensor, the same for the same name."""
    count = 1
    for size in SHAPES[name]:
        count *= size
    random = Random(name)
    return struct.pack(f"<{count}f", *(random.gauss(0, 0.1) for _ in range(count)))


def header_of(names: list[str]) -> dict[str, Any]:
    """Return the header for these tensors in this order, all float32."""
    found: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        size = len(values(name))
        found[name] = {"dtype": "F32", "shape": SHAPES[name], "data_offsets": [at, at + size]}
        at += size
    return found


def write(path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> None:
    """Write a safetensors file from its parts, however wrong they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def write_sound(path: Path, names: list[str]) -> None:
    """Write a sound safetensors file with these tensors."""
    write(path, header_of(names), b"".join(values(name) for name in names))


def sound_folder(path: Path) -> Path:
    """Make a model folder with a single weights file."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    write_sound(path / SINGLE, list(SHAPES))
    return path


def sharded_folder(path: Path) -> Path:
    """Make a model folder with two shards and their index."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    names = list(SHAPES)
    write_sound(path / FIRST, names[:6])
    write_sound(path / SECOND, names[6:])
    mapped = {name: FIRST if name in names[:6] else SECOND for name in names}
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapped}))
    return path


def set_config(folder: Path, **fields: Any) -> None:
    """Change fields of `config.json`."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, **fields}))


def set_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the weight map of the shard index."""
    found = json.loads((folder / INDEX).read_bytes())
    change(found["weight_map"])
    (folder / INDEX).write_text(json.dumps(found))


class Canary:
    """An object whose pickle creates a file when it is opened without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def write_pickle(folder: Path, canary: Path) -> None:
    """Replace the weights by a pickle that would create `canary`."""
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Canary(canary)}))


def write_code(folder: Path, canary: Path) -> None:
    """Let the model ask for Python code that would create `canary`."""
    (folder / "modeling_evil.py").write_text(f"from pathlib import Path\nPath({str(canary)!r}).touch()\n")
    set_config(
        folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.EvilConfig"}
    )


def write_tokenizer(folder: Path, **fields: Any) -> None:
    """Write a tiny word tokenizer; `fields` go into `tokenizer_config.json`."""
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "a", "b", "c"])}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>", **fields}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


Break = Callable[[Path], None]


def _header(change: Callable[[dict[str, Any]], None]) -> Break:
    def apply(folder: Path) -> None:
        header = header_of(list(SHAPES))
        change(header)
        write(folder / SINGLE, header, b"".join(values(name) for name in SHAPES))

    return apply


def _field(name: str, **fields: Any) -> Break:
    return _header(lambda header: header[name].update(fields))


def _raw(text: bytes, data: bytes = b"", length: int | None = None) -> Break:
    return lambda folder: write(folder / SINGLE, text, data, length)


def _cut(count: int) -> Break:
    return lambda folder: os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size - count)


def _add_bytes(folder: Path) -> None:
    with (folder / SINGLE).open("ab") as file:
        file.write(b"\0" * 7)


def _text(name: str, content: str | bytes) -> Break:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def _config(**fields: Any) -> Break:
    return lambda folder: set_config(folder, **fields)


def _shifted(header: dict[str, Any], by: int) -> None:
    """Move every tensor after the first."""
    for name in list(SHAPES)[1:]:
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [begin + by, end + by]


def _link_out(name: str) -> Break:
    def apply(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return apply


def _pipe(folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(folder / "generation_config.json")


_NORM = "model.norm.weight"
_NORM_AT = header_of(list(SHAPES))[_NORM]["data_offsets"][0]

# what breaks a folder with one weights file, and a part of the message
FOLDERS: dict[str, tuple[Break, str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no `config.json`"),
    "empty config": (_text("config.json", ""), "not valid JSON"),
    "config is a list": (_text("config.json", "[]"), "must hold a JSON object"),
    "config has a key twice": (_text("config.json", '{"hidden_size": 8, "hidden_size": 9}'), "`hidden_size` twice"),
    "config is not UTF-8": (_text("config.json", b'{"a": "\xff"}'), "not UTF-8"),
    "config nests deeply": (_text("config.json", '{"a":' * 5000 + "1" + "}" * 5000), "nests too deeply"),
    "config nests a little too deeply": (_text("config.json", '{"a":' * 40 + "1" + "}" * 40), "nests deeper than 32"),
    "config with a number of 5000 digits": (_text("config.json", '{"hidden_size": ' + "9" * 5000 + "}"), "JSON"),
    "config of 11 MB": (_text("config.json", b" " * 11_000_000), "at most 10,000,000"),
    "hidden size 1e12": (_config(hidden_size=10**12), "`hidden_size`"),
    "hidden size negative": (_config(hidden_size=-8), "must be 1 to"),
    "hidden size fractional": (_config(hidden_size=8.5), "must be a whole number"),
    "hidden size a text": (_config(hidden_size="8"), "must be a whole number"),
    "hidden size of 30 digits": (_config(hidden_size=10**30), "more than 20 digits"),
    "layers 1e12": (_config(num_hidden_layers=10**12), "`num_hidden_layers`"),
    "layers zero": (_config(num_hidden_layers=0), "must be 1 to"),
    "more layers than tensors": (_config(num_hidden_layers=5000), "5,000 layers for 12 tensors"),
    "vocabulary 1e12": (_config(vocab_size=10**12), "`vocab_size`"),
    "vocabulary in a nested part": (_config(text_config={"vocab_size": 10**12}), "`text_config.vocab_size`"),
    "an unknown size 1e15": (_config(strange_cache_size=10**15), "no possible size"),
    "positions negative": (_config(max_position_embeddings=-1), "`max_position_embeddings`"),
    "code in the config": (_config(auto_map={"AutoConfig": "x.Y"}), "asks for Python code"),
    "code in a nested part": (_config(text_config={"auto_map": {"AutoConfig": "x.Y"}}), "`text_config.auto_map`"),
    "kernels": (_config(_attn_implementation="somebody/kernel"), "kernels are not fetched"),
    "kernels of a part": (_config(attn_implementation={"text_config": "a/b"}), "kernels are not fetched"),
    "another weights file": (_config(transformers_weights="../x.safetensors"), "names another weights file"),
    "quantised": (_config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised or compressed (gptq)"),
    "compressed": (_config(compression_config={"format": "pack"}), "quantised or compressed"),
    "encoder-decoder": (_config(is_encoder_decoder=True), "only decoder language models"),
    "architectures a number": (_config(architectures=3), "list of class names"),
    "code in the tokenizer": (
        _text("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["x.Y"]}}'),
        "Python code",
    ),
    "tokenizer file elsewhere": (
        _text("tokenizer_config.json", '{"vocab_file": "/etc/passwd"}'),
        "outside the model's",
    ),
    "tokenizer file above": (_text("tokenizer_config.json", '{"vocab_file": "../../"}'), "outside the model's"),
    "broken generation config": (_text("generation_config.json", "{"), "not valid JSON"),
    "adapter": (_text("adapter_config.json", '{"base_model_name_or_path": "x"}'), "holds an adapter"),
    "packed": (_text("weights.secateur", "x"), "packed model"),
    "no weights": (lambda folder: (folder / SINGLE).unlink(), "no `model.safetensors`"),
    "weights of another framework": (
        lambda folder: (folder / SINGLE).rename(folder / "tf_model.h5") and None,
        "no `model.safetensors`",
    ),
    "weights and an index": (_text(INDEX, "{}"), "both `model.safetensors` and"),
    "distributed checkpoint": (_text("shard-00000-model-00001-of-00001.safetensors", "x"), "distributed training"),
    "weights a link outwards": (_link_out(SINGLE), "outside the model's folder"),
    "config a link outwards": (_link_out("config.json"), "outside the model's folder"),
    "a pipe": (_pipe, "not a plain file"),
    "a folder for a file": (lambda folder: (folder / "tokenizer.json").mkdir(), "not a plain file"),
    "empty weights": (_text(SINGLE, b""), "truncated"),
    "header of 2**63": (_raw(b"{}", length=2**63), "header of 9,223"),
    "header of 101 MB": (_raw(b"{}", length=101_000_000), "at most 100,000,000"),
    "header longer than the file": (_raw(b"{}", length=1000), "truncated"),
    "header not JSON": (_raw(b"{hello}"), "not valid JSON"),
    "header a list": (_raw(b"[]"), "does not start with"),
    "header with no tensors": (_raw(b"{}"), "holds no tensors"),
    "header with a tensor twice": (_raw(b'{"a":1,"a":2}'), "`a` twice"),
    "header of lists": (_raw(b'{"a":' + b"[" * 100_000 + b"}"), "nests too deeply"),
    "header long for its tensors": (_raw(b'{"a":[' + b"1," * 1_000_000 + b"1]}"), "for only 0 tensors"),
    "metadata a number": (_header(lambda header: header.update(__metadata__={"a": 1})), "must be an object of texts"),
    "dtype unknown": (_field(_NORM, dtype="F128"), "unknown dtype `F128`"),
    "dtype complex": (_field(_NORM, dtype="C64", shape=[HIDDEN // 2]), "is complex"),
    "dtype packed": (_field(_NORM, dtype="F8_E4M3", shape=[HIDDEN * 4]), "quantised or packed"),
    "weight of integers": (_field(_NORM, dtype="I32"), "quantised or packed"),
    "shape too large": (_field(_NORM, shape=[HIDDEN + 1]), "but 32 bytes"),
    "shape overflows": (_field(_NORM, shape=[2**32, 2**32]), "but 32 bytes"),
    "shape wraps to the right size": (_field(_NORM, shape=[2**62, 2**3]), "but 32 bytes"),
    "shape negative": (_field(_NORM, shape=[-HIDDEN]), "all sizes from 0"),
    "shape fractional": (_field(_NORM, shape=[8.0]), "all sizes from 0"),
    "shape true": (_field(_NORM, shape=[True]), "all sizes from 0"),
    "shape of 20 dimensions": (_field(_NORM, shape=[1] * 19 + [HIDDEN]), "20 dimensions"),
    "offsets three": (_field(_NORM, data_offsets=[0, 1, 2]), "two data_offsets"),
    "offsets backwards": (_field(_NORM, data_offsets=[64, 32]), "but -32 bytes"),
    "offsets overlap": (_field(_NORM, data_offsets=[0, 32]), "overlaps another"),
    "offsets leave a gap": (_header(lambda header: _shifted(header, 4)), "leaves a gap"),
    "a field more": (_field(_NORM, extra=1), "must have a dtype"),
    "a name with NUL": (
        _header(lambda header: header.update({"a\0b": header.pop(_NORM)})),
        "has a tensor with the name",
    ),
    "file cut": (_cut(1), "truncated"),
    "file longer": (_add_bytes, "belong to no tensor"),
    "packed tensor": (
        _header(lambda header: header.update({"model.norm.qweight": header.pop(_NORM)})),
        "quantised or packed",
    ),
}

# what breaks a folder with two shards
SHARDS: dict[str, tuple[Break, str]] = {
    "absolute name": (lambda folder: set_index(folder, lambda m: m.update({_NORM: "/etc/passwd"})), "only plain names"),
    "name with slash": (
        lambda folder: set_index(folder, lambda m: m.update({_NORM: f"a/{SECOND}"})),
        "only plain names",
    ),
    "name going up": (
        lambda folder: set_index(folder, lambda m: m.update({_NORM: f"../{SECOND}"})),
        "only plain names",
    ),
    "name with backslash": (
        lambda folder: set_index(folder, lambda m: m.update({_NORM: f"..\\{SECOND}"})),
        "only plain names",
    ),
    "name with NUL": (lambda folder: set_index(folder, lambda m: m.update({_NORM: f"{SECOND}\0"})), "only plain names"),
    "name with a drive": (
        lambda folder: set_index(folder, lambda m: m.update({_NORM: f"C:{SECOND}"})),
        "only plain names",
    ),
    "name `..`": (lambda folder: set_index(folder, lambda m: m.update({_NORM: ".."})), "only plain names"),
    "name a number": (lambda folder: set_index(folder, lambda m: m.update({_NORM: 3})), "only plain names"),
    "name null": (lambda folder: set_index(folder, lambda m: m.update({_NORM: None})), "only plain names"),
    "name of a pickle": (lambda folder: set_index(folder, lambda m: m.update({_NORM: "x.bin"})), "only plain names"),
    "shard missing": (lambda folder: (folder / SECOND).unlink(), "which is missing"),
    "tensor in the other shard": (lambda folder: set_index(folder, lambda m: m.update({_NORM: FIRST})), "but it is in"),
    "tensor not listed": (lambda folder: set_index(folder, lambda m: m.pop(_NORM) and None), "does not list it"),
    "tensor listed only": (lambda folder: set_index(folder, lambda m: m.update(more=FIRST)), "does not have it"),
    "tensor in both shards": (lambda folder: write_sound(folder / SECOND, list(SHAPES)), "is in both"),
    "shard not listed": (
        lambda folder: write_sound(folder / "model-00003-of-00003.safetensors", [_NORM]),
        "does not name it",
    ),
    "index of texts": (_text(INDEX, '{"metadata": {}, "weight_map": ["x"]}'), "must have a `weight_map`"),
    "index without metadata": (_text(INDEX, '{"weight_map": {"a": "b.safetensors"}}'), "must have `metadata`"),
    "index with a key twice": (_text(INDEX, '{"weight_map": {"a": "b", "a": "c"}}'), "`a` twice"),
    "a shard a link outwards": (_link_out(SECOND), "outside the model's folder"),
}

# what only the library can see: each is refused by `load`, before memory is taken
MISFITS: dict[str, tuple[Break, str]] = {
    "hidden size differs": (_config(hidden_size=16), "has shape"),
    "vocabulary differs": (_config(vocab_size=10_000_000), "[10000000, 8]"),
    "heads differ": (_config(num_attention_heads=4, num_key_value_heads=4, head_dim=2), "has shape"),
    "inner size huge": (_config(intermediate_size=2**24), "has shape"),
    "a layer more": (_config(num_hidden_layers=2), "is missing"),
    "a tensor gone": (
        lambda folder: write_sound(folder / SINGLE, [name for name in SHAPES if "o_proj" not in name]),
        "o_proj.weight` of",
    ),
    "tie claimed, head stored elsewhere": (
        lambda folder: write_sound(folder / SINGLE, [name for name in SHAPES if name != "lm_head.weight"]),
        "`lm_head.weight`",
    ),
    "unknown family": (_config(model_type="nonesuch"), "cannot be loaded"),
    "no causal model": (_config(model_type="vit", architectures=["ViTModel"]), "no causal language model"),
    "a model without head": (_config(architectures=["LlamaModel"]), "holds a LlamaModel"),
    "a classifier": (_config(architectures=["LlamaForSequenceClassification"]), "not a causal language model"),
    "bidirectional": (_config(model_type="bert", architectures=["BertLMHeadModel"]), "not a causal language model"),
}
