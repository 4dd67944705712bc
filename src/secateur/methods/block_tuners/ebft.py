"""EBFT: fine-tune each sparse block until it gives the dense block's output.

Guo et al., "EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs", arXiv 2402.12419.
One block is small enough to be trained whole on a few hundred sequences, its masks fixed: no labels, one block on the
device at a time, and the errors that its linears make together are repaired together.

What differs from the published code: pruned weights are kept by masking gradients (the same trajectory, no mask in the
forward); gradients are clipped, if at all, as they are and not while a loss scale multiplies them; no weight decay; the
rate is larger and warmed up; every token is measured against its own size, so that a few massive activations do not
drown the others; the best state is kept, judged on sequences that are not trained on; the target is the dense model's
own path by default (Shin et al., "Rethinking Pruning Large Language Models", EMNLP 2024, call it global propagation).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core.contracts import BlockTask, Tuned
from secateur.core.errors import NumericError
from secateur.core.method import method
from secateur.train.masking import FixedMasks
from secateur.train.reconstruction import Loss, Reconstruction, copy_, only

Fraction = Annotated[float, Field(ge=0, lt=1)]


def rate_factor(done: float, share: float, warmup: float) -> float:
    """Return what the learning rate is multiplied by: up from 0 over `warmup`, then linearly down to 0.

    Args:
        done: fraction of the training that is over before this step, 0..1.
        share: fraction of the training that this step is.
        warmup: fraction of the training that warms up, 0..1.
    """
    if done < warmup:
        return min(1.0, (done + share) / warmup)
    return (1 - done) / (1 - warmup)


@torch.no_grad()
def rate_units(parameters: Sequence[Tensor], masked: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Return what the learning rate of each parameter is measured in: the root mean square of its kept entries.

    Vectors, which may be zero (biases), take at least the smallest unit of the matrices that are not all zero.

    Args:
        parameters: the trained tensors, pruned entries zero.
        masked: pairs of some of them and their bool masks, True = kept.
    """
    kept = {id(parameter): int(mask.sum()) for parameter, mask in masked}
    sizes = []
    for parameter in parameters:
        count = kept.get(id(parameter), parameter.numel())
        sizes.append(math.sqrt(float(parameter.square().sum(dtype=torch.float32)) / max(count, 1)))
    matrices = [size for parameter, size in zip(parameters, sizes, strict=True) if parameter.dim() > 1 and size > 0]
    least = min(matrices, default=1.0)
    return [
        size if parameter.dim() > 1 else max(size, least) for parameter, size in zip(parameters, sizes, strict=True)
    ]


@method
class EBFT:
    """Block tuner: AdamW on the reconstruction error of the block, masks fixed, the best epoch kept.

    Sequences are trained on in contiguous runs of at most `batch_size` inside a calibration batch; the runs are cut
    once and visited in a new random order in every epoch, several short ones together making a step.

    Errors (`Tuned.before`, `Tuned.after`) are means over the real tokens of the held-out sequences in the unit of
    `loss`, and `Tuned.scale` is 1 for the relative loss; with no sequence held out they are over all of them.

    Attributes:
        epochs: passes over the calibration sequences, at most.
        batch_size: sequences in a step; published 8, but on a few dozen sequences that leaves too few steps.
        learning_rate: peak rate of AdamW, in units of the tensor's size (`relative_rate`) or absolute.
        relative_rate: multiply the rate of each tensor by the root mean square of its kept weights. Weights of 0.02
            (LLaMA-7B) and of 0.4 (SmolLM2-135M) then take steps of the same fraction, with one default for both.
        weight_decay: of AdamW, on all that is trained.
        betas: of AdamW.
        warmup: fraction of all steps over which the rate rises; it then falls linearly to 0.
        clip: largest norm of the gradient of the loss relative to the block's first error; None does not clip.
        target: `dense_path`, the hidden states of the dense model itself, so that the drift of earlier blocks is
            repaired too; or `dense_block`, the dense block on the sparse path's inputs, as published.
        loss: `relative` or `mse`, see `token_errors`.
        holdout: fraction of the sequences that only judge; rounded, so 0.1 of fewer than 6 holds out none.
        min_gain: stop when an epoch lowers the error by less than this fraction; 0 runs all epochs.
        train_norms: also train the block's vectors (gains of norms, biases), as published.
        autocast: bfloat16 products in forward and backward, for GPUs; weights and their state stay as they are.
    """

    epochs: Annotated[int, Field(ge=0)] = 10
    batch_size: Annotated[int, Field(ge=1)] = 2
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.03
    relative_rate: bool = True
    weight_decay: Fraction = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    warmup: Fraction = 0.1
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    target: Literal["dense_path", "dense_block"] = "dense_path"
    loss: Loss = "relative"
    holdout: Fraction = 0.1
    min_gain: Fraction = 0.01
    train_norms: bool = False
    autocast: bool = False

    @property
    def dense_path(self) -> bool:
        """Whether the targets are the dense model's own hidden states."""
        return self.target == "dense_path"

    def tune(self, task: BlockTask) -> Tuned:
        """Train `task.block` in place and return what it did; zeros of the masks stay exact positive zeros.

        An epoch that ends with an error that is not finite, or above the first, is undone: once the best state comes
        back with half the rate, the second time training ends. The state left is the best of all epochs and the start.

        Raises:
            InputError: if the calibration holds no real token.
            NumericError: if the error is not finite before any training.
        """
        with only(task.block, self._trained(task)) as parameters:
            return _Training(self, task, parameters).run()

    def _trained(self, task: BlockTask) -> list[nn.Parameter]:
        """Return the parameters to train, each once."""
        parameters = [parameter for parameter, _ in task.masked]
        if self.train_norms:
            parameters += [parameter for parameter in task.block.parameters() if parameter.dim() == 1]
        return list({id(parameter): parameter for parameter in parameters}.values())


class _Training:
    """One block under training."""

    def __init__(self, settings: EBFT, task: BlockTask, parameters: list[nn.Parameter]) -> None:
        self.settings = settings
        self.task = task
        self.parameters = parameters
        self.device = parameters[0].device if parameters else torch.device("cpu")
        self.masks = FixedMasks(task.masked)
        self.masks.apply_()
        self.errors = Reconstruction(
            task,
            settings.loss,
            batch_size=settings.batch_size,
            holdout=settings.holdout,
            autocast=settings.autocast,
        )
        self.total = max(1, settings.epochs * self.errors.sequences)
        self.units = rate_units(parameters, task.masked) if settings.relative_rate else [1.0] * len(parameters)
        self.seen = 0
        self.first = 1.0

    def run(self) -> Tuned:
        """Train to the end, and leave the best state in the block."""
        started = time.perf_counter()
        self.first = best = self.errors.error()
        if not math.isfinite(best):
            raise NumericError(
                "the output error of the block is NaN or infinite before tuning",
                hint="look for NaN in the weights or the calibration",
            )
        notes: list[str] = []
        epochs = 0
        if self.parameters and best > 0:
            kept = [parameter.detach().clone() for parameter in self.parameters]
            optimizer = self.optimizer()
            scale, undone = 1.0, False
            while epochs < self.settings.epochs:
                self.epoch(optimizer, scale)
                epochs += 1
                error = self.errors.error()
                gain = 1 - error / best
                if gain > 0:
                    best = error
                    copy_(kept, self.parameters)
                if not error <= self.first:
                    times = error / self.first
                    notes.append(f"epoch {epochs} ended at {times:.3g} times the first error and was undone")
                    if undone:
                        break
                    undone, scale = True, 0.5
                    copy_(self.parameters, kept)
                    optimizer = self.optimizer()
                elif self.settings.min_gain > 0 and gain < self.settings.min_gain:
                    break
            copy_(self.parameters, kept)
        return Tuned(self.first, best, self.errors.scale(), epochs, time.perf_counter() - started, tuple(notes))

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [
                {"params": [parameter], "unit": unit}
                for parameter, unit in zip(self.parameters, self.units, strict=True)
            ],
            lr=self.settings.learning_rate,
            betas=self.settings.betas,
            weight_decay=self.settings.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )

    def epoch(self, optimizer: torch.optim.Optimizer, scale: float) -> None:
        """Take the steps of one epoch; nothing in it waits for the device."""
        for step in self.errors.steps():
            tokens = sum(run.tokens for run in step)
            optimizer.zero_grad(set_to_none=True)
            with torch.enable_grad():
                for run in step:
                    torch.autograd.backward(self.errors.of(run) / (tokens * self.first))
            self.masks.mask_gradients_()
            if self.settings.clip is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
            sequences = sum(run.sequences for run in step)
            factor = rate_factor(self.seen / self.total, sequences / self.total, self.settings.warmup)
            for group in optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * group["unit"] * scale * factor
            optimizer.step()
            self.seen += sequences
            self.task.progress(self.seen / self.total)
