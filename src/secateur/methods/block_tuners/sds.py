"""SDS by gradients, block by block: make the pruned block dense again, prune it anew, settle under a soft mask.

Li et al., "Enhancing One-shot Pruned Pre-trained Language Models through Sparse-Dense-Sparse Mechanism", COLING 2025,
arXiv 2408.10473. The same three steps as the pruner `sds`, but as published on tokens and by gradients, with the output
of the whole block as the goal: what the linears of a block do wrong together is repaired together, masks included.

The paper leaves its optimizer open and distils each linear by itself. Here Adam's steps are measured in the size of the
weights; latent weights outside the soft mask decay (Zhou et al., "Learning N:M Fine-Grained Structured Sparse Neural
Networks From Scratch", ICLR 2021); the mask stops moving for the last epochs, so that the kept weights settle; masks
compare weights times the root mean square of their input (`scaled`); and the best state is kept, judged on sequences
that are not trained on. The goal is the dense model's own path by default, as for `ebft`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core.contracts import BlockTask, Tuned
from secateur.core.errors import InputError, NumericError
from secateur.core.method import method
from secateur.methods.block_tuners.ebft import rate_factor, rate_units
from secateur.train.reconstruction import Loss, Reconstruction, Run, copy_, only

Fraction = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Epochs = Annotated[int, Field(ge=0)]
FLOOR = 1e-6  # smallest size of an input that magnitudes are scaled by, of the largest one


@method
class SDSBlocks:
    """Block tuner that moves masks: dense epochs, a second pruning, epochs under a soft mask, epochs under its last mask.

    Epochs of each kind start with a fresh Adam and a rate that rises over `warmup` and then falls to 0 at the end of the
    kind (soft and settling epochs share one).

    Attributes:
        dense_epochs: passes with all entries free, from the pruned weights; few, as stopping early keeps what comes back
            small. 0 leaves the re-dense step out.
        soft_epochs: passes in which every step selects the mask anew, gradients going straight through it.
        settling_epochs: passes under the last mask.
        batch_size: sequences in a step.
        learning_rate: peak rate of Adam, in units of each tensor's root mean square over its kept weights.
        betas: of Adam.
        warmup: fraction of the steps of a kind over which the rate rises.
        l1: mean magnitude, in the tensor's unit, added to the relative error of the re-dense step; the paper has both
            terms and finds a small help, here they made no difference.
        l2: mean square, likewise.
        decay: pull on latent weights outside the soft mask: the share of them that a step of rate 1 takes away.
        scaled: compare magnitudes of weights times the root mean square of their input; published as they are.
        target: `dense_path`, the hidden states of the dense model itself; or `dense_block`, the dense block on the
            sparse path's inputs.
        loss: `relative` or `mse`, see `secateur.train.reconstruction.token_errors`.
        holdout: fraction of the sequences that only judge.
        autocast: bfloat16 products in forward and backward, for GPUs.
    """

    dense_epochs: Epochs = 1
    soft_epochs: Epochs = 5
    settling_epochs: Epochs = 4
    batch_size: Annotated[int, Field(ge=1)] = 2
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.03
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    warmup: Fraction = 0.1
    l1: NotNegative = 0.0
    l2: NotNegative = 0.0
    decay: NotNegative = 1.0
    scaled: bool = True
    target: Literal["dense_path", "dense_block"] = "dense_path"
    loss: Loss = "relative"
    holdout: Fraction = 0.1
    autocast: bool = False

    weight_copies: ClassVar[int] = 2  # latent weights, and the scores and masks of one selection

    @property
    def dense_path(self) -> bool:
        """Whether the targets are the dense model's own hidden states."""
        return self.target == "dense_path"

    def tune(self, task: BlockTask) -> Tuned:
        """Train `task.block` in place, leave its new masks in `task.masked`, and return what it did.

        What is left is the best of the state that came and those after each epoch under a mask; zeros are exact.

        Raises:
            InputError: if the task does not say how masks are selected, or holds no real token.
            NumericError: if the error is not finite before any training.
        """
        if len(task.select) != len(task.masked):
            raise InputError(
                f"this tuner moves masks, and {len(task.masked) - len(task.select)} of {len(task.masked)} come without "
                "a way to select new ones",
                hint="give `BlockTask.select`, or use `ebft`, which keeps masks",
            )
        with only(task.block, [parameter for parameter, _ in task.masked]) as parameters:
            return _Training(self, task, parameters).run()


@dataclass
class _State:
    """Weights and masks of all tuned parameters."""

    weights: list[Tensor]
    masks: list[Tensor]


class _Training:
    """One block under training."""

    def __init__(self, settings: SDSBlocks, task: BlockTask, parameters: list[nn.Parameter]) -> None:
        self.settings = settings
        self.task = task
        self.parameters = parameters
        self.masks = [mask.clone() for _, mask in task.masked]
        self.apply_masks_()
        self.errors = Reconstruction(
            task,
            settings.loss,
            batch_size=settings.batch_size,
            holdout=settings.holdout,
            autocast=settings.autocast,
        )
        self.units = rate_units(parameters, task.masked)
        self.best = _State([], [])
        self.sizes: list[Tensor | None] = [None] * len(parameters)
        self.first = self.least = 1.0
        self.done = 0
        self.epochs = settings.dense_epochs + settings.soft_epochs + settings.settling_epochs

    def run(self) -> Tuned:
        """Train to the end, and leave the best state in the block and the task."""
        started = time.perf_counter()
        settings = self.settings
        self.first = self.least = self.errors.error()
        if not math.isfinite(self.first):
            raise NumericError(
                "the output error of the block is NaN or infinite before tuning",
                hint="look for NaN in the weights or the calibration",
            )
        notes: tuple[str, ...] = ()
        if self.parameters and self.first > 0 and self.epochs:
            self.best = _State([parameter.detach().clone() for parameter in self.parameters], self.masks)
            if settings.scaled:
                self.sizes = self.input_sizes()
            if settings.dense_epochs:
                self.redense()
                self.masks = self.selected([parameter.detach() for parameter in self.parameters])
                self.apply_masks_()
                self.keep_if_better()
            self.settle()
            copy_(self.parameters, self.best.weights)
            notes = (self.moves(),)
            for (_, mask), found in zip(self.task.masked, self.best.masks, strict=True):
                mask.copy_(found)
        seconds = time.perf_counter() - started
        return Tuned(self.first, self.least, self.errors.scale(), self.done, seconds, notes)

    def redense(self) -> None:
        """Train all entries towards the targets, mildly regularised."""
        optimizer = self.optimizer(self.parameters)
        total = self.settings.dense_epochs
        for epoch in range(total):
            for share, done, step in self.steps(epoch, total):
                optimizer.zero_grad(set_to_none=True)
                self.backward(step)
                self.penalty()
                self.set_rate(optimizer, done, share)
                optimizer.step()

    def settle(self) -> None:
        """Train under a soft mask, then under the mask it ends with; judge the state after each epoch."""
        settings = self.settings
        latents = [nn.Parameter(parameter.detach().clone()) for parameter in self.parameters]
        optimizer = self.optimizer(latents)
        total = settings.soft_epochs + settings.settling_epochs
        for epoch in range(total):
            soft = epoch < settings.soft_epochs
            for share, done, step in self.steps(epoch, total):
                for parameter in self.parameters:
                    parameter.grad = None
                self.backward(step)
                self.set_rate(optimizer, done, share)
                self.move_(optimizer, latents, soft)
            self.keep_if_better()

    @torch.no_grad()
    def move_(self, optimizer: torch.optim.Optimizer, latents: list[nn.Parameter], soft: bool) -> None:
        """Take one step of the latent weights, and put what their mask keeps into the block."""
        for latent, parameter, mask, group in zip(
            latents, self.parameters, self.masks, optimizer.param_groups, strict=True
        ):
            gradient = parameter.grad
            if soft:
                pull = self.settings.decay * group["lr"] / group["unit"]
                latent.sub_(latent * ~mask, alpha=min(pull, 1.0))
            elif gradient is not None:
                gradient = gradient * mask
            latent.grad = gradient
        optimizer.step()
        if soft:
            self.masks = self.selected(latents)
        for latent, parameter, mask in zip(latents, self.parameters, self.masks, strict=True):
            if not soft:
                latent.mul_(mask)
            parameter.copy_(torch.where(mask, latent, 0.0))

    def steps(self, epoch: int, total: int) -> list[tuple[float, float, list[Run]]]:
        """Return the steps of one of `total` epochs: the fraction of all that each is, what was done before it, its runs."""
        found = []
        seen, all_sequences = epoch * self.errors.sequences, total * self.errors.sequences
        for step in self.errors.steps():
            count = sum(run.sequences for run in step)
            found.append((count / all_sequences, seen / all_sequences, step))
            seen += count
        self.done += 1
        self.task.progress(self.done / self.epochs)
        return found

    def backward(self, step: Sequence[Run]) -> None:
        """Add the gradient of the mean error of `step`, relative to the block's first error."""
        tokens = sum(run.tokens for run in step)
        with torch.enable_grad():
            for run in step:
                torch.autograd.backward(self.errors.of(run) / (tokens * self.first))

    @torch.no_grad()
    def penalty(self) -> None:
        """Add the gradients of the L1 and L2 terms."""
        for parameter, unit in zip(self.parameters, self.units, strict=True):
            if parameter.grad is not None:
                size = parameter.numel() * len(self.parameters)
                parameter.grad.add_(parameter.sign(), alpha=self.settings.l1 / (size * unit))
                parameter.grad.add_(parameter, alpha=2 * self.settings.l2 / (size * unit**2))

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            [{"params": [parameter], "unit": unit} for parameter, unit in zip(parameters, self.units, strict=True)],
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            fused=self.errors.device.type in ("cpu", "cuda"),
        )

    def set_rate(self, optimizer: torch.optim.Optimizer, done: float, share: float) -> None:
        factor = rate_factor(done, share, self.settings.warmup)
        for group in optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * group["unit"] * factor

    @torch.no_grad()
    def selected(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the masks of the largest magnitudes."""
        found = []
        for weight, select, size in zip(weights, self.task.select, self.sizes, strict=True):
            score = weight.detach().abs()
            found.append(select(score if size is None else score * size))
        return found

    @torch.no_grad()
    def apply_masks_(self) -> None:
        """Set what is outside the masks to an exact positive zero."""
        for parameter, mask in zip(self.parameters, self.masks, strict=True):
            parameter.masked_fill_(~mask, 0.0)

    def keep_if_better(self) -> None:
        """Remember the present state if it is the best so far."""
        error = self.errors.error()
        if error < self.least:
            self.least = error
            self.best = _State([parameter.detach().clone() for parameter in self.parameters], list(self.masks))

    def moves(self) -> str:
        """Return which part of the kept weights is new, in words."""
        new = sum(
            int((found & ~mask).sum()) for (_, mask), found in zip(self.task.masked, self.best.masks, strict=True)
        )
        kept = sum(int(mask.sum()) for _, mask in self.task.masked)
        return f"{100 * new / max(kept, 1):.1f} % of the kept weights are new"

    @torch.no_grad()
    def input_sizes(self) -> list[Tensor | None]:
        """Return the root mean square of the inputs of each parameter, to be multiplied with it; None where unknown.

        One pass over the sequences to train on.
        """
        squares: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        shapes: dict[int, tuple[int, int]] = {}
        wanted = {id(parameter) for parameter in self.parameters}
        handles = []
        for module in self.task.block.modules():
            weight = module._parameters.get("weight")
            if weight is None or id(weight) not in wanted or weight.dim() != 2:
                continue
            # an nn.Linear stores (out, in), any other linear of a block the transpose
            shapes[id(weight)] = (1, -1) if isinstance(module, nn.Linear) else (-1, 1)

            def count(_: nn.Module, given: tuple[Tensor, ...], key: int = id(weight)) -> None:
                rows = given[0].detach().reshape(-1, given[0].shape[-1]).float()
                squares[key] = squares.get(key, 0.0) + rows.square().sum(0)
                counts[key] = counts.get(key, 0) + len(rows)

            handles.append(module.register_forward_pre_hook(count))
        try:
            for run in self.errors.training:
                self.task.call(self.task.block, run.batch, run.rows)
        finally:
            for handle in handles:
                handle.remove()
        sizes: list[Tensor | None] = []
        for parameter in self.parameters:
            key = id(parameter)
            if not counts.get(key):
                sizes.append(None)
                continue
            size = (squares[key] / counts[key]).sqrt()
            sizes.append(size.clamp_min(FLOOR * float(size.max())).reshape(shapes[key]).to(parameter.dtype))
        return sizes
