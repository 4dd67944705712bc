"""SPP: fine-tune a sparse model by scaling what is left of each row and column.

Lu et al., "SPP: Sparsity-Preserved Parameter-Efficient Fine-Tuning for Large Language Models", ICML 2024,
arXiv 2405.16057.
The rows of a weight are split into `r` bands; a row of the weight is multiplied by `1 + s c_i R_b`, where `R_b` belongs
to its band and `c_i` to itself. A product keeps zeros, so any pattern survives training and merging, and the r n + m
numbers per linear are the only thing that is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.errors import RecipeError
from secateur.train.adapter_base import note_dense_base
from secateur.train.adapter_config import AdapterConfig, check_finite, check_rank, check_rate, rank_of, register
from secateur.train.adapter_linear import AdapterLinear
from secateur.train.adapter_model import AdapterModel


def spp_multiplier(row: Tensor, column: Tensor, scaling: float) -> Tensor:
    """Return `s c_i R_b(i),j`, what each weight is multiplied by, less one.

    Args:
        row: `(r, in_features)`, one vector for each band of `out_features / r` rows.
        column: `(out_features, 1)`.
        scaling: s.

    Returns:
        `(out_features, in_features)`.

    Source: the paper's `Repeat_0(W_alpha) * Repeat_1(W_beta)`, with `row` for W_alpha and `column` for W_beta.
    """
    bands, columns = row.shape
    scaled = (scaling * column).reshape(bands, -1, 1)  # (r, out_features / r, 1)
    return (scaled * row.unsqueeze(1)).reshape(-1, columns)


def spp_gradients(
    weight: Tensor, gradient: Tensor, row: Tensor, column: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `row` and `column`.

    Args:
        weight: `(out_features, in_features)`, the frozen sparse weight.
        gradient: `(out_features, in_features)` of the multiplied weight; overwritten.
        row: `(r, in_features)`.
        column: `(out_features, 1)`.
        scaling: s.
    """
    bands, columns = row.shape
    product = gradient.mul_(weight).reshape(bands, -1, columns)  # (r, out_features / r, in_features)
    of_column = torch.bmm(product, row.unsqueeze(2)).reshape(-1, 1)
    of_row = torch.bmm(column.reshape(bands, 1, -1), product).reshape(bands, columns)
    return of_row.mul_(scaling), of_column.mul_(scaling)


@dataclass
class SppConfig(AdapterConfig):
    """SPP's settings.

    Attributes:
        r: bands per linear; must divide its output features.
        scaling: what the learned multipliers are multiplied by.
        dropout: probability of dropping, in training only.
        dropout_mode: "row" leaves out the update of whole output rows and costs nothing; "input" drops inputs of the
            update as the published code does, at the price of a second product.
        rank_pattern: `{name ending or regular expression: r}` for linears that need another r.
    """

    r: int = 16
    scaling: float = 2.0
    dropout: float = 0.05
    dropout_mode: Literal["row", "input"] = "row"
    rank_pattern: dict[str, int] | None = None

    method: ClassVar[str] = "spp"
    suggested_rate: ClassVar[float] = 4e-3  # the paper's for 7B

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout_mode not in ("row", "input"):
            raise RecipeError(f'`dropout_mode` must be "row" or "input", got {self.dropout_mode!r}')
        check_rate("dropout", self.dropout)
        check_finite("scaling", self.scaling)
        check_rank(self.r, self.rank_pattern)


class SppLinear(AdapterLinear):
    """A frozen sparse linear with SPP's row and column factors for each adapter."""

    adapter_layer_names = ("secateur_spp_row", "secateur_spp_column")

    def create_(self, adapter: str, config: SppConfig, generator: torch.Generator) -> None:
        """Create `row` uniform in +-1/sqrt(in_features) and `column` zero (both zero would never train)."""
        r = rank_of(config, self.name)
        if self.out_features % r:
            near = [n for n in range(1, self.out_features + 1) if not self.out_features % n]
            near.sort(key=lambda n: (abs(n - r), n))
            raise RecipeError(
                f"`r` = {r} does not divide the {self.out_features} output features of `{self.name}`",
                hint=f"{', '.join(map(str, sorted(near[:3])))} do; `rank_pattern` sets r for single linears",
            )
        bound = 1 / math.sqrt(self.in_features)
        row = torch.empty(r, self.in_features).uniform_(-bound, bound, generator=generator)
        column = torch.zeros(self.out_features, 1)
        if not config.init_weights:
            column.normal_(generator=generator)
        self.put_(adapter, secateur_spp_row=row, secateur_spp_column=column)

    def tensors(self, adapter: str) -> tuple[Tensor, ...]:
        """Return `row`, and `column` after dropout of rows."""
        config: Any = self.configs[adapter]
        row, column = super().tensors(adapter)
        if self.training and config.dropout and config.dropout_mode == "row":
            column = F.dropout(column, config.dropout)
        return row, column

    def input_dropout(self, adapter: str) -> float:
        """Return the rate of `dropout_mode="input"`."""
        config: Any = self.configs[adapter]
        return float(config.dropout) if config.dropout_mode == "input" else 0.0

    def delta(self, adapter: str, weight: Tensor, *tensors: Tensor) -> Tensor:
        """Return `weight` times the multiplier."""
        config: Any = self.configs[adapter]
        row, column = tensors
        return weight * spp_multiplier(row, column, config.scaling)

    def combined(self, weight: Tensor, parts: Sequence[tuple[str, tuple[Tensor, ...]]]) -> Tensor:
        """Return `weight (1 + sum of multipliers)`: one pass less over the weight than a sum of deltas."""
        total: Tensor | None = None
        for adapter, (row, column) in parts:
            config: Any = self.configs[adapter]
            multiplier = spp_multiplier(row, column, config.scaling)
            total = multiplier if total is None else total + multiplier
        return weight if total is None else torch.addcmul(weight, weight, total)

    def delta_gradients(
        self, adapter: str, weight: Tensor, gradient: Tensor, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of `row` and `column`."""
        config: Any = self.configs[adapter]
        row, column = tensors
        return spp_gradients(weight, gradient, row, column, config.scaling)


class SppModel(AdapterModel):
    """PEFT's tuner for SPP; says so when the base is not sparse."""

    prefix = "secateur_spp_"
    tuner_layer_cls = SppLinear

    def injected(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Warn if none of the adapted weights has a zero: SPP works then, but there is no sparsity to keep."""
        note_dense_base(model, adapter_name)


register(SppConfig, SppModel)
