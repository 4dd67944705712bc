"""What fits the time: every option with the most calibration and epochs that its measured costs allow.

Costs are those of one block (`engine/probe.py`), options and their order those of `recipe/expected.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.core.errors import InputError
from secateur.engine.probe import Costs
from secateur.methods.registry import REGISTRY
from secateur.recipe.expected import Option

# calibrations worth having, (samples, length), from the least; the last is that of the papers
RUNGS = ((16, 512), (32, 512), (64, 512), (128, 512), (128, 1024), (128, 2048))
EPOCHS = (3, 5, 10)  # of the tuner, from the least; it stops early where nothing is gained


@dataclass(frozen=True)
class Choice:
    """An option with the calibration and epochs that fit, or the least of both where nothing fits.

    Attributes:
        option: what to run.
        samples: calibration samples.
        length: tokens of each.
        epochs: of the tuner; 0 without one.
        seconds: what it is expected to take; None where it could not be measured.
        fits: whether that is within the time.
        why: why it cannot be taken, empty if it can.
    """

    option: Option
    samples: int
    length: int
    epochs: int
    seconds: float | None
    fits: bool
    why: str = ""

    def words(self) -> dict[str, Any]:
        """Return the choice as plain data."""
        option = dataclasses.asdict(self.option)
        rest = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "option"}
        return {"label": self.option.label, **option, **rest}


def calibrations(tokens: int, positions: int | None) -> list[tuple[int, int]]:
    """Return the calibrations that the text and the model allow, from the least.

    Raises:
        InputError: if the text has too few tokens for the least.
    """
    found = [
        (samples, min(length, positions or length))
        for samples, length in RUNGS
        if samples * min(length, positions or length) < tokens
    ]
    if not found:
        samples, length = RUNGS[0][0], min(RUNGS[0][1], positions or RUNGS[0][1])
        raise InputError(
            f"the calibration text has {tokens} tokens, but the least calibration is {samples} samples of {length}",
            hint="name a longer text with --calibration",
        )
    return list(dict.fromkeys(found))


def expected_seconds(option: Option, costs: Costs, tokens: int, epochs: int) -> float | None:
    """Return what pruning and tuning all blocks will take; None where a part of it could not be measured.

    Args:
        option: what to run.
        costs: as measured.
        tokens: of the calibration.
        epochs: of the tuner.
    """
    if any(name not in known for name, known in _parts(option, costs)):
        return None
    needs = set(REGISTRY.find(option.method).needs)
    statistics = 0.0
    if option.refit or "gram" in needs:
        statistics = costs.statistics["gram"]
    elif needs:
        statistics = costs.statistics["diag"]
    each_token = costs.forward + statistics
    if option.tuner is not None:
        # targets, and the tuned block's outputs; an error at the start, and one epoch after the other
        each_token += 3 * costs.forward + epochs * costs.tuners[option.tuner]
    elif not needs and not option.refit:
        each_token = 0.0  # no text is read
    planning = 0.0 if option.plan is None else costs.planning(option.plan, tokens)
    return planning + costs.blocks * (tokens * each_token + costs.solvers[solver_of(option)])


def choose(option: Option, costs: Costs, rungs: Sequence[tuple[int, int]], available: float) -> Choice:
    """Return the option with the most calibration and epochs that fit in `available` seconds."""
    fewest = EPOCHS[0] if option.tuner is not None else 0
    samples, length = rungs[0]
    least = expected_seconds(option, costs, samples * length, fewest)
    if least is None:
        failed = [name for name, _ in _parts(option, costs) if name in costs.failed]
        why = next((f"{name}: {costs.failed[name]}" for name in failed), "not measured")
        return Choice(option, samples, length, fewest, None, False, why)
    if least > available:
        return Choice(option, samples, length, fewest, least, False, "takes too long")
    best = Choice(option, samples, length, fewest, least, True)
    for samples, length in rungs:
        seconds = expected_seconds(option, costs, samples * length, fewest)
        if seconds is not None and seconds <= available:
            best = dataclasses.replace(best, samples=samples, length=length, seconds=seconds)
    for epochs in EPOCHS if option.tuner is not None else ():
        seconds = expected_seconds(option, costs, best.samples * best.length, epochs)
        if seconds is not None and seconds <= available:
            best = dataclasses.replace(best, epochs=epochs, seconds=seconds)
    return best


def solver_of(option: Option) -> str:
    """Return under which name the cost of an option's solver is kept."""
    return option.method + (" with refit" if option.refit else "")


def _parts(option: Option, costs: Costs) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the names of what an option is made of, each with where its cost is kept."""
    named: list[tuple[str | None, Mapping[str, Any]]] = [
        (solver_of(option), costs.solvers),
        (option.tuner, costs.tuners),
        (option.plan, costs.planners),
    ]
    return [(name, kept) for name, kept in named if name is not None]
