"""Training with the model in shards (FSDP2): what is refused before it begins, and the whole model again after it.

Accelerate shards the model in place, and nothing takes that back. So an empty copy of the model is kept while it trains,
and filled at the end with what all processes gather.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import RecipeError
from secateur.core.shards import gathered, is_sharded

ASKED, VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"
SETTINGS = {
    # every process reads the weights itself: zeros, targets of an adapter and PST's masks are found in them before
    # Accelerate would send those of the first process
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    # checkpoints are for going on, which torch 2.13 cannot from a whole one of an optimizer without state (SGD); the
    # output is gathered in any case
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
_WRAPPER = "_checkpoint_wrapped_module."  # of Accelerate's own activation checkpointing


def is_asked_for() -> bool:
    """Return whether the launcher asks for shards."""
    return os.environ.get(ASKED, "").lower() in ("1", "true", "yes", "on", "y", "t")


def check_sharding(*, two_pass: bool = False, compact: bool = False, inplace: bool = False) -> None:
    """Raise RecipeError for what cannot be done with shards; to be called before anything is read.

    Args:
        two_pass: an optimizer such as CrAM compares the weights of the whole model.
        compact: states of the optimizer are kept for kept weights alone.
        inplace: a live model is to be changed itself.
    """
    version = os.environ.get(VERSION, "1")
    if version != "2":
        raise RecipeError(
            f"FSDP version {version} is asked for, and only version 2 leaves an adapter its weights",
            hint="launch with --use_fsdp --fsdp_version 2",
        )
    without = "launch without --use_fsdp: DDP keeps the model whole"
    if two_pass:
        raise RecipeError(
            "`around` does not work with sharded weights (FSDP): it compares the weights of the whole model",
            hint=without,
        )
    if compact:
        raise RecipeError(
            "`compact_state` does not work with sharded weights (FSDP), where every process keeps the state of its part",
            hint=f"leave it out, or {without}",
        )
    if inplace:
        raise RecipeError(
            "`inplace` does not work with sharded weights (FSDP), which take the model apart", hint="leave it out"
        )


@contextmanager
def accelerate_settings() -> Iterator[None]:
    """Let Accelerate find the settings that a fine-tuning in shards needs, whatever the launcher has said of them."""
    former = {name: os.environ.get(name) for name in SETTINGS} if is_asked_for() else {}
    os.environ.update({name: SETTINGS[name] for name in former})
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def emptied(model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose parameters take no memory; buffers are copied, ties between parameters stay."""
    known = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    copied: nn.Module = copy.deepcopy(model, dict(known))
    return copied


def whole_again(empty: nn.Module, sharded: nn.Module) -> nn.Module:
    """Return `empty`, from `emptied`, with the weights of `sharded`, on the CPU and in their own dtypes.

    All processes that hold a part must call it, and each gets the whole model.
    """
    places = {id(parameter): name for name, parameter in empty.named_parameters()}
    dtypes = {name: parameter.dtype for name, parameter in empty.named_parameters()}
    found: dict[str, nn.Parameter] = {}
    for name, parameter in named_parameters(sharded):
        value = gathered(parameter).to("cpu", dtypes.get(name, parameter.dtype))
        found[name] = nn.Parameter(value if is_sharded(parameter) else value.clone())
    buffers = {plain_name(name): buffer for name, buffer in sharded.named_buffers()}
    for path, module in empty.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                filled = found[places[id(parameter)]]
                module._parameters[name] = filled.requires_grad_(parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = gathered(buffers[f"{prefix}{name}"]).to("cpu", copy=True)
    return empty


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of `model`, by the names that they had before it was prepared."""
    return [(plain_name(name), parameter) for name, parameter in model.named_parameters()]


def plain_name(name: str) -> str:
    """Return the name that a parameter or buffer had before its block was wrapped."""
    return name.replace(_WRAPPER, "")


def check_sharded(trainer: Any) -> None:
    """Raise RecipeError if `trainer` is going to leave the model whole in spite of being asked for shards."""
    accelerator = trainer.accelerator
    if accelerator.num_processes > 1 and not (trainer.is_fsdp_enabled and accelerator.is_fsdp2):
        raise RecipeError(
            f"shards (FSDP) are asked for, but Accelerate makes none on `{accelerator.device.type}`",
            hint="launch without --use_fsdp, or on GPUs",
        )


def wraps_nothing(trainer: Any) -> bool:
    """Return whether the model is one single shard group, which every forward gathers as a whole."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return plugin is not None and plugin.auto_wrap_policy is None


def in_any_process(flag: bool, device: torch.device) -> bool:
    """Return whether `flag` is true in any process; all of them must ask, and one that is alone need not wait."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    told = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return bool(told)


def whole_masks(model: nn.Module, masks: list[tuple[nn.Parameter, Tensor]]) -> dict[str, Tensor]:
    """Return masks by the names of their parameters, which outlive sharding."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: mask for parameter, mask in masks}
