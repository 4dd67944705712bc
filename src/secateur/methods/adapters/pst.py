"""PST: learn mask and update together while fine-tuning, both from a few numbers.

Li et al., "Parameter-Efficient Sparsity for Large Language Models Fine-Tuning", IJCAI 2022, arXiv 2205.11005; its method
section is followed as the published code (alibaba/AliceMind, S4/PST) has it.
A weight stays if `|W + b UV| + a1 AB + a2 (R + C)` is among the largest of its linear: its size, plus a learned score
that is low-rank and has a part for its row and one for its column. Sparsity rises along a cubic ramp; in the last
steps the mask is fixed, so what is trained there is what is merged.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from transformers import TrainerCallback

from secateur.core.errors import RecipeError, StateError
from secateur.core.mask import pack_bits
from secateur.core.pattern import NM, Pattern, Unstructured, parse_pattern
from secateur.core.shards import gathered
from secateur.train.adapter_config import AdapterConfig, check_finite, check_rank, check_rate, rank_of, register
from secateur.train.adapter_linear import AdapterLinear, adapted_linears
from secateur.train.adapter_model import AdapterModel

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


def ramped_sparsity(step: int, total: int, initial: float, final: float, warmup: float, cooldown: float) -> float:
    """Return the sparsity of optimizer step `step` of `total`: flat, a cubic ramp, flat.

    Source: Zhu & Gupta, arXiv 1710.01878, equation 1, with PST's warm-up and cool-down fractions.
    """
    begin, end = warmup * total, (1 - cooldown) * total
    if step >= end:
        return final
    if step <= begin:
        return initial
    return final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3


def pst_score(
    updated: Tensor, up: Tensor, down: Tensor, rows: Tensor, columns: Tensor, low_rank: float, structure: float
) -> Tensor:
    """Return `|W_t| + a1 AB + a2 (R + C)`, `(out_features, in_features)`.

    Args:
        updated: W_t, the weight with its update, `(out_features, in_features)`.
        up: A, `(out_features, importance_r)`.
        down: B, `(importance_r, in_features)`.
        rows: R, `(out_features, 1)`.
        columns: C, `(1, in_features)`.
        low_rank: a1.
        structure: a2.
    """
    return torch.addmm(updated.abs(), up, down, alpha=low_rank) + structure * (rows + columns)


def unpacked(packed: Tensor, columns: int) -> Tensor:
    """Return bool `(rows, columns)` of eight columns a byte, lowest bit first, without leaving the device."""
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).reshape(packed.shape[0], -1)[:, :columns].bool()


@dataclass
class PstConfig(AdapterConfig):
    """PST's settings.

    Attributes:
        pattern: what the masks end with, counted per linear unless it says row ("90%", "50% row", "2:4").
        r: rank of the update of the weights.
        importance_r: rank of the learned score.
        scaling: b, factor of the update.
        importance_scaling: a1, factor of the low-rank score.
        structure_scaling: a2, factor of the scores of rows and columns.
        initial_sparsity: where the ramp starts, 0..1.
        warmup: fraction of the steps before the ramp.
        cooldown: fraction of the steps after the ramp, with fixed masks.
        interval: optimizer steps between two choices of the masks.
        rank_pattern: `{name ending or regular expression: r}` for linears whose update needs another rank.
    """

    pattern: str = "90%"
    r: int = 8
    importance_r: int = 8
    scaling: float = 1.0
    importance_scaling: float = 1.0
    structure_scaling: float = 1.0
    initial_sparsity: float = 0.0
    warmup: float = 0.1
    cooldown: float = 0.3
    interval: int = 1
    rank_pattern: dict[str, int] | None = None

    method: ClassVar[str] = "pst"

    def __post_init__(self) -> None:
        super().__post_init__()
        pattern = parse_pattern(self.pattern)
        self.pattern = str(pattern)
        if isinstance(pattern, Unstructured):
            pattern.counted_over("layer")
        check_rank(self.r, self.rank_pattern)
        check_rank(self.importance_r, name="importance_r")
        for name in ("scaling", "importance_scaling", "structure_scaling"):
            check_finite(name, getattr(self, name))
        for name in ("initial_sparsity", "warmup", "cooldown"):
            check_rate(name, getattr(self, name))
        if self.warmup + self.cooldown >= 1:
            raise RecipeError(f"`warmup` + `cooldown` must be below 1, got {self.warmup} + {self.cooldown}")
        if pattern.sparsity >= 1:
            raise RecipeError(f"`pattern` = `{self.pattern}` would leave no weight")
        if self.initial_sparsity > pattern.sparsity:
            raise RecipeError(
                f"`initial_sparsity` = {self.initial_sparsity} is more than the {pattern.sparsity} of `{self.pattern}`"
            )
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise RecipeError(f"`interval` must be a whole number from 1, got {self.interval!r}")

    def callbacks(self) -> list[TrainerCallback]:
        """Return the schedule of the masks."""
        return [PstSchedule()]

    def pattern_at(self, step: int, total: int) -> Pattern:
        """Return the pattern of optimizer step `step` of `total`; N:M lowers N step by step."""
        final = parse_pattern(self.pattern)
        sparsity = ramped_sparsity(step, total, self.initial_sparsity, final.sparsity, self.warmup, self.cooldown)
        if isinstance(final, NM):
            return NM(max(final.n, final.m - int(sparsity * final.m + 1e-6)), final.m)
        return Unstructured(sparsity, final.scope)


class PstLinear(AdapterLinear):
    """A frozen linear with PST's update, scores and current mask for each adapter."""

    adapter_layer_names = (
        "secateur_pst_up",
        "secateur_pst_down",
        "secateur_pst_score_up",
        "secateur_pst_score_down",
        "secateur_pst_score_rows",
        "secateur_pst_score_columns",
    )
    other_param_names = ("configs", "secateur_pst_mask", "secateur_pst_fixed")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.secateur_pst_mask = BufferDict(persistent=True)  # uint8 (out_features, ceil(in_features / 8))
        self.secateur_pst_fixed = BufferDict(persistent=True)  # uint8 (), 1 once the mask moves no more

    def create_(self, adapter: str, config: PstConfig, generator: torch.Generator) -> None:
        """Create both low-rank pairs as a normal matrix and a zero one, zero row and column scores, a full mask."""
        parse_pattern(config.pattern).fit(self.out_features, self.in_features, self.name)
        out_features, in_features, r = self.out_features, self.in_features, rank_of(config, self.name)

        def zero(rows: int, columns: int) -> Tensor:
            values = torch.zeros(rows, columns)
            return values if config.init_weights else values.normal_(std=0.1, generator=generator)

        self.put_(
            adapter,
            secateur_pst_up=torch.randn(out_features, r, generator=generator),
            secateur_pst_down=zero(r, in_features),
            secateur_pst_score_up=torch.randn(out_features, config.importance_r, generator=generator),
            secateur_pst_score_down=zero(config.importance_r, in_features),
            secateur_pst_score_rows=zero(out_features, 1),
            secateur_pst_score_columns=zero(1, in_features),
        )
        full = pack_bits(torch.ones(out_features, in_features, dtype=torch.bool))
        self.secateur_pst_mask[adapter] = full
        self.secateur_pst_fixed[adapter] = torch.zeros((), dtype=torch.uint8)

    def mask(self, adapter: str) -> Tensor:
        """Return the current mask, bool `(out_features, in_features)`."""
        return unpacked(self.secateur_pst_mask[adapter], self.in_features)

    def is_fixed(self, adapter: str) -> bool:
        """Return whether the mask has reached its pattern and moves no more."""
        return bool(self.secateur_pst_fixed[adapter])

    @torch.no_grad()
    def choose_mask_(self, adapter: str, pattern: Pattern, *, fix: bool) -> None:
        """Choose the mask anew by the current scores; with `fix` for good.

        Where weights are sharded (FSDP2) all processes gather them and make the same choice.
        """
        config: Any = self.configs[adapter]
        up, down, score_up, score_down, rows, columns = self._still(adapter)
        weight = gathered(self.original_weight()).to(up.dtype)
        updated = torch.addmm(weight, up, down, alpha=config.scaling)
        low_rank, structure = config.importance_scaling, config.structure_scaling
        score = pst_score(updated, score_up, score_down, rows, columns, low_rank, structure)
        packed = pack_bits(pattern.mask(score, "layer")).to(weight.device)
        self.secateur_pst_mask[adapter].copy_(packed)
        self.secateur_pst_fixed[adapter].fill_(fix)

    def delta(self, adapter: str, weight: Tensor, *tensors: Tensor) -> Tensor:
        """Return the updated weight under the mask, less the weight."""
        return self.masked_weight(adapter, weight, *tensors) - weight

    def masked_weight(self, adapter: str, weight: Tensor, *tensors: Tensor) -> Tensor:
        """Return `M * (W + b UV)`."""
        config: Any = self.configs[adapter]
        up, down = tensors[:2]
        return torch.addmm(weight, up, down, alpha=config.scaling).masked_fill(~self.mask(adapter), 0.0)

    def combined(self, weight: Tensor, parts: Sequence[tuple[str, tuple[Tensor, ...]]]) -> Tensor:
        """Return the weight with one adapter.

        Raises:
            RecipeError: for several, whose masks would contradict each other.
        """
        if len(parts) > 1:
            names = ", ".join(f"`{adapter}`" for adapter, _ in parts)
            raise RecipeError(f"{names} choose different masks and cannot be active together", hint="activate one")
        ((adapter, tensors),) = parts
        return self.masked_weight(adapter, weight, *tensors)

    def delta_gradients(
        self, adapter: str, weight: Tensor, gradient: Tensor, *tensors: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of update and scores; the mask passes on the gradient of each entry to its score.

        While the mask moves, every score gets `D = G * W_t`, and through `|W_t|` the update of every weight gets
        `G * |W_t|`, so that a pruned weight can come back. Once the mask is fixed, kept weights alone are trained.
        """
        config: Any = self.configs[adapter]
        up, down, score_up, score_down, _, _ = tensors
        moving = 1.0 - self.secateur_pst_fixed[adapter].to(weight.dtype)  # a tensor: no wait for the device
        updated = torch.addmm(weight, up, down, alpha=config.scaling)
        of_update = gradient * (self.mask(adapter) + moving * updated.abs())
        of_score = gradient.mul_(updated).mul_(moving)
        beta, low_rank, structure = config.scaling, config.importance_scaling, config.structure_scaling
        return (
            beta * (of_update @ down.T),
            beta * (up.T @ of_update),
            low_rank * (of_score @ score_down.T),
            low_rank * (score_up.T @ of_score),
            structure * of_score.sum(1, keepdim=True),
            structure * of_score.sum(0, keepdim=True),
        )

    def kept(self, adapters: Sequence[str], weight: Tensor) -> Tensor | None:
        """Return the fixed mask."""
        return self.mask(adapters[0])

    def check_mergeable(self, adapters: Sequence[str]) -> None:
        """Raise StateError unless the mask is fixed."""
        for adapter in adapters:
            if not self.is_fixed(adapter):
                found = 1 - float(self.mask(adapter).float().mean())
                config: Any = self.configs[adapter]
                raise StateError(
                    f"the mask of `{adapter}` in `{self.name}` is still moving, with {found:.1%} zeros on the way to "
                    f"`{config.pattern}`",
                    hint="train to the end with the callback `PstSchedule`, or fix the masks now with `advance_pst_`",
                )


class PstModel(AdapterModel):
    """PEFT's tuner for PST."""

    prefix = "secateur_pst_"
    tuner_layer_cls = PstLinear

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adapt the targeted linears of `model`.

        Raises:
            RecipeError: if Accelerate is to send the weights from one process to the others, which it cannot do with
                masks, and as `AdapterModel.inject_adapter` does.
            InputError: as `AdapterModel.inject_adapter` does.
        """
        switches = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
        if all(os.environ.get(name, "").lower() in ("1", "true") for name in switches):
            raise RecipeError(
                "Accelerate's `fsdp_cpu_ram_efficient_loading` sends parameters to other processes, but not PST's masks",
                hint="set it to false",
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)


def advance_pst_(model: nn.Module, step: int, total: int, adapter: str | None = None) -> None:
    """Bring all masks to optimizer step `step` of `total`.

    Masks are chosen every `interval` steps and once more where the ramp ends; from there on they stay. Call it before
    each step of a loop of your own; `step = total` fixes the masks at once.

    Args:
        model: with PST adapters.
        step: optimizer steps done.
        total: optimizer steps of the whole training, at least 1.
        adapter: which one; None: all of them.

    Raises:
        RecipeError: if the model has no such adapter, or the numbers are out of range.
    """
    if total < 1 or not 0 <= step <= total:
        raise RecipeError(f"`step` must lie between 0 and `total`, and `total` from 1, got {step} of {total}")
    found = False
    for layer in adapted_linears(model):
        if not isinstance(layer, PstLinear):
            continue
        for name, config in layer.configs.items():
            if adapter not in (None, name):
                continue
            assert isinstance(config, PstConfig)
            found = True
            fix = step >= (1 - config.cooldown) * total
            if not layer.is_fixed(name) and (fix or step % config.interval == 0):
                layer.choose_mask_(name, config.pattern_at(step, total), fix=fix)
    if not found:
        raise RecipeError("the model has no PST adapter" + (f" called `{adapter}`" if adapter else ""))


class PstSchedule(TrainerCallback):  # type: ignore[misc]
    """Moves the masks of all PST adapters during `Trainer.train` and fixes them at its end."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the masks for the coming optimizer step."""
        advance_pst_(kwargs["model"], min(state.global_step, state.max_steps), state.max_steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fix the masks if the training reached its last step."""
        if state.global_step >= state.max_steps:
            advance_pst_(kwargs["model"], state.max_steps, state.max_steps)


register(PstConfig, PstModel)
