"""What a sweep survives: one batch in a hundred that overflows, and a device with too little memory for a batch.

Both are mended in the batches and the block is done again from its beginning; the model has not been touched by then.
What happened is written down with the block, because a resumed sweep must walk with the very same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from secateur.core.errors import InputError, NumericError, ResourceError
from secateur.engine.batches import Batches, BatchNotFinite
from secateur.engine.stream import return_free_memory

SHARE = 100  # one batch in so many may be left out, but always one
HALVINGS = 3


class Mishaps:
    """Counts and mends what goes wrong with the batches of one sweep.

    Args:
        batches: of the sweep.
        skip: leave out batches whose hidden states are not finite, up to 1 % of them (at least one).

    Attributes:
        warnings: what was done, for the user.
    """

    def __init__(self, batches: Batches, *, skip: bool) -> None:
        self.batches = batches
        self.warnings: list[str] = []
        self.allowed = max(1, len(batches) // SHARE) if skip and len(batches) > 1 else 0
        self.skip = skip
        self.halved = 0
        self._new: list[str] = []

    def survive(self, work: Callable[[], None]) -> None:
        """Call `work`, and again after each mishap that could be mended.

        Raises:
            NumericError: for a batch that may not be left out.
            ResourceError: where halving the batches does not help.
        """
        while True:
            try:
                return work()
            except BatchNotFinite as error:
                if not self.skip:
                    raise
                if not self.allowed:
                    raise NumericError(
                        f"more batches hold NaN or infinity than may be left out: {error.args[0]}",
                        where=f"batch {error.batch}",
                        hint="look at the weights with `secateur inspect`, or use --dtype float32",
                    ) from error
                self.allowed -= 1
                self.warnings.append(f"batch {error.batch} was left out from here on: {error.args[0]}")
                self._new.append(f"drop {error.batch}")
                failed = error.batch
            except (MemoryError, torch.OutOfMemoryError) as error:
                out_of_memory = str(error) or type(error).__name__
                failed = None
            # outside of `except`, where the failed forwards are no longer held by the traceback
            if failed is not None:
                self.batches.drop(failed)
            else:
                self._halve(out_of_memory)

    def since_last(self) -> tuple[str, ...]:
        """Return what happened since the last call, as `repeat` takes it."""
        found, self._new = tuple(self._new), []
        return found

    def repeat(self, mishaps: Sequence[str]) -> None:
        """Bring fresh batches to the state after `mishaps` of an earlier run.

        Raises:
            InputError: if a mishap is of no known kind.
        """
        for mishap in mishaps:
            kind, _, batch = mishap.partition(" ")
            if kind == "halve":
                self.halved += 1
                self.batches.halve()
            elif kind == "drop" and batch.isdigit():
                self.allowed -= 1
                self.batches.drop(int(batch))
            else:
                raise InputError(f"the journal tells of a mishap `{mishap}` that is not known")

    def _halve(self, message: str) -> None:
        return_free_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.halved == HALVINGS or not self.batches.halve():
            raise ResourceError(
                f"memory ran out, with batches cut in halves {self.halved} times: {message.splitlines()[0]}",
                hint="use a shorter --length, or fewer --samples; --resume goes on with the finished blocks",
            )
        self.halved += 1
        self._new.append("halve")
        self.warnings.append("memory ran out, so the calibration batches were cut in halves")
