"""Three ways to learn the inputs of a block's linears: in sequence, beside the dense path, or all at once.

Each drives the lanes of `engine/lanes.py`; what is done with a linear whose statistics are complete is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from secateur.core.errors import InputError
from secateur.engine.activations import Activations
from secateur.engine.batches import Batches
from secateur.engine.groups import Group, Groups
from secateur.engine.lanes import in_step
from secateur.engine.stream import WorkingBlock
from secateur.models.linears import LinearView

Decide = Callable[[LinearView, Group], None]


def in_sequence(
    batches: Batches,
    work: WorkingBlock,
    chosen: Sequence[LinearView],
    wanted: Collection[str],
    decide: Decide,
    *,
    finish: bool,
) -> Activations | None:
    """Call `decide` on each linear when all batches wait before it, so that it sees inputs from decided ones.

    Args:
        batches: where the inputs of the block are.
        work: the block.
        chosen: linears to stop at.
        wanted: statistics to collect.
        decide: `decide(linear, group)`; may change the linear's weight.
        finish: run the batches to the end of the block.

    Returns:
        The outputs of the block with the linears as they were left; None without `finish`.
    """
    groups = Groups(wanted, batches.device, batches.keeps)
    outputs = batches.sparse.like()

    def arrive(batch: int, linear: LinearView, given: Tensor) -> None:
        groups.arrive(batch, linear, given, None)

    def leave(batch: int, output: Tensor) -> None:
        outputs[batch] = output

    in_step(
        chosen,
        [batches.lane(work, batches.sparse, batch) for batch in range(len(batches))],
        arrive=arrive,
        decide=lambda linear: decide(linear, groups.current),
        leave=leave,
        stop_after=None if finish else len(chosen),
    )
    return outputs if finish else None


def beside_dense(
    batches: Batches,
    work: WorkingBlock,
    dense: WorkingBlock,
    chosen: Sequence[LinearView],
    wanted: Collection[str],
    decide: Decide,
) -> tuple[Activations, Activations]:
    """As `in_sequence`, with every batch's dense path running in step beside its sparse path.

    Lanes 2 b and 2 b + 1 are the dense and the sparse path of batch b, so each sparse arrival finds its dense twin.

    Returns:
        The outputs of the block on the sparse and on the dense path.

    Raises:
        InputError: if the block has experts, which see different tokens on the two paths.
    """
    if work.unpacked:
        raise InputError(
            f"error correction compares the two paths token by token, but the experts of `{work.name}` see different tokens",
            hint="leave out `error_correction`",
        )
    groups = Groups(wanted, batches.device, batches.keeps)
    twins: dict[int, Tensor] = {}
    outputs, dense_outputs = batches.sparse.like(), batches.dense.like()
    forwards: list[Callable[[], Tensor]] = []
    for batch in range(len(batches)):
        forwards += [batches.lane(dense, batches.dense, batch), batches.lane(work, batches.sparse, batch)]
    names = {linear.name for linear in chosen}

    def arrive(lane: int, linear: LinearView, given: Tensor) -> None:
        batch, sparse = divmod(lane, 2)
        if sparse:
            groups.arrive(batch, linear, given, twins.pop(batch))
        else:
            twins[batch] = given

    def leave(lane: int, output: Tensor) -> None:
        batch, sparse = divmod(lane, 2)
        (outputs if sparse else dense_outputs)[batch] = output

    in_step(
        chosen,
        forwards,
        arrive=arrive,
        decide=lambda linear: decide(linear, groups.current),
        leave=leave,
        also=[linear for linear in dense.linears if linear.name in names],
    )
    return outputs, dense_outputs


def at_once(
    batches: Batches, work: WorkingBlock, chosen: Sequence[LinearView], wanted: Collection[str]
) -> list[tuple[LinearView, Group]]:
    """Return the statistics of all `chosen` linears with the block's weights as they are, as published code takes them."""
    groups = Groups(wanted, batches.device, batches.keeps)
    by_linear: dict[str, Group] = {}
    for batch in range(len(batches)):

        def arrive(_: int, linear: LinearView, given: Tensor, batch: int = batch) -> None:
            by_linear[linear.name] = groups.arrive(batch, linear, given, None, forget=False)

        # one batch at a time: nothing is decided before all of them have passed
        in_step(
            chosen,
            [batches.lane(work, batches.sparse, batch)],
            arrive=arrive,
            decide=lambda linear: None,
            leave=lambda lane, output: None,
            stop_after=len(chosen),
        )
    return [(linear, by_linear[linear.name]) for linear in chosen]
