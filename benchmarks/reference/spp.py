"""SPP in the sliced form that its authors publish for low memory, in our own words, and what autograd keeps.

Lu et al., arXiv 2405.16057. The update of each band of rows is a product of its own: the inputs times the band's row
vector, through the band's slice of the weight; the bands side by side are multiplied by the column vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Sliced(nn.Module):
    """The frozen product plus one product per band; `(out, in)` weight, `(r, in)` row and `(out, 1)` column factors."""

    def __init__(self, weight: Tensor, bias: Tensor | None, row: Tensor, column: Tensor, scaling: float) -> None:
        super().__init__()
        self.weight, self.bias, self.row, self.column, self.scaling = weight, bias, row, column, scaling

    def forward(self, x: Tensor) -> Tensor:
        plain = F.linear(x, self.weight, self.bias)
        height = len(self.weight) // len(self.row)
        bands = [
            F.linear(x * vector, self.weight[band * height : (band + 1) * height])
            for band, vector in enumerate(self.row)
        ]
        return plain + torch.cat(bands, -1) * self.column.flatten() * self.scaling


def saved_bytes(run: Callable[[], Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Return what `run` returns, and the bytes that autograd keeps for its backward beside `parameters`.

    Every storage counts once, and whole.
    """
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
    return result, sum(kept.values())
