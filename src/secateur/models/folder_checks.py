"""Whether a model folder is what it says, decided before any library opens it.

Libraries trust the names in a shard index, follow links, run code that a configuration asks for, allocate what a size
says, and fill tensors that are missing with random numbers. So each of these is looked at here first, with the file
system and JSON alone: no tensor is read, nothing is allocated beyond the headers.
"""

from __future__ import annotations

import re
import stat
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from secateur.core.errors import InputError
from secateur.models.config_checks import check_code, check_config, layers
from secateur.models.safetensors_header import FLOATS, MAX_TENSORS, Stored, read_header
from secateur.models.strict_json import MEGABYTE, read_object

PACKED_MARKER = "weights.secateur"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json",
    "sentencepiece.bpe.model", "tiktoken.model", "tokenizer_config.json",
)  # fmt: skip

_READ = {".json", ".safetensors", ".model", ".txt", ".jinja", ".bin", ".tiktoken", ".gguf", ".py", ".secateur"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
_OTHER_FRAMEWORKS = {".h5", ".msgpack", ".onnx", ".tflite"}
_PACKED_TENSOR = re.compile(
    r"\.(weight_packed|weight_scale|weight_scale_inv|weight_zero_point|qweight|qzeros|g_idx|SCB|absmax|quant_map"
    r"|compressed|bitmask|row_offsets)$|_proj_(blocks|scales)$"
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")


class Survey(NamedTuple):
    """What the checks found in a sound folder.

    Attributes:
        config: the content of `config.json`.
        weights: the files with the weights, in the order of their names.
        pickled: whether they are pickles.
        tensors: what the headers say, by tensor name; empty for pickles.
        has_tokenizer: whether there is any tokenizer file.
        runs_code: whether the model brings code along, which was allowed.
    """

    config: dict[str, Any]
    weights: tuple[Path, ...]
    pickled: bool
    tensors: dict[str, Stored]
    has_tokenizer: bool
    runs_code: bool

    def stored_dtype(self) -> str | None:
        """Return the floating dtype of most bytes of the weights, in the words of safetensors; None if unknown."""
        sizes: Counter[str] = Counter()
        for stored in self.tensors.values():
            if stored.dtype in FLOATS:
                sizes[stored.dtype] += stored.end - stored.begin
        return sizes.most_common(1)[0][0] if sizes else None


def check_folder(path: Path, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> None:
    """Check everything about a model folder that can be checked without a library.

    Args:
        path: a `save_pretrained` folder.
        allow_pickle: accept weights that are only there as pickle.
        trust_remote_code: accept code that comes with the model.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    survey(path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)


def survey(path: Path, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Survey:
    """Do what `check_folder` does and return what was found.

    Raises:
        InputError: as `check_folder`.
    """
    if not path.is_dir():
        raise InputError(f"`{path}` is not a folder")
    try:
        names = _readable_names(path)
        if PACKED_MARKER in names:
            raise InputError(
                f"`{path}` is a packed model (`{PACKED_MARKER}`), not a checkpoint", hint="open it with `secateur.load`"
            )
        if "config.json" not in names:
            raise InputError(
                f"`{path}` has no `config.json`, so it is not a model folder",
                hint=_hint_for(names) or "name a folder written by `save_pretrained`",
            )
        config = read_object(path / "config.json", 10 * MEGABYTE)
        check_config(config, str(path / "config.json"), trust_remote_code=trust_remote_code)
        code = _check_side_files(path, names, trust_remote_code) or "auto_map" in config
        weights, pickled = _weights(path, names, allow_pickle)
        tensors = {} if pickled else _check_tensors(path, weights, names)
    except OSError as error:
        raise InputError(f"`{error.filename or path}` cannot be read: {error.strerror}") from error
    if tensors and layers(config) > len(tensors):
        raise InputError(f"`{path / 'config.json'}` states {layers(config):,} layers for {len(tensors):,} tensors")
    return Survey(config, weights, pickled, tensors, any(name in names for name in TOKENIZER_FILES), bool(code))


def check_settings(path: Path) -> dict[str, Any]:
    """Return the checked configuration of a folder that holds configuration and tokenizer, but no weights of its own.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    try:
        names = _readable_names(path)
        if "config.json" not in names:
            raise InputError(f"`{path}` has no `config.json`")
        config = read_object(path / "config.json", 10 * MEGABYTE)
        check_config(config, str(path / "config.json"))
        _check_side_files(path, names, False)
    except OSError as error:
        raise InputError(f"`{error.filename or path}` cannot be read: {error.strerror}") from error
    return config


def shard_names(index: Path) -> list[str]:
    """Return the names of the files in a shard index, which need not be there yet.

    Raises:
        InputError: the index is malformed, or names anything but plain files of its own folder.
    """
    return sorted(set(_read_index(index).values()))


def check_file(path: Path, folder: Path) -> None:
    """Refuse a file that is not a plain one, or a link that leaves `folder`.

    The links that the Hub cache makes, from `snapshots/<revision>` to `blobs` of the same repository, may stay.

    Raises:
        InputError: naming the file.
    """
    if path.is_symlink():
        target, home = path.resolve(), folder.resolve()
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
        if not target.is_relative_to(home) and target.parent != blobs:
            raise InputError(
                f"`{path}` is a link to `{target}`, which is outside the model's folder", hint="copy the file into it"
            )
    if not stat.S_ISREG(path.stat().st_mode):
        raise InputError(f"`{path}` is not a plain file")


def _readable_names(path: Path) -> set[str]:
    """Return the names of the files that some library would read, after checking that each is a plain file."""
    names: set[str] = set()
    for entry in sorted(path.iterdir()):
        if entry.suffix in _READ | _PICKLES | _OTHER_FRAMEWORKS:
            check_file(entry, path)
            names.add(entry.name)
    for folder in ("additional_chat_templates", "custom_generate"):
        if (path / folder).is_symlink():
            raise InputError(f"`{path / folder}` is a link", hint="copy the folder")
        if (path / folder).is_dir():
            for entry in sorted((path / folder).iterdir()):
                check_file(entry, path)
    return names


def _check_side_files(path: Path, names: set[str], trust_remote_code: bool) -> bool:
    """Check the small JSON files beside `config.json`; return whether one of them asks for code."""
    if "adapter_config.json" in names:
        raise InputError(
            f"`{path}` holds an adapter (`adapter_config.json`), not a whole model", hint="merge it into its base model"
        )
    code = False
    if "tokenizer_config.json" in names:
        where = path / "tokenizer_config.json"
        found = read_object(where, 50 * MEGABYTE)
        check_code(found, str(where), trust_remote_code=trust_remote_code)
        code = "auto_map" in found
        for key, value in found.items():
            if key.endswith(("_file", "_files")):
                _check_inside(key, value, where)
    for name in ("generation_config.json", "special_tokens_map.json", "added_tokens.json"):
        if name in names:
            read_object(path / name, 50 * MEGABYTE)
    return code


def _check_inside(key: str, value: Any, where: Path) -> None:
    """Refuse a file name of the tokenizer's configuration that leads to an existing file outside the folder."""
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str) or key == "special_tokens_map_file":  # the latter is written, and never read
            continue
        outside = "\0" in item or "\\" in item
        if not outside and "/" in item:
            target = where.parent / item
            outside = not target.resolve().is_relative_to(where.parent.resolve()) and target.exists()
        if outside or item == "..":
            raise InputError(f"`{key}` in `{where}` names the file {item[:120]!r} outside the model's folder")


def _weights(path: Path, names: set[str], allow_pickle: bool) -> tuple[tuple[Path, ...], bool]:
    """Return the files that hold the weights, and whether they are pickles."""
    if SINGLE in names and INDEX in names:
        raise InputError(f"`{path}` has both `{SINGLE}` and `{INDEX}`", hint="remove the one that is not meant")
    if any(name.startswith("shard-") and name.endswith(".safetensors") for name in names):
        raise InputError(f"`{path}` is a distributed training checkpoint", hint="consolidate it first")
    if SINGLE in names:
        return (path / SINGLE,), False
    if INDEX in names:
        return tuple(path / name for name in sorted(set(_weight_map(path / INDEX, names).values()))), False
    pickles = sorted(name for name in names if Path(name).suffix in _PICKLES)
    if pickles and not allow_pickle:
        raise InputError(
            f"`{path}` has its weights only as pickle (`{pickles[0]}`), which can run code when it is opened",
            hint="convert it to safetensors, or pass --allow-pickle, which reads tensors only",
        )
    if PICKLE in names:
        return (path / PICKLE,), True
    if PICKLE_INDEX in names:
        return tuple(path / name for name in sorted(set(_weight_map(path / PICKLE_INDEX, names).values()))), True
    raise InputError(f"`{path}` has no `{SINGLE}` and no `{INDEX}`", hint=_hint_for(names))


def _hint_for(names: set[str]) -> str | None:
    for name in sorted(names):
        if name.endswith(".gguf"):
            return f"name the file itself: {name}"
        if Path(name).suffix in _OTHER_FRAMEWORKS:
            return f"`{name}` is of another framework: convert it to safetensors"
    return None


def _weight_map(index: Path, names: set[str]) -> dict[str, str]:
    """Return the checked map of a shard index, whose files must be among `names`."""
    mapped = _read_index(index)
    for name in set(mapped.values()) - names:
        raise InputError(f"`weight_map` in `{index}` names `{name[:120]}`, which is missing")
    return mapped


def _read_index(index: Path) -> dict[str, str]:
    """Return the map from tensor to file name of a shard index; only plain names of the same folder are let through."""
    found = read_object(index, 100 * MEGABYTE)
    mapped = found.get("weight_map")
    if not isinstance(mapped, dict) or not mapped:
        raise InputError(f"`{index}` must have a `weight_map` from tensor names to file names")
    if not isinstance(found.get("metadata"), dict):
        raise InputError(f"`{index}` must have `metadata`, an object")
    if len(mapped) > MAX_TENSORS:
        raise InputError(f"`{index}` lists {len(mapped):,} tensors, at most {MAX_TENSORS:,} are allowed")
    suffix = ".safetensors" if index.name == INDEX else ".bin"
    for name in {item if isinstance(item, str) else None for item in mapped.values()}:
        if name is None or re.search(r"[/\\:\x00-\x1f]", name) or name == ".." or not name.endswith(suffix):
            raise InputError(
                f"`weight_map` in `{index}` names the file {str(name)[:120]!r}, but only plain names of `*{suffix}` "
                "files in the same folder are allowed"
            )
    return mapped


def _check_tensors(path: Path, weights: tuple[Path, ...], names: set[str]) -> dict[str, Stored]:
    """Return the tensors of all files after comparing the headers with each other and with the index."""
    tensors: dict[str, Stored] = {}
    places: dict[str, str] = {}
    for file in weights:
        for name, stored in read_header(file).tensors.items():
            if name in tensors:
                raise InputError(f"tensor `{name}` is in both `{places[name]}` and `{file.name}` of `{path}`")
            tensors[name], places[name] = stored, file.name
    if not tensors:
        raise InputError(f"`{weights[0]}` holds no tensors")
    if INDEX in names:
        _compare_index(path / INDEX, _weight_map(path / INDEX, names), places)
        stray = sorted(name for name in names if _SHARD.search(name) and path / name not in weights)
        if stray:
            raise InputError(f"`{path / stray[0]}` looks like a shard, but `{INDEX}` does not name it")
    for name, stored in tensors.items():
        if stored.dtype == "C64":
            raise InputError(f"tensor `{name}` of `{path}` is complex, which is not supported")
        small = stored.dtype.startswith(("F8", "F6", "F4"))
        packed = _PACKED_TENSOR.search(name) or (name.endswith(".weight") and stored.dtype not in FLOATS)
        if small or packed:
            raise InputError(
                f"tensor `{name}` of `{path}` ({stored.dtype}) is quantised or packed",
                hint="decompress first: save the model in float32, bfloat16 or float16",
            )
        if stored.dtype in FLOATS and prod(stored.shape) == 0 and name.endswith(".weight"):
            raise InputError(f"tensor `{name}` of `{path}` has the empty shape {list(stored.shape)}")
    return tensors


def _compare_index(index: Path, mapped: dict[str, str], places: dict[str, str]) -> None:
    for name in mapped.keys() - places.keys():
        raise InputError(f"`{index}` puts tensor `{name[:200]}` into `{mapped[name]}`, which does not have it")
    for name, place in places.items():
        if name not in mapped:
            raise InputError(f"tensor `{name}` is in `{place}`, but `{index}` does not list it")
        if mapped[name] != place:
            raise InputError(f"`{index}` puts tensor `{name}` into `{mapped[name]}`, but it is in `{place}`")
