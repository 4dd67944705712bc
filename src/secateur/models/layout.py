"""Where the heads and channels of a block live: the rows and columns of its linears that belong to one unit.

A *head* is a block of columns of `o` and the rows of `q` (and of `k`, `v` of its group) that fill them; a *channel* is a
column of `down` and the rows of `up` and `gate` that fill it. Projections are found by the names that families give
them, fused ones (`qkv_proj`, `gate_up_proj`, `c_attn`) included; sizes are read from the weights, so that blocks of
uneven widths work too. What does not fit together is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.core.errors import InputError
from secateur.models.blocks import Blocks, architecture, find_blocks

Kind = Literal["q", "k", "v", "o", "gate", "up", "down"]

KINDS: tuple[Kind, ...] = ("q", "k", "v", "o", "gate", "up", "down")
HEADS: tuple[Kind, ...] = ("q", "k", "v", "o")
COLUMNS: tuple[Kind, ...] = ("o", "down")  # kinds whose units are columns, the inputs of the matrix
FAMILIES = "LLaMA, Mistral, Qwen2, Qwen3, Gemma, Phi-3, OPT and GPT-2"

# names inside a block: attention projections as (q, k, v) or one fused matrix, then the MLP's as (gate | None, up)
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_FUSED_ATTENTION = ("qkv_proj", "c_attn")
_OUTPUTS = ("o_proj", "out_proj", "c_proj")
_FUSED_MLP = "gate_up_proj"
_MLPS = ((_FUSED_MLP, "down_proj"), ("up_proj", "down_proj"), ("fc1", "fc2"), ("c_fc", "c_proj"))


@dataclass(frozen=True)
class Place:
    """The part of one linear that holds all units of one kind, in order.

    Attributes:
        module: module name in the model ("model.layers.0.mlp.down_proj").
        start: the first row, or column, of the part.
        size: rows, or columns, of one unit.
        count: how many units there are.
        columns: whether units are columns (inputs), else rows (outputs), of the weight `(out_features, in_features)`.
    """

    module: str
    start: int
    size: int
    count: int
    columns: bool

    def index(self, units: Tensor) -> Tensor:
        """Return int64 `(units * size,)`, the rows or columns of the int64 `units`, unit by unit."""
        first = self.start + units.reshape(-1, 1) * self.size
        return (first + torch.arange(self.size)).reshape(-1)

    def lines(self, matrix: Tensor) -> Tensor:
        """Return a view `(units * size, other side)` of the part of a `matrix` `(out_features, in_features)`."""
        return (matrix.T if self.columns else matrix)[self.start : self.start + self.size * self.count]


@dataclass(frozen=True)
class BlockLayout:
    """The places of one block; a kind that the block does not have (`gate` in OPT) is not among them."""

    name: str
    places: dict[Kind, Place]

    @property
    def queries_per_group(self) -> int:
        """How many query heads read one head of keys and values."""
        return self.places["q"].count // self.places["k"].count

    def unit_place(self, kind: Kind) -> Place:
        """Return the columns that the units of `kind` fill: of `o` for heads, of `down` for channels."""
        return self.places["o" if kind in HEADS else "down"]


@dataclass(frozen=True)
class Layout:
    """The layouts of all blocks of a model, and what it is called in messages."""

    model: str
    blocks: tuple[BlockLayout, ...]

    def kinds(self) -> tuple[Kind, ...]:
        """Return the kinds that every block has."""
        return tuple(kind for kind in KINDS if all(kind in block.places for block in self.blocks))


def find_layout(model: nn.Module, blocks: Blocks | None = None) -> Layout:
    """Return where the heads and channels of `model` live.

    Args:
        model: a decoder-only language model without adapters.
        blocks: from `find_blocks(model)`, if known already.

    Raises:
        InputError: naming the architecture and the block, if its projections go by other names, are fused head by
            head, are experts, or have sizes that do not fit together; or as `find_blocks` does.
    """
    blocks = blocks or find_blocks(model)
    name = architecture(model)
    config = getattr(model, "config", None)
    found = [_block_layout(block, path, name, config) for path, block in zip(blocks.names, blocks.modules, strict=True)]
    return Layout(name, tuple(found))


def oriented(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return `tensor`, stored as the weight of the linear `module` is, as a view `(out_features, in_features)`."""
    return tensor.T if isinstance(module, Conv1D) else tensor


def _block_layout(block: nn.Module, path: str, model: str, config: object) -> BlockLayout:
    linears = {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module.weight.dim() == 2
    }
    leaves: dict[str, list[str]] = {}
    for name in linears:
        leaves.setdefault(name.rpartition(".")[2], []).append(name)
    sizes = {name: _shape(module) for name, module in linears.items()}  # (out_features, in_features)
    places = _attention(leaves, sizes, block, config) | _mlp(leaves, sizes)
    missing = [f"`{kind}`" for kind in ("q", "k", "v", "o", "up", "down") if kind not in places]
    if missing:
        raise InputError(
            f"the heads and channels of {model} cannot be told: block `{path}` has no linear that is known to hold its "
            f"{', '.join(missing)}",
            hint=f"families that work: {FAMILIES}, and others that name their projections like them",
        )
    query, key, output, down = places["q"], places["k"], places["o"], places["down"]
    if query.count != output.count or key.count != places["v"].count or query.count % key.count:
        raise InputError(
            f"the heads of {model} do not fit together in block `{path}`: {query.count} of queries, {key.count} of "
            f"keys, {places['v'].count} of values, {output.count} that enter `{output.module}`"
        )
    for kind in ("up", "gate"):
        if kind in places and places[kind].count != down.count:
            raise InputError(
                f"the channels of {model} do not fit together in block `{path}`: {places[kind].count} leave "
                f"`{places[kind].module}` and {down.count} enter `{down.module}`"
            )
    return BlockLayout(
        path,
        {
            kind: Place(f"{path}.{place.module}", place.start, place.size, place.count, place.columns)
            for kind, place in places.items()
        },
    )


def _attention(
    leaves: dict[str, list[str]], sizes: dict[str, tuple[int, int]], block: nn.Module, config: object
) -> dict[Kind, Place]:
    """Return the places of the attention, module names inside the block; nothing where it is not known."""
    names = [leaves[leaf][0] for leaf in _SEPARATE if len(leaves.get(leaf, ())) == 1]
    fused = next((leaves[leaf][0] for leaf in _FUSED_ATTENTION if len(leaves.get(leaf, ())) == 1), None)
    first = names[0] if len(names) == 3 else fused
    if first is None:
        return {}
    owner = first.rpartition(".")[0]
    outputs = [f"{owner}.{leaf}" for leaf in _OUTPUTS if f"{owner}.{leaf}" in sizes]
    size = getattr(block.get_submodule(owner), "head_dim", None) or getattr(config, "head_dim", None)
    if len(outputs) != 1 or not isinstance(size, int) or sizes[outputs[0]][1] % size:
        return {}
    heads = sizes[outputs[0]][1] // size
    places: dict[Kind, Place] = {"o": Place(outputs[0], 0, size, heads, True)}
    if fused is not None and len(names) < 3:
        groups, rest = divmod(sizes[fused][0] - heads * size, 2 * size)  # rows: all of q, then all of k, then all of v
        if groups < 1 or rest:
            return {}
        counts = (heads, groups, groups)
        starts = (0, heads * size, (heads + groups) * size)
        for kind, start, count in zip(HEADS, starts, counts, strict=False):
            places[kind] = Place(fused, start, size, count, False)
        return places
    if any(sizes[name][0] % size for name in names):
        return {}
    for kind, name in zip(HEADS, names, strict=False):
        places[kind] = Place(name, 0, size, sizes[name][0] // size, False)
    return places


def _mlp(leaves: dict[str, list[str]], sizes: dict[str, tuple[int, int]]) -> dict[Kind, Place]:
    """Return the places of the MLP, module names inside the block; nothing where it is not known."""
    for up, down in _MLPS:
        if len(leaves.get(up, ())) != 1:
            continue
        owner = leaves[up][0].rpartition(".")[0]
        prefix = f"{owner}." if owner else ""
        if f"{prefix}{down}" not in sizes:
            continue
        rows = sizes[leaves[up][0]][0]
        width = sizes[f"{prefix}{down}"][1]
        places: dict[Kind, Place] = {"down": Place(f"{prefix}{down}", 0, 1, width, True)}
        if up == _FUSED_MLP:  # rows: all of gate, then all of up
            if rows % 2:
                return {}
            places["gate"] = Place(leaves[up][0], 0, 1, rows // 2, False)
            places["up"] = Place(leaves[up][0], rows // 2, 1, rows // 2, False)
            return places
        places["up"] = Place(leaves[up][0], 0, 1, rows, False)
        if f"{prefix}gate_proj" in sizes:
            places["gate"] = Place(f"{prefix}gate_proj", 0, 1, sizes[f"{prefix}gate_proj"][0], False)
        return places
    return {}


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return `(out_features, in_features)` of a linear, whichever way it stores its weight."""
    rows, columns = oriented(module, module.get_parameter("weight")).shape
    return rows, columns
