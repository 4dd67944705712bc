"""What lies beside a model with a merged S2FT adapter: the lines that the adapter overwrote, so that it comes out again.

`secateur_switch.safetensors` holds for each changed linear `NAME.index`, int64 `(k,)`, and `NAME.lines`, `(k, other side)`
in the dtype of the weight: the rows or columns as they were. `secateur.json` says under `switch` which adapter is in, and
for each linear whether its lines are columns and what digest the merged ones have, so that a model that was changed since
is not taken for a mixture of two.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.core import faults
from secateur.core.errors import InputError
from secateur.methods.adapters.s2ft_exchange import s2ft_linears
from secateur.models.folder_checks import check_file
from secateur.models.linears import LinearView
from secateur.models.safetensors_header import read_header
from secateur.models.save import SIDE_FILE
from secateur.models.strict_json import MEGABYTE, read_object
from secateur.recipe.zero_pattern import linears_of

SWITCH_FILE = "secateur_switch.safetensors"


@dataclass(frozen=True)
class Overwritten:
    """The lines of one linear that a merged adapter overwrote.

    Attributes:
        columns: whether they are columns.
        index: int64 `(k,)`, ascending.
        former: `(k, other side)`, what they were, in the dtype of the weight.
        merged: digest of what they are with the adapter.
    """

    columns: bool
    index: Tensor
    former: Tensor
    merged: str


@dataclass(frozen=True)
class Switch:
    """Which adapter is merged into a model, and what it overwrote.

    Attributes:
        adapter: name, method and fingerprint of the adapter; None if none is merged.
        linears: what it overwrote, by linear.
    """

    adapter: dict[str, Any] | None = None
    linears: dict[str, Overwritten] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, adapter: dict[str, Any], overwritten: dict[str, tuple[bool, Tensor, Tensor]]
    ) -> Switch:
        """Return the switch of a merged model.

        Args:
            model: the plain model with the adapter merged.
            adapter: name, method and fingerprint.
            overwritten: from `overwritten_lines`.
        """
        views = {view.name: view for view in linears_of(model)}
        found = {}
        for name, (columns, index, former) in overwritten.items():
            place = _lines(views[name], columns)
            merged = _digest(place.index_select(0, index.to(place.device)))
            found[name] = Overwritten(columns, index, former, merged)
        return cls(adapter, found)

    def side(self) -> dict[str, Any]:
        """Return what `secateur.json` says about it."""
        linears = {
            name: {"columns": lines.columns, "lines": len(lines.index), "merged_sha256": lines.merged}
            for name, lines in self.linears.items()
        }
        return {"adapter": self.adapter, "linears": linears}

    def save(self, folder: Path) -> None:
        """Write the overwritten lines into `folder`; nothing if there are none."""
        if not self.linears:
            return
        faults.hit("save.switch")
        tensors = {}
        for name, lines in self.linears.items():
            tensors[f"{name}.index"], tensors[f"{name}.lines"] = lines.index, lines.former
        save_file(tensors, folder / SWITCH_FILE, metadata={"format": "pt"})

    @torch.no_grad()
    def undo_(self, model: nn.Module, where: Path) -> None:
        """Put the overwritten lines back into `model`, bit for bit; all linears are checked before one is written.

        Raises:
            InputError: the lines do not fit the model, or it was changed since the adapter was merged.
        """
        views = {view.name: view for view in linears_of(model)}
        for name, lines in self.linears.items():
            _check(views.get(name), name, lines, where)
        for name, lines in self.linears.items():
            place = _lines(views[name], lines.columns)
            place.index_copy_(0, lines.index.to(place.device), lines.former.to(place.device))


def overwritten_lines(model: nn.Module) -> dict[str, tuple[bool, Tensor, Tensor]]:
    """Return what the merged S2FT adapter of a PEFT model has overwritten, by linear, on CPU.

    Each is whether the lines are columns, their index, and what they were, `(k, other side)`.
    """
    found = {}
    for layer in s2ft_linears(model):
        if (overwritten := layer.overwritten()) is not None:
            index, former = overwritten
            found[layer.name] = (layer.columns, index.cpu(), layer.lines(former).contiguous().cpu())
    return found


def read_switch(folder: Path) -> Switch:
    """Read which adapter is merged into the model in `folder`, and what it overwrote.

    Raises:
        InputError: no S2FT adapter can be taken out of it, or its files are damaged.
    """
    side = read_object(folder / SIDE_FILE, 500 * MEGABYTE) if (folder / SIDE_FILE).is_file() else {}
    said = side.get("switch")
    if not isinstance(said, dict):
        raise InputError(
            f"`{folder}` has no S2FT adapter that can be taken out",
            hint="`secateur merge ADAPTER --output DIR` writes a model whose adapter can be switched",
        )
    adapter, linears = said.get("adapter"), said.get("linears")
    if adapter is None and not linears:
        return Switch()
    path = folder / SWITCH_FILE
    if not isinstance(adapter, dict) or not isinstance(linears, dict) or not linears:
        raise InputError(f"`switch` in `{folder / SIDE_FILE}` must name an adapter and its linears")
    if not path.is_file():
        raise InputError(
            f"`{folder}` has no `{SWITCH_FILE}`, so what its adapter overwrote is lost",
            hint="merge the other adapter into the base model again",
        )
    check_file(path, folder)
    if read_header(path).tensors.keys() != {f"{name}.{part}" for name in linears for part in ("index", "lines")}:
        raise InputError(f"`{path}` does not hold the linears that `switch` in `{SIDE_FILE}` names")
    tensors = load_file(path)
    found = {}
    for name, line in linears.items():
        index, former = tensors[f"{name}.index"], tensors[f"{name}.lines"]
        sound = isinstance(line, dict) and isinstance(line.get("columns"), bool) and index.dtype == torch.int64
        if not sound or index.dim() != 1 or former.dim() != 2 or len(index) != len(former) or not len(index):
            raise InputError(f"the lines of `{name}` in `{path}` are malformed: {json.dumps(line)[:200]}")
        found[name] = Overwritten(line["columns"], index, former, str(line.get("merged_sha256")))
    return Switch(adapter, found)


def _check(view: LinearView | None, name: str, lines: Overwritten, where: Path) -> None:
    """Raise InputError unless the merged lines of a linear are those that were written down."""
    if view is None:
        raise InputError(f"`{where}` has no linear `{name}`, which its `{SWITCH_FILE}` names")
    place = _lines(view, lines.columns)
    fits = place.shape[1] == lines.former.shape[1] and place.dtype == lines.former.dtype
    if not fits or not bool(((lines.index >= 0) & (lines.index < len(place))).all()):
        raise InputError(f"the lines of `{name}` in `{where / SWITCH_FILE}` do not fit the model")
    if _digest(place.index_select(0, lines.index.to(place.device))) != lines.merged:
        raise InputError(
            f"the lines of `{name}` in `{where}` were changed since the adapter was merged, so it cannot be taken out",
            hint="merge the other adapter into the base model",
        )


def _lines(view: LinearView, columns: bool) -> Tensor:
    """Return the weight with the lines first, a view."""
    weight = view.read()
    return weight.T if columns else weight


def _digest(lines: Tensor) -> str:
    plain = lines.detach().cpu().contiguous()
    return hashlib.sha256(plain.view(torch.uint8).numpy().tobytes()).hexdigest()
