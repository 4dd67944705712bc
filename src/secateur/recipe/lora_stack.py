"""The weighted sum of LoRA adapters as one LoRA adapter: their factors stacked, so that nothing is approximated.

sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...], with s_i the scale of adapter i. PEFT 0.21 stacks
too (`add_weighted_adapter(combination_type="cat")`), but scales the sum anew under `use_rslora` and gives every linear one
rank whatever `rank_pattern` says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.core.errors import InputError, NumericError
from secateur.recipe.adapter_folder import CONFIG, WEIGHTS, AdapterFolder

_VARIANTS = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "velora_config", "monteclora_config", "target_parameters", "trainable_token_indices",
)  # fmt: skip
_STARTS = ("gaussian", "orthogonal", "eva")  # texts of `init_lora_weights` that leave the base as it is
_PAIRS = (("lora_A", "lora_B", ".weight"), ("lora_embedding_A", "lora_embedding_B", ""))


@dataclass(frozen=True)
class Stack:
    """A LoRA adapter in memory.

    Attributes:
        config: content of its `adapter_config.json`.
        tensors: by their names in the file.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Write the two files of an adapter folder."""
        text = json.dumps(self.config, indent=2, sort_keys=True)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        save_file(self.tensors, folder / WEIGHTS, metadata={"format": "pt"})


def stacked(folders: Sequence[AdapterFolder], weights: Sequence[float]) -> Stack:
    """Return the sum of LoRA adapters, each times its weight.

    Raises:
        InputError: an adapter is of a variant that is not linear, or does not fit the others.
        NumericError: a value is not finite.
    """
    for folder in folders:
        _refuse_variants(folder)
    parts = [load_file(folder.path / WEIGHTS) for folder in folders]
    modules = list(dict.fromkeys(name for folder in folders for name in folder.modules))
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in modules:
        for first, second, ending in _PAIRS:
            keys = tuple(f"base_model.model.{name}.{kind}{ending}" for kind in (first, second))
            owners = [number for number, part in enumerate(parts) if keys[0] in part]
            if not owners:
                continue
            for number in owners:
                _check_pair(folders[number], keys, parts[number], parts[owners[0]])
            scales = [weights[number] * _scale(folders[number], name) for number in owners]
            tensors[keys[0]] = torch.cat([_wide(parts[number][keys[0]]) for number in owners], dim=0)
            scaled = [scale * _wide(parts[number][keys[1]]) for scale, number in zip(scales, owners, strict=True)]
            tensors[keys[1]] = torch.cat(scaled, dim=1)
            ranks[name] = len(tensors[keys[0]])
            for key in keys:
                if not bool(torch.isfinite(tensors[key]).all()):
                    raise NumericError(f"tensor `{key}` of the sum has values that are NaN or infinite")
    rank = max(ranks.values())
    others = {name: own for name, own in ranks.items() if own != rank}
    config = {
        **folders[0].config,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    return Stack(config, tensors)


def _refuse_variants(folder: AdapterFolder) -> None:
    """Raise InputError unless the update of the adapter is `s B A` and nothing else."""
    config = folder.config
    start = config.get("init_lora_weights")
    found = next((name for name in _VARIANTS if config.get(name)), None)
    if found is None and config.get("bias") not in (None, "none"):
        found = "bias"
    if found is None and isinstance(start, str) and start not in _STARTS:
        found = "init_lora_weights"
    if found is not None:
        raise InputError(
            f"`{found}` in `{folder.path / CONFIG}` is {json.dumps(config[found])[:80]}, so its update is not the plain "
            "product of two matrices and has no exact sum",
            hint="merge it with `secateur merge`",
        )


def _check_pair(folder: AdapterFolder, keys: tuple[str, ...], own: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Raise InputError unless both factors are there and fit those of another adapter."""
    if keys[1] not in own:
        raise InputError(f"tensor `{keys[1]}` of `{folder.path / WEIGHTS}` is missing", hint="the file is incomplete")
    first, second = (own[key] for key in keys)
    if first.dim() < 2 or second.dim() < 2 or first.shape[0] != second.shape[1]:
        raise InputError(f"tensors `{keys[0]}` and `{keys[1]}` of `{folder.path / WEIGHTS}` have no product")
    if keys[1] in other and (first.shape[1:], second.shape[0]) != (other[keys[0]].shape[1:], other[keys[1]].shape[0]):
        raise InputError(
            f"tensor `{keys[0]}` of `{folder.path / WEIGHTS}` is of another model than the first adapter's"
        )


def _scale(folder: AdapterFolder, module: str) -> float:
    """Return what PEFT multiplies the product of the factors of `module` by."""
    config = folder.config
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), module), config.get("r", 8))
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config.get("lora_alpha", 8))
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
