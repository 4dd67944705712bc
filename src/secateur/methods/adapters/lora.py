"""LoRA, as PEFT has it, with the defaults of the other adapters: the yardstick that they are compared with.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685.
Its update is dense, so merging it into a sparse weight fills the zeros; `masked_lora` is the one that keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft import LoraConfig

from secateur.train.adapter_config import check_expressions

_OWN: dict[str, Any] = {  # as PEFT declares them, which reads more than their defaults
    one.name: field(default=one.default, metadata=one.metadata)
    for one in fields(LoraConfig)
    if one.name in ("use_rslora", "use_dora")
}


@dataclass
class PlainLoraConfig(LoraConfig):  # type: ignore[misc]
    """PEFT's `LoraConfig`, on every linear of the blocks unless said otherwise; saved as plain LoRA.

    Attributes:
        r: rank of the update.
        lora_alpha: the update is scaled by `lora_alpha / r`.
        lora_dropout: probability of dropping an input of the update in training.
        use_rslora: scale by `lora_alpha / sqrt(r)` instead.
        use_dora: train the length of every row beside its direction (DoRA).
        target_modules: names or name endings of the linears to adapt, a regular expression, or "all-linear".
        exclude_modules: names, name endings or a regular expression of what to leave out of those.
        modules_to_save: modules to train and save whole beside the adapter.
        rank_pattern: `{name ending or regular expression: r}` for linears that need another rank.
    """

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    use_rslora: bool = _OWN["use_rslora"]
    use_dora: bool = _OWN["use_dora"]
    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] | None = None

    records: ClassVar[frozenset[str]] = frozenset()
    suggested_rate: ClassVar[float] = 2e-4

    def __post_init__(self) -> None:
        self.rank_pattern = self.rank_pattern or {}
        super().__post_init__()
        for name in ("rank_pattern", "alpha_pattern"):
            check_expressions(name, getattr(self, name))
