"""The reconstruction error of a block under tuning: on which sequences, how summed, which of them judge.

What block tuners share beside their own idea: sequences are cut into runs once, some of them held out, the others put
together to steps in random order; errors are means over real tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from secateur.core.contracts import BlockTask
from secateur.core.errors import InputError

Loss = Literal["relative", "mse"]


def token_errors(output: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """Return the reconstruction error of every token, `(sequences, tokens)`, float32 or wider.

    `mse` is the mean square of `output - target` over the hidden size. `relative` divides it by the mean square of the
    token's target: the norm in front of the next block does the same to the hidden state, and tokens with massive
    activations, a thousand times the others' size, count like any other.

    Args:
        output: `(sequences, tokens, hidden)`.
        target: same shape.
        loss: `relative` or `mse`.
    """
    wide = torch.promote_types(target.dtype, torch.float32)
    target = target.to(wide)
    error = (output.to(wide) - target).square().mean(-1)
    if loss == "relative":
        error = error / target.square().mean(-1).clamp_min(torch.finfo(wide).tiny)
    return error


@dataclass(frozen=True)
class Run:
    """A contiguous run of sequences of one calibration batch, and the number of real tokens in it."""

    batch: int
    rows: slice
    tokens: int

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return int(self.rows.stop - self.rows.start)


class Reconstruction:
    """The error of one block against its targets.

    Attributes:
        task: the block.
        loss: how tokens are measured, see `token_errors`.
        training: runs to train on.
        judged: runs that judge: those held out, or all if none are.

    Args:
        batch_size: sequences of a run at most.
        holdout: fraction of the sequences that only judge; rounded.
        autocast: bfloat16 products in forward and backward.

    Raises:
        InputError: if the calibration holds no real token.
    """

    def __init__(self, task: BlockTask, loss: Loss, *, batch_size: int, holdout: float, autocast: bool = False) -> None:
        self.task = task
        self.loss = loss
        self.batch_size = batch_size
        self.autocast = autocast
        self.device = next((parameter.device for parameter in task.block.parameters()), torch.device("cpu"))
        self.training, held = divide(task, batch_size, holdout)
        self.judged = held or self.training

    @property
    def sequences(self) -> int:
        """Sequences to train on."""
        return sum(run.sequences for run in self.training)

    def steps(self) -> Iterator[list[Run]]:
        """Yield the runs to train on, in a new random order, those of a step together."""
        return in_steps(self.training, self.batch_size, self.task.generator)

    def of(self, run: Run) -> Tensor:
        """Return the error summed over the real tokens of `run`, a scalar on the device."""
        keep = self.task.keep(run.batch)
        target = self.task.targets[run.batch][run.rows].to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.task.call(self.task.block, run.batch, run.rows)
        errors = token_errors(output, target, self.loss)
        if keep is not None:
            errors = errors.masked_fill(~keep[run.rows].to(self.device, non_blocking=True), 0.0)
        return errors.sum()

    @torch.no_grad()
    def error(self) -> float:
        """Return the mean error over the real tokens of the sequences that judge; waits for the device once."""
        sums = torch.stack([self.of(run) for run in self.judged]).cpu()
        return float(sums.double().sum()) / sum(run.tokens for run in self.judged)

    @torch.no_grad()
    def scale(self) -> float:
        """Return the mean square of the targets that `error` is about, or 1 where it is relative already."""
        if self.loss == "relative":
            return 1.0
        total, count = 0.0, 0
        for run in self.judged:
            squares = self.task.targets[run.batch][run.rows].float().square().mean(-1)
            keep = self.task.keep(run.batch)
            chosen = squares if keep is None else squares[keep[run.rows].to(squares.device)]
            total += float(chosen.sum(dtype=torch.float64))
            count += chosen.numel()
        return total / count


def divide(task: BlockTask, batch_size: int, holdout: float) -> tuple[list[Run], list[Run]]:
    """Return the runs to train on and the runs held out, cut from all batches and drawn at random.

    Runs without a real token are left out; at least one sequence stays to train on.

    Raises:
        InputError: if no run holds a real token.
    """
    cuts: list[tuple[int, int, list[int]]] = []  # batch, first sequence, real tokens of each sequence
    for batch in range(len(task.inputs)):
        sequences, length = task.inputs[batch].shape[:2]
        keep = task.keep(batch)
        real = [length] * sequences if keep is None else keep.sum(1).tolist()
        cuts += [(batch, start, real[start : start + batch_size]) for start in range(0, sequences, batch_size)]
    count = sum(len(real) for _, _, real in cuts)
    left = min(round(holdout * count), count - 1)
    training: list[Run] = []
    held: list[Run] = []
    for number in torch.randperm(len(cuts), generator=task.generator).tolist():
        batch, start, real = cuts[number]
        taken = min(max(left, 0), len(real))
        left -= taken
        for runs, first, last in ((held, 0, taken), (training, taken, len(real))):
            tokens = sum(real[first:last])
            if tokens:
                runs.append(Run(batch, slice(start + first, start + last), tokens))
    if not training:
        training, held = held, []
    if not training:
        raise InputError("the calibration holds no real token to tune on", hint="give more text, or less padding")
    return training, held


def in_steps(runs: Sequence[Run], batch_size: int, generator: torch.Generator) -> Iterator[list[Run]]:
    """Yield all `runs` in random order, as many together as hold at most `batch_size` sequences."""
    step: list[Run] = []
    for number in torch.randperm(len(runs), generator=generator).tolist():
        if step and sum(run.sequences for run in step) + runs[number].sequences > batch_size:
            yield step
            step = []
        step.append(runs[number])
    yield step


@torch.no_grad()
def copy_(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """Copy all of `source` into the tensors of `to`."""
    for receiver, giver in zip(to, source, strict=True):
        receiver.copy_(giver)


@contextmanager
def only(block: nn.Module, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Let gradients reach `parameters` alone, with dropout off, and put everything back afterwards."""
    chosen = {id(parameter) for parameter in parameters}
    wanted = [(parameter, parameter.requires_grad) for parameter in block.parameters()]
    modes = [(module, module.training) for module in block.modules()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(id(parameter) in chosen)
        block.eval()
        yield parameters
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode
