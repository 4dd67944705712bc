"""The zeros of a model's linears before and after a change, compared bit by bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.mask import pack_bits, unpack_bits
from secateur.models.linears import LinearView, find_all_linears, find_outside_linears

SPARSE_FROM = 0.01  # a linear with fewer zeros is dense: checkpoints hold a few zeros by chance of rounding


@dataclass(frozen=True)
class Change:
    """What happened to the zeros of one linear.

    Attributes:
        name: of the linear.
        shape: `(out_features, in_features)`.
        before: zeros that there were.
        after: zeros that there are.
        filled: zeros that are none any more.
        vanished: values that became zero.
    """

    name: str
    shape: tuple[int, int]
    before: int
    after: int
    filled: int
    vanished: int

    @property
    def was_sparse(self) -> bool:
        """Whether its zeros are more than chance."""
        return self.before >= SPARSE_FROM * self.shape[0] * self.shape[1]

    def line(self) -> dict[str, Any]:
        """Return the change as a line of a report."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "zeros_before": self.before,
            "zeros_after": self.after,
            "filled": self.filled,
            "vanished": self.vanished,
        }


class ZeroPattern:
    """The support of every linear of a model, one bit a weight, the head included."""

    def __init__(self, model: nn.Module) -> None:
        self._packed: dict[str, Tensor] = {}
        for view in linears_of(model):
            self._packed[view.name] = pack_bits(view.read() != 0)

    def mask(self, view: LinearView) -> Tensor:
        """Return where the linear was not zero, bool `(out_features, in_features)` where its weight is."""
        return unpack_bits(self._packed[view.name], view.in_features).to(view.read().device)

    def changes(self, model: nn.Module) -> list[Change]:
        """Return what has happened to the zeros of each linear since."""
        return [self._change(view) for view in linears_of(model)]

    @torch.no_grad()
    def restore_(self, model: nn.Module, smallest: Callable[[torch.dtype], float] | None) -> None:
        """Set what was zero to zero again.

        Args:
            model: changed in place.
            smallest: gives the number that what has become zero is set to; None leaves it zero.
        """
        for view in linears_of(model):
            weight, kept = view.read(), self.mask(view)
            if smallest is not None:
                weight.masked_fill_((weight == 0) & kept, smallest(weight.dtype))
            weight.masked_fill_(~kept, 0.0)

    def _change(self, view: LinearView) -> Change:
        now, before = view.read() != 0, self.mask(view)
        size = now.numel()
        return Change(
            name=view.name,
            shape=(view.out_features, view.in_features),
            before=size - int(before.sum()),
            after=size - int(now.sum()),
            filled=int((now & ~before).sum()),
            vanished=int((before & ~now).sum()),
        )


def linears_of(model: nn.Module) -> list[LinearView]:
    """Return the linears of the blocks and those outside, such as the head."""
    return [*find_all_linears(model), *find_outside_linears(model, ["*"], tied=True)]


def weight_lines(model: nn.Module, known: dict[str, Any]) -> dict[str, Any]:
    """Return what `secateur.json` says of each linear that has zeros.

    Args:
        model: whose linears are looked at.
        known: the lines of the model that this one was made from, whose patterns are passed on.
    """
    found = {}
    for view in linears_of(model):
        mask = (view.read() != 0).cpu()
        zeros = mask.numel() - int(mask.sum())
        if zeros:
            former = known.get(view.name)
            pattern = former.get("pattern") if isinstance(former, dict) else None
            digest = hashlib.sha256(mask.contiguous().numpy().tobytes()).hexdigest()
            found[view.name] = {
                "pattern": pattern or "as found",
                "zeros": zeros,
                "numel": mask.numel(),
                "mask_sha256": digest,
            }
    return found
