"""Masked LoRA and masked DoRA: low-rank updates that only ever reach the weights that were kept.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685; the update under the mask
as in SQFT (Munoz et al., arXiv 2410.03750) and LoRS (Hu et al., arXiv 2501.08582), which also rebuilds the adapted
weight in backward instead of keeping it; DoRA by Liu et al., ICML 2024, arXiv 2402.09353.
The mask is part of the forward, so what was trained is what is merged. Merging plain LoRA fills every zero, and masking
it afterwards drops a part of the update that the training relied on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.core.errors import RecipeError
from secateur.train.adapter_base import note_dense_base
from secateur.train.adapter_config import AdapterConfig, check_finite, check_rank, check_rate, rank_of, register
from secateur.train.adapter_linear import AdapterLinear
from secateur.train.adapter_model import AdapterModel


def masked_sum(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Return `W + s M * (B A)`, M the support of W, `(out_features, in_features)`.

    Args:
        weight: W, `(out_features, in_features)`.
        down: A, `(r, in_features)`.
        up: B, `(out_features, r)`.
        scaling: s.
    """
    return torch.addmm(weight, up, down, alpha=scaling).masked_fill(weight == 0, 0.0)


def masked_sum_gradients(
    weight: Tensor, gradient: Tensor, down: Tensor, up: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `down` and `up`, given `gradient` of the sum, which is overwritten.

    With P = s M * G they are B^T P and P A^T.
    """
    reached = gradient.masked_fill_(weight == 0, 0.0)
    return (up.T @ reached).mul_(scaling), (reached @ down.T).mul_(scaling)


def row_scale(direction: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Return DoRA's scale `magnitude / ||row||` of each row of `direction`, and the norms; 1 for a row of zeros.

    The norm counts as a constant in training (DoRA, section 4.3).

    Args:
        direction: `(out_features, in_features)`.
        magnitude: `(out_features, 1)`.
    """
    norm = torch.linalg.vector_norm(direction.detach(), dim=1, keepdim=True)
    return torch.where(norm > 0, magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny), 1.0), norm


@dataclass
class MaskedLoraConfig(AdapterConfig):
    """Settings of masked LoRA, by the names that LoRA's users know.

    Attributes:
        r: rank of the update before the mask.
        lora_alpha: the update is scaled by `lora_alpha / r`.
        lora_dropout: probability of dropping an input of the update in training; costs a second product.
        use_rslora: scale by `lora_alpha / sqrt(r)` instead.
        use_dora: train the length of every row beside its direction (masked DoRA).
        rank_pattern: `{name ending or regular expression: r}` for linears that need another rank.
    """

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] | None = None

    method: ClassVar[str] = "masked"  # not "masked_lora": programs take whatever contains `lora_` for plain LoRA

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self.r, self.rank_pattern)
        check_finite("lora_alpha", self.lora_alpha)
        check_rate("lora_dropout", self.lora_dropout)


class MaskedLoraLinear(AdapterLinear):
    """A frozen sparse linear with a low-rank update under its mask for each adapter, and row lengths under DoRA."""

    adapter_layer_names = ("secateur_masked_down", "secateur_masked_up", "secateur_masked_magnitude")

    def create_(self, adapter: str, config: MaskedLoraConfig, generator: torch.Generator) -> None:
        """Create `down` uniform in +-1/sqrt(in_features), `up` zero, and under DoRA the lengths of the rows."""
        r = rank_of(config, self.name)
        if r > min(self.out_features, self.in_features):
            raise RecipeError(
                f"`r` = {r} is more than `{self.name}` can use, a {self.out_features} x {self.in_features} matrix",
                hint="lower `r`, or set it for single linears in `rank_pattern`",
            )
        bound = 1 / math.sqrt(self.in_features)
        down = torch.empty(r, self.in_features).uniform_(-bound, bound, generator=generator)
        up = torch.zeros(self.out_features, r)
        if not config.init_weights:
            up.normal_(std=bound, generator=generator)
        self.put_(adapter, secateur_masked_down=down, secateur_masked_up=up)
        if config.use_dora:
            weight = self.original_weight()
            length = torch.ones(self.out_features, 1) if weight.is_meta else row_lengths(weight)
            self.put_(adapter, secateur_masked_magnitude=length)

    def scaling(self, adapter: str) -> float:
        """Return what the product of `up` and `down` is multiplied by."""
        config: Any = self.configs[adapter]
        r = rank_of(config, self.name)
        return float(config.lora_alpha / (math.sqrt(r) if config.use_rslora else r))

    def tensors(self, adapter: str) -> tuple[Tensor, ...]:
        """Return `down` and `up`, and the lengths of the rows under DoRA."""
        containers = (getattr(self, name) for name in self.adapter_layer_names)
        return tuple(container[adapter] for container in containers if adapter in container)

    def input_dropout(self, adapter: str) -> float:
        """Return `lora_dropout`."""
        config: Any = self.configs[adapter]
        return float(config.lora_dropout)

    def adapted_weight(self, adapter: str, weight: Tensor, *tensors: Tensor) -> Tensor:
        """Return the weight with one adapter, `(out_features, in_features)`."""
        down, up, *length = tensors
        total = masked_sum(weight, down, up, self.scaling(adapter))
        return total * row_scale(total, length[0])[0] if length else total

    def delta(self, adapter: str, weight: Tensor, *tensors: Tensor) -> Tensor:
        """Return the weight with the adapter, less the weight."""
        return self.adapted_weight(adapter, weight, *tensors) - weight

    def combined(self, weight: Tensor, parts: Sequence[tuple[str, tuple[Tensor, ...]]]) -> Tensor:
        """Return the weight with several adapters; one alone is not rounded a second time."""
        if len(parts) == 1:
            return self.adapted_weight(parts[0][0], weight, *parts[0][1])
        return super().combined(weight, parts)

    def delta_gradients(
        self, adapter: str, weight: Tensor, gradient: Tensor, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of `down` and `up`, and of the lengths under DoRA."""
        down, up, *length = tensors
        if not length:
            return masked_sum_gradients(weight, gradient, down, up, self.scaling(adapter))
        direction = masked_sum(weight, down, up, self.scaling(adapter))
        scale, norm = row_scale(direction, length[0])
        of_length = (gradient * direction).sum(1, keepdim=True) / norm
        of_length.masked_fill_(norm == 0, 0.0)
        return *masked_sum_gradients(weight, gradient.mul_(scale), down, up, self.scaling(adapter)), of_length


class MaskedLoraModel(AdapterModel):
    """PEFT's tuner for masked LoRA; says so when the base is not sparse."""

    prefix = "secateur_masked_"
    tuner_layer_cls = MaskedLoraLinear

    def injected(self, model: torch.nn.Module, config: Any, adapter_name: str) -> None:
        """Warn if none of the adapted weights has a zero: it is plain LoRA then."""
        note_dense_base(model, adapter_name)


def row_lengths(weight: Tensor) -> Tensor:
    """Return the Euclidean lengths of the rows, `(out_features, 1)`, float32 or wider, as `row_scale` computes them."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    lengths: Tensor = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return lengths


register(MaskedLoraConfig, MaskedLoraModel)
