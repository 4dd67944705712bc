"""The packed format: one bit for every weight, and the values of those that are not zero.

A folder of this format holds

    weights.secateur        all tensors, in a safetensors container
    model/                  config.json, generation_config.json and the tokenizer, as `save_pretrained` writes them
    secateur.json           how the model was made, if that is known

Tensors have the names of the model's `state_dict` in memory. A tensor is packed where that is smaller, and then three
entries stand for it (`packing.py` defines their content):

    <name>.bitmask          uint8 (rows, ceil(columns / 8))
    <name>.compressed       (kept,) in the tensor's own dtype
    <name>.shape            int64 (dimensions,)

The rest is stored as it is. The header's metadata has `format` "secateur-bitmask", `version` "1", `architecture` (the
class of transformers) and `tied` (JSON, `{second name: first name}` of tensors that are one). The configuration is in a
sub-folder because `AutoModel` opens any folder with a `config.json` and fills missing weights with random numbers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import InputError
from secateur.export.container import DTYPES, Slot, create
from secateur.export.packing import Packed, kept_count, pack_pieces, unpack
from secateur.export.skeleton import empty_model, fill, tokenizer_of
from secateur.models.fingerprint import fingerprint as content_fingerprint
from secateur.models.pages import Mappings
from secateur.models.quiet import quiet
from secateur.models.safetensors_header import Header, read_header
from secateur.models.save import save_settings, save_side, save_tokenizer
from secateur.models.strict_json import parse

WEIGHTS = "weights.secateur"
MODEL = "model"
FORMAT = "secateur-bitmask"
VERSION = "1"

VALUES, BITS, SHAPE = ".compressed", ".bitmask", ".shape"
ENTRY = 100  # bytes that one more entry takes in the header, about
FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


def write(model: nn.Module, tokenizer: Any, folder: Path, side: dict[str, Any] | None) -> list[str]:
    """Write `model` into `folder`, one tensor in memory at a time.

    Give it the temporary folder of `models/publish.py`, which makes the result appear whole or not at all.

    Args:
        model: a model of transformers, on any device.
        tokenizer: its tokenizer, or None to leave it out.
        folder: an existing empty folder.
        side: how the model was made, for `secateur.json`, see `models/save.py`.

    Returns:
        Notes for the report, one for each setting that could not be saved as it was.

    Raises:
        InputError: if the model is quantised, has no weights in memory, or is of a class that transformers lacks.
        StateError: if the model changes while it is written.
    """
    import transformers

    architecture = type(model).__name__
    if getattr(transformers, architecture, None) is not type(model):
        raise InputError(
            f"`{architecture}` is no model class of transformers, so it could not be read back",
            hint="export it with the format `checkpoint`",
        )
    if getattr(model, "hf_quantizer", None) is not None or hasattr(model.config, "quantization_config"):
        raise InputError("the model is quantised", hint="decompress it first")
    tensors, tied = _state(model)
    mappings = Mappings()
    slots: dict[str, dict[str, Slot]] = {}
    for name, tensor in tensors.items():
        slots[name] = _slots(name, tensor)
        mappings.release([tensor])
    metadata = {"format": FORMAT, "version": VERSION, "architecture": architecture, "tied": json.dumps(tied)}
    entries = {entry: slot for group in slots.values() for entry, slot in group.items()}
    with create(folder / WEIGHTS, entries, metadata) as container:
        for name, tensor in tensors.items():
            if name in slots[name]:
                container.append(name, tensor.cpu())
            else:
                for values, bits in pack_pieces(tensor):
                    container.append(name + VALUES, values)
                    container.append(name + BITS, bits)
                container.append(name + SHAPE, torch.tensor(tensor.shape))
            mappings.release([tensor])
    (folder / MODEL).mkdir()
    with quiet():
        notes = save_settings(model, folder / MODEL)
        save_tokenizer(tokenizer, folder / MODEL)
    save_side(side, folder)
    return notes


def read(folder: Path, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """Return the model of a folder that `write` made, in eval mode on CPU, and its tokenizer or None.

    Tensors that are not packed stay memory-mapped until they are used.

    Args:
        folder: the folder.
        dtype: float dtype to convert to; None keeps every tensor's own.

    Raises:
        InputError: if a file is missing, damaged, of an unknown version, or does not fit the configuration.
    """
    from safetensors import safe_open

    weights = folder / WEIGHTS
    header = _header(weights)
    with safe_open(str(weights), "pt") as file:
        architecture, tied = _check_metadata(file.metadata() or {}, weights)
        names = _names(header, weights)
        skeleton = empty_model(folder / MODEL, architecture, len(names))
        expected = skeleton.state_dict()
        _check_names(names.keys(), expected.keys(), tied, weights)
        state: dict[str, Tensor] = {}
        for name, packed in names.items():
            _check_entry(header, name, packed, expected[name], weights)
            tensor = _unpacked(file, name, expected[name].shape, weights) if packed else file.get_tensor(name)
            state[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    return fill(skeleton, state, tied, folder / MODEL), tokenizer_of(folder / MODEL, skeleton.config)


def is_packed(folder: Path) -> bool:
    """Return whether `folder` is of this format."""
    return (folder / WEIGHTS).is_file()


def fingerprint(folder: Path) -> str:
    """Return 64 hexadecimal digits that name the model in `folder`, see `models/fingerprint.py`."""
    parts = [content_fingerprint(folder / WEIGHTS), content_fingerprint(folder / MODEL)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes that `tensor` takes in a file of this format, packed or as it is, whichever is smaller."""
    return sum(slot.nbytes for slot in _slots("", tensor).values())


def _slots(name: str, tensor: Tensor) -> dict[str, Slot]:
    """Return the entries that stand for `tensor`: three if that is smaller, else itself."""
    plain = {name: Slot(tensor.dtype, tuple(tensor.shape))}
    if tensor.dim() < 2 or not tensor.numel():
        return plain
    columns = tensor.shape[-1]
    packed = {
        name + VALUES: Slot(tensor.dtype, (kept_count(tensor),)),
        name + BITS: Slot(torch.uint8, (tensor.numel() // columns, -(-columns // 8))),
        name + SHAPE: Slot(torch.int64, (tensor.dim(),)),
    }
    smaller = sum(slot.nbytes for slot in packed.values()) + 2 * ENTRY < plain[name].nbytes
    return packed if smaller else plain


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return every tensor of the model once, and `{second name: first name}` for those that are one."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise InputError(f"the tensor `{name}` is not in memory", hint="load the model without offloading")
        if tensor.dtype not in DTYPES:
            raise InputError(f"the tensor `{name}` has the dtype {tensor.dtype}, which cannot be stored")
        if name.endswith((VALUES, BITS, SHAPE)):
            raise InputError(f"the tensor `{name}` has a name that the format keeps for itself")
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        owner = first.setdefault(place, name) if tensor.numel() else name
        if owner == name:
            tensors[name] = tensor
        else:
            tied[name] = owner
    return tensors, tied


def _header(weights: Path) -> Header:
    try:
        return read_header(weights)
    except OSError as error:
        raise InputError(
            f"`{weights}` cannot be read: {error.strerror}", hint="a folder of the bitmask format has this file"
        ) from error


def _check_metadata(metadata: dict[str, str], weights: Path) -> tuple[str, dict[str, str]]:
    """Return the architecture and `{second name: first name}` of tied tensors."""
    if metadata.get("format") != FORMAT:
        raise InputError(f"`{weights}` has the format `{metadata.get('format')}`, expected `{FORMAT}`")
    if metadata.get("version") != VERSION:
        raise InputError(
            f"`{weights}` has version `{metadata.get('version')}` of its format, this library reads version {VERSION}",
            hint="update secateur",
        )
    tied = parse(metadata.get("tied", "{}").encode(), f"{weights}, tied")
    if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied.values()):
        raise InputError(f"`tied` in `{weights}` must map names to names")
    if "architecture" not in metadata:
        raise InputError(f"`{weights}` does not say its `architecture`")
    return metadata["architecture"], tied


def _names(header: Header, weights: Path) -> dict[str, bool]:
    """Return `{tensor name: whether it is packed}`."""
    names: dict[str, bool] = {}
    for entry in header.tensors:
        ending = next((ending for ending in (VALUES, BITS, SHAPE) if entry.endswith(ending)), "")
        name = entry.removesuffix(ending)
        missing = [name + part for part in (VALUES, BITS, SHAPE) if name + part not in header.tensors] if ending else []
        if missing:
            raise InputError(f"`{weights}` has `{entry}`, but no `{missing[0]}`")
        if ending and name in header.tensors:
            raise InputError(f"`{weights}` has `{name}` both packed and plain")
        names[name] = bool(ending)
    return dict(sorted(names.items()))


def _check_names(stored: Any, known: Any, tied: dict[str, str], weights: Path) -> None:
    """Raise InputError unless the file holds every tensor of the model once, by its own name or by that of another."""
    for second, first in tied.items():
        if second not in known or second in stored or first not in stored:
            raise InputError(f"`{weights}` ties `{second}` to `{first}`, which the model or the file lacks")
    for what, names in (("lacks", known - stored - tied.keys()), ("has the unknown", stored - known)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"`{weights}` {what} tensor `{min(names)}`{more}")


def _check_entry(header: Header, name: str, packed: bool, expected: Tensor, weights: Path) -> None:
    """Raise InputError unless the entry has the dtype of the model's tensor (any float for a float) and its shape."""
    entry = header.tensors[name + VALUES if packed else name]
    allowed = FLOATS if expected.dtype in FLOATS else {expected.dtype}
    if entry.dtype not in {DTYPES.get(dtype) for dtype in allowed}:
        raise InputError(
            f"tensor `{name}` in `{weights}` is stored as {entry.dtype}, but the model has {expected.dtype}"
        )
    if not packed and entry.shape != tuple(expected.shape):
        raise _wrong_shape(name, list(entry.shape), expected.shape, weights)


def _unpacked(file: Any, name: str, expected: torch.Size, weights: Path) -> Tensor:
    shape = file.get_tensor(name + SHAPE)
    if shape.dtype != torch.int64 or shape.tolist() != list(expected):  # before anything of that size is allocated
        raise _wrong_shape(name, shape.tolist(), expected, weights)
    return unpack(Packed(file.get_tensor(name + VALUES), file.get_tensor(name + BITS), tuple(expected)), name)


def _wrong_shape(name: str, found: Any, expected: torch.Size, weights: Path) -> InputError:
    return InputError(
        f"tensor `{name}` in `{weights}` has the shape {str(found)[:80]}, but the configuration says {list(expected)}"
    )
