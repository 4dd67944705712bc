"""Weights of a model on their way to disk, one tensor at a time.

`save_pretrained` of the libraries touches the whole model before it writes the first shard. Here the shards are planned
on shapes alone, then each tensor is fetched, written and given back, so a mapped model is never resident as a whole.
Names on disk are those that `transformers` writes (experts apart, old prefixes restored), ties are written once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.core import faults
from secateur.core.errors import InputError
from secateur.models.pages import Mappings

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TORCH_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_PIECE = 64_000_000  # bytes handed to the system at once


class _Entry(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    group: int

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_weights(model: nn.Module, folder: Path, max_shard: int) -> list[Path]:
    """Write the weights of a `transformers` model to safetensors files that `from_pretrained` reads.

    Args:
        model: not changed.
        folder: where `model.safetensors`, or shards with their index, are written.
        max_shard: bytes of a shard at most; a larger tensor gets its own.

    Returns:
        The files with weights.

    Raises:
        InputError: a tensor has no values (meta), a dtype that no reader knows, or belies the tie that the
            configuration states.
        OSError: the disk is full or read-only.
    """
    groups = _groups(_unique_tensors(model))
    entries = [
        _Entry(name, tensor.dtype, tuple(tensor.shape), index)
        for index, group in enumerate(groups)
        for name, tensor in _as_on_disk(model, {name: tensor.to("meta") for name, tensor in group.items()}).items()
    ]
    for entry in entries:
        if entry.dtype not in _NAMES:
            raise InputError(f"tensor `{entry.name}` is of {entry.dtype}, which is not saved", hint="decompress first")
    shards = _shards(entries, max_shard)
    files = [folder / _file_name(index, len(shards)) for index in range(len(shards))]
    mappings = Mappings()
    for file, shard in zip(files, shards, strict=True):
        _write_shard(model, file, shard, groups, mappings)
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(torch.Size(entry.shape).numel() for entry in entries),
                "total_size": sum(entry.nbytes for entry in entries),
            },
            "weight_map": {entry.name: file.name for file, shard in zip(files, shards, strict=True) for entry in shard},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return files


def belies_tie(model: nn.Module) -> bool:
    """Return whether the configuration ties head and embedding, but the head was stored with values of its own.

    `transformers` then leaves them apart; other programs follow the configuration and drop the stored head.
    """
    live: Any = model
    if not getattr(live.config, "tie_word_embeddings", False):
        return False
    head, words = live.get_output_embeddings(), live.get_input_embeddings()
    declared = getattr(model, "all_tied_weights_keys", None)
    return head is not None and not declared and head.weight.data_ptr() != words.weight.data_ptr()


def _unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict without the names that loading fills from others."""
    state: dict[str, Tensor] = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in (getattr(model, "_keys_to_ignore_on_save", None) or ())
    }
    for name, tensor in state.items():
        if tensor.device.type == "meta":
            raise InputError(f"tensor `{name}` has no values (it is on the meta device)", hint="load the weights first")
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in tied.items():
        if target not in state or source not in state:
            continue
        here, there = state[target], state[source]
        if here.data_ptr() != there.data_ptr() and not torch.equal(here, there):
            raise InputError(
                f"`{target}` differs from `{source}`, but the configuration ties them, so one would be lost",
                hint="set `tie_word_embeddings` to false in the model's configuration",
            )
        del state[target]
    return state


def _groups(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the tensors by block: what is stored in several pieces, such as experts, never spans two blocks."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        found = re.match(r"(.*?\.\d+)\.", name)
        groups.setdefault(found[1] if found else name, {})[name] = tensor
    return [groups[name] for name in sorted(groups, key=_natural)]


def _as_on_disk(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names, and in the pieces, in which `transformers` stores them."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    # the order must not depend on whether the model was loaded or built, so that equal models are equal files
    return dict(sorted(reverted.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    """Return the key that sorts `layers.10` after `layers.9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _shards(entries: list[_Entry], max_shard: int) -> list[list[_Entry]]:
    """Return the entries in files of at most `max_shard` bytes, wide dtypes first so that each tensor is aligned."""
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in shards]


def _file_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _write_shard(
    model: nn.Module, file: Path, shard: list[_Entry], groups: list[dict[str, Tensor]], mappings: Mappings
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in shard:
        offsets = [at, at + entry.nbytes]
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        current, pieces = -1, dict[str, Tensor]()
        for entry in shard:
            if entry.group != current:
                current, pieces = entry.group, _as_on_disk(model, dict(groups[entry.group]))
            faults.hit("weights.write")
            tensor = pieces[entry.name]
            _write_tensor(opened, tensor)
            mappings.release([tensor])
        faults.hit("weights.sync")
        opened.flush()
        os.fsync(opened.fileno())


def _write_tensor(opened: Any, tensor: Tensor) -> None:
    """Write the bytes of a tensor in row order; a view of contiguous memory is not copied."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 0:
        return
    data = flat.view(torch.uint8).numpy().data
    for start in range(0, len(data), _PIECE):
        opened.write(data[start : start + _PIECE])
