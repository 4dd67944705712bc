"""What a sweep says about itself, block by block, and how that is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor

from secateur.core.contracts import Tuned
from secateur.core.mask import Masks
from secateur.models.linears import LinearView


@dataclass(frozen=True)
class LayerReport:
    """One pruned linear: relative losses are fractions of the loss of the all-zero weight."""

    name: str
    block: int
    shape: tuple[int, int]
    sparsity: float
    pattern: str
    loss_before: float | None
    loss_after: float | None
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockReport:
    """One block: its linears, what tuning did to its output error (None without a tuner), zeros and size of its linears.

    `mishaps` tells what went wrong with the calibration batches in this block, see `engine/mishaps.py`.
    """

    index: int
    layers: tuple[LayerReport, ...]
    tuned: Tuned | None
    seconds: float
    zeros: int
    size: int
    mishaps: tuple[str, ...] = ()


@dataclass
class SweepReport:
    """What a sweep did.

    Attributes:
        blocks: one report per block.
        masks: those of all linears that were pruned or kept sparse.
        warnings: what did not go as planned, for the user.
        zeros: zeros in all linears of the blocks, pruned or not.
        size: entries of all linears of the blocks.
        earlier_seconds: what the blocks took that an earlier part of the run had finished.
    """

    blocks: list[BlockReport] = field(default_factory=list)
    masks: Masks = field(default_factory=Masks)
    warnings: list[str] = field(default_factory=list)
    zeros: int = 0
    size: int = 0
    earlier_seconds: float = 0.0

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all linears of the blocks, 0..1."""
        return self.zeros / self.size if self.size else 0.0


def kept_line(linear: LinearView, mask: Tensor, pattern: str) -> LayerReport:
    """Return the report line of a linear whose zeros were taken as they are."""
    shape = (mask.shape[0], mask.shape[1])
    return LayerReport(linear.name, linear.block, shape, 1 - int(mask.sum()) / mask.numel(), pattern, None, None, 0.0)


def to_json(report: BlockReport) -> dict[str, object]:
    """Return `report` as plain values."""
    return asdict(report)


def from_json(stored: Mapping[str, object]) -> BlockReport:
    """Return the report that `to_json` stored."""
    values = dict(stored)
    layers = tuple(
        LayerReport(**{**layer, "shape": tuple(layer["shape"]), "notes": tuple(layer["notes"])})
        for layer in values["layers"]  # type: ignore[attr-defined]
    )
    tuned = values["tuned"]
    if isinstance(tuned, dict):
        tuned = Tuned(**{**tuned, "notes": tuple(tuned["notes"])})
    mishaps: tuple[str, ...] = tuple(values.get("mishaps", ()))  # type: ignore[arg-type]
    return BlockReport(values["index"], layers, tuned, values["seconds"], values["zeros"], values["size"], mishaps)  # type: ignore[arg-type]
