"""EBFT as published, plainly: masks in the forward, AdamW with decay on everything, gradients clipped while scaled.

Written from the method sheet (arXiv 2402.12419 and what its repository does), to compare with; not for use. The
published run is float16 autocast with a dynamic loss scale and clips to norm 1 *before* unscaling; here the arithmetic
is float32, and the scale and its clipping are emulated, so that the step sizes are those of the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


class MaskedLinear(nn.Module):
    """A linear that multiplies its weight by a float mask in every forward."""

    def __init__(self, linear: nn.Linear, mask: Tensor) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.mask = nn.Parameter(mask.to(linear.weight.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.mask, self.bias)


@dataclass
class LossScale:
    """The dynamic loss scale, one for all blocks of a run: doubled after every 2000 good steps."""

    value: float = 65536.0
    good_steps: int = 0

    def count(self) -> None:
        self.good_steps += 1
        if self.good_steps % 2000 == 0:
            self.value *= 2.0


@dataclass
class PublishedEBFT:
    """The published defaults; `tune` trains a block in place and keeps the weights of the last step."""

    epochs: int = 10
    batch_size: int = 8
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    scale: LossScale = field(default_factory=LossScale)

    def tune(
        self,
        block: nn.Module,
        masks: dict[str, Tensor],
        inputs: Tensor,
        targets: Tensor,
        call: Callable[[nn.Module, Tensor], Tensor],
        generator: torch.Generator,
        after_step: Callable[[], None] = lambda: None,
    ) -> tuple[float, float]:
        """Train every parameter of `block` under `masks`; return the mean squared error of the first and last epoch.

        Args:
            block: its linears named in `masks` still hold dense weights.
            masks: `{module name: bool (out_features, in_features)}`, True = kept.
            inputs: `(samples, tokens, hidden)`.
            targets: same shape, the dense block's outputs.
            call: runs the block on `(batch, tokens, hidden)`.
            generator: shuffles the samples.
            after_step: called after every step.
        """
        with _masked(block, masks):
            parameters = [parameter for name, parameter in block.named_parameters() if not name.endswith(".mask")]
            optimizer = torch.optim.AdamW(
                parameters, lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
            )
            steps = max(1, self.epochs * (len(inputs) // self.batch_size))
            loader = DataLoader(
                TensorDataset(inputs, targets), batch_size=self.batch_size, shuffle=True, generator=generator
            )
            done, losses = 0, []
            for _ in range(self.epochs):
                total = 0.0
                for x, y in loader:
                    loss = functional.mse_loss(call(block, x), y)
                    optimizer.zero_grad()
                    (loss * self.scale.value).backward()
                    nn.utils.clip_grad_norm_(parameters, self.clip)
                    for parameter in parameters:
                        if parameter.grad is not None:
                            parameter.grad.div_(self.scale.value)
                    for group in optimizer.param_groups:
                        group["lr"] = self.learning_rate * max(0.0, 1 - done / steps)
                    optimizer.step()
                    self.scale.count()
                    done += 1
                    total += loss.item() * len(x)
                    after_step()
                losses.append(total / len(inputs))
        with torch.no_grad():
            for name, mask in masks.items():
                block.get_submodule(name).weight.mul_(mask)
        return losses[0], losses[-1]


class _masked:  # noqa: N801 - used as a function
    """Put masked linears in the block for the length of a `with`."""

    def __init__(self, block: nn.Module, masks: dict[str, Tensor]) -> None:
        self.block = block
        self.masks = masks
        self.originals = {name: block.get_submodule(name) for name in masks}

    def __enter__(self) -> None:
        for name, linear in self._linears():
            self.block.set_submodule(name, MaskedLinear(linear, self.masks[name]))

    def __exit__(self, *_: object) -> None:
        for name, linear in self._linears():
            self.block.set_submodule(name, linear)

    def _linears(self) -> Iterator[tuple[str, nn.Linear]]:
        for name, module in self.originals.items():
            assert isinstance(module, nn.Linear)
            yield name, module
