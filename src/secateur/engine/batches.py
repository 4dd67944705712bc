"""The calibration batches on their way through the model: tokens, arguments of every block, hidden states on both paths.

What goes wrong with a batch is mended here, for all batches keep the same shape of data: one that overflows can be left
out, and all can be cut in halves where the device has too little memory for them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from secateur.core.errors import NumericError
from secateur.core.faults import hit
from secateur.core.progress import Progress, step
from secateur.engine.activations import Activations, Offload
from secateur.engine.stream import WorkingBlock
from secateur.models.blocks import Blocks
from secateur.models.calls import BlockCall
from secateur.models.linears import LinearView
from secateur.models.pages import Mappings
from secateur.models.skeleton import capture, replay_tail, run_block


class BatchNotFinite(NumericError):
    """The hidden states of one batch hold NaN or infinity.

    Attributes:
        batch: its number.
    """

    def __init__(self, message: str, batch: int) -> None:
        super().__init__(
            message, where=f"batch {batch}", hint="`nonfinite: skip-batch` leaves out up to 1 % of batches"
        )
        self.batch = batch


class Batches:
    """All calibration batches, and the hidden states that enter the current block.

    Args:
        model: the model they go through.
        blocks: its blocks.
        ids: int64 `(samples, length)`.
        keep: bool `(samples, length)`, False on padding; None where all tokens are real.
        sequences: samples of one batch.
        dense_path: also carry the hidden states of the dense model.
        device: where blocks run.
        dtype: compute dtype.
        offload: where hidden states wait.

    Attributes:
        ids: tokens of each batch.
        keeps: `keep` of each batch, or None.
        calls: for each batch the call of every block.
        sparse: hidden states on the path of the model as it is pruned so far.
        dense: hidden states on the path of the dense model; empty without `dense_path`.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        ids: Tensor,
        keep: Tensor | None,
        *,
        sequences: int,
        dense_path: bool,
        device: torch.device,
        dtype: torch.dtype,
        offload: Offload,
    ) -> None:
        self.model, self.blocks = model, blocks
        self.device, self.dtype, self.dense_path = device, dtype, dense_path
        self.ids = list(torch.split(ids, sequences))
        self.keeps: list[Tensor | None] = [None] * len(self.ids)
        if keep is not None and not bool(keep.all()):
            self.keeps = list(torch.split(keep, sequences))
        self.calls: list[list[BlockCall]] = []
        self.sparse = Activations(len(self.ids), offload)
        self.dense = Activations(len(self.ids), offload)

    def __len__(self) -> int:
        return len(self.ids)

    def paths(self) -> dict[str, Activations]:
        """Return the hidden states that are carried from block to block, by path."""
        return {"sparse": self.sparse, "dense": self.dense} if self.dense_path else {"sparse": self.sparse}

    @torch.no_grad()
    def embed(self, progress: Progress) -> None:
        """Fill the paths with what enters block 0, and note what else the blocks are called with."""
        with step(progress, "embedding the calibration text", len(self)) as number:
            for batch, ids in enumerate(self.ids):
                like = self.calls[-1] if self.calls else None
                hidden, calls = capture(self.model, self.blocks, ids, self.keeps[batch], dtype=self.dtype, like=like)
                self.calls.append(calls)
                self.sparse[batch] = hidden.to(self.dtype)
                if self.dense_path:
                    self.dense[batch] = hidden.to(self.dtype)
                progress.advance(number, 1)
        Mappings().release(self.model.parameters())

    def lane(self, work: WorkingBlock, inputs: Activations, batch: int) -> Callable[[], Tensor]:
        """Return the forward of `batch` through `work`, to be run later."""

        def forward() -> Tensor:
            hit("batches.forward")
            hidden = inputs[batch].to(self.device)
            output = run_block(work.module, hidden, self.calls[batch][work.index].to(self.device, self.dtype))
            if not bool(torch.isfinite(output).all()):
                raise BatchNotFinite(f"the outputs of block {work.index} hold NaN or infinity", batch)
            return output

        return forward

    def forward(self, work: WorkingBlock, inputs: Activations) -> Activations:
        """Return what all batches of `inputs` become in `work`."""
        outputs = inputs.like()
        for batch in range(len(self)):
            outputs[batch] = self.lane(work, inputs, batch)()
        return outputs

    @torch.no_grad()
    def behind_blocks(self, batch: int, linear: LinearView) -> Tensor:
        """Return what `batch` gives to `linear`, which runs behind the last block: `(batch, tokens, in_features)`."""
        assert linear.module is not None
        return replay_tail(
            self.model, self.blocks, self.ids[batch], self.keeps[batch], self.sparse[batch], linear.name, linear.module
        )

    def drop(self, batch: int) -> None:
        """Leave `batch` out from now on."""
        for entries in (self.ids, self.keeps, self.calls):
            del entries[batch]
        kept = [index for index in range(len(self.sparse)) if index != batch]
        self.sparse = _pick(self.sparse, kept)
        self.dense = _pick(self.dense, kept)

    def halve(self) -> bool:
        """Cut every batch of two or more sequences in two; return whether there was one."""
        if all(len(ids) == 1 for ids in self.ids):
            return False
        parts = [
            (batch, rows)
            for batch, ids in enumerate(self.ids)
            for rows in (slice(0, (len(ids) + 1) // 2), slice((len(ids) + 1) // 2, len(ids)))
            if rows.start < rows.stop
        ]
        sizes = [len(ids) for ids in self.ids]
        self.sparse, self.dense = _cut(self.sparse, parts), _cut(self.dense, parts)
        if self.calls:
            self.calls = [[call.rows(rows, sizes[batch]) for call in self.calls[batch]] for batch, rows in parts]
        self.keeps = [None if (keep := self.keeps[batch]) is None else keep[rows] for batch, rows in parts]
        self.ids = [self.ids[batch][rows] for batch, rows in parts]
        return True


def _pick(store: Activations, batches: list[int]) -> Activations:
    """Return a store of some of the batches of `store`."""
    result = store.of_length(len(batches))
    for place, batch in enumerate(batches):
        if store.filled(batch):
            result[place] = store[batch]
    return result


def _cut(store: Activations, parts: list[tuple[int, slice]]) -> Activations:
    """Return a store of parts of the batches of `store`."""
    result = store.of_length(len(parts))
    for place, (batch, rows) in enumerate(parts):
        if store.filled(batch):
            result[place] = store[batch][rows].clone()
    return result
