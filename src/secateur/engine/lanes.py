"""Lanes: the forward passes of all batches through one block, each pausing before every linear.

True-sequential calibration needs the inputs of a linear *after* everything before it in the block is pruned. Instead of
running the block again for every group of linears, each batch's forward is a coroutine (a greenlet, so that any model
code can be paused in the middle) that stops where a linear is about to run. When all batches wait at the same linear its
statistics are complete, it is pruned, and all of them go on with the new weight. One traversal, one product per linear
and batch, whatever the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import greenlet
from torch import Tensor, nn

from secateur.core.errors import InputError
from secateur.models.linears import LinearView


class Lane:
    """One forward pass that can be paused before each linear.

    Attributes:
        waiting: the linear it is about to run, None when it is finished.
        given: the input of that linear.
        result: what the forward returned, once it is finished.
    """

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        self.waiting: LinearView | None = None
        self.given: Tensor | None = None
        self.result: Tensor | None = None
        self._greenlet = greenlet.greenlet(forward)

    def resume(self) -> None:
        """Run until the next linear or the end."""
        self.given = None  # nothing here may outlive the forward's own reference
        answer = self._greenlet.switch()
        if self._greenlet.dead:
            self.waiting, self.result = None, answer
        else:
            self.waiting, self.given = answer
        del answer

    def close(self) -> None:
        """Unwind an unfinished forward, which frees what it holds."""
        self.given = None
        if not self._greenlet.dead:
            self._greenlet.throw()


@contextmanager
def pausing(linears: Sequence[LinearView]) -> Iterator[None]:
    """Make the modules of `linears` pause the lane they run in; outside a lane they run as always."""
    before: list[tuple[nn.Module, Any]] = []  # modules and the instance-level forward they had, if any
    main = greenlet.getcurrent()

    def paused(linear: LinearView, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(given: Tensor, *arguments: Any, **settings: Any) -> Tensor:
            if greenlet.getcurrent() is not main:
                main.switch((linear, given))
            return forward(given, *arguments, **settings)

        return run

    try:
        for linear in linears:
            module = linear.module
            if module is None:
                raise InputError(f"`{linear.name}` has no module that could be paused: unpack its experts first")
            before.append((module, vars(module).get("forward")))
            module.forward = paused(linear, module.forward)
        yield
    finally:
        for module, forward in before:
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def in_step(
    linears: Sequence[LinearView],
    forwards: Sequence[Callable[[], Tensor]],
    arrive: Callable[[int, LinearView, Tensor], None],
    decide: Callable[[LinearView], None],
    leave: Callable[[int, Tensor], None],
    stop_after: int | None = None,
    also: Sequence[LinearView] = (),
) -> None:
    """Run all `forwards` together, stopping all of them before each linear.

    Args:
        linears: the linears to stop at.
        forwards: one per batch; each returns the block's output.
        arrive: `arrive(batch, linear, input)` as each batch reaches a linear, in batch order.
        decide: `decide(linear)` once all batches wait at it; may change its weight.
        leave: `leave(batch, output)` as each batch finishes.
        also: linears of another copy of the block, in which some of the forwards run; a stop there counts as a stop at
            the linear of the same name.
        stop_after: abandon all forwards after this many linears were decided (their outputs are then not computed).

    Raises:
        InputError: if batches reach the linears in different orders, or never reach one of them.
    """
    seen: set[str] = set()
    named = {linear.name: linear for linear in linears}
    lanes: list[Lane | None] = []
    with pausing([*linears, *also]):
        try:
            for batch, forward in enumerate(forwards):
                started = Lane(forward)
                lanes.append(started)
                _advance(batch, started, lanes, arrive, leave)
            while (first := lanes[0] if lanes else None) is not None:
                assert first.waiting is not None
                linear = named[first.waiting.name]
                if any(lane is None or lane.waiting is None or lane.waiting.name != linear.name for lane in lanes):
                    raise InputError(
                        f"the batches do not reach the linears of this block in one order (at `{linear.name}`)",
                        hint="use `sequential: false`, which does not need an order",
                    )
                if linear.name in seen:
                    raise InputError(
                        f"`{linear.name}` runs twice in one forward of its block, so its inputs are not known in time",
                        hint="leave it out with `ignore`",
                    )
                decide(linear)
                seen.add(linear.name)
                if stop_after is not None and len(seen) == stop_after:
                    break
                for batch, waiting in enumerate(lanes):
                    assert waiting is not None
                    _advance(batch, waiting, lanes, arrive, leave)
        finally:
            for unfinished in lanes:
                if unfinished is not None:
                    unfinished.close()
    missed = [linear.name for linear in linears if linear.name not in seen]
    if missed:
        raise InputError(
            f"`{missed[0]}` was never run by its block, so nothing is known about its inputs"
            + (f" (and {len(missed) - 1} more)" if len(missed) > 1 else ""),
            hint="leave it out with `ignore`",
        )


def _advance(
    batch: int,
    lane: Lane,
    lanes: list[Lane | None],
    arrive: Callable[[int, LinearView, Tensor], None],
    leave: Callable[[int, Tensor], None],
) -> None:
    lane.resume()
    if lane.waiting is not None:
        assert lane.given is not None
        arrive(batch, lane.waiting, lane.given)
        return
    assert lane.result is not None
    leave(batch, lane.result)
    lanes[batch] = None
