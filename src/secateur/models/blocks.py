"""Where the blocks of a model are; nothing here knows a family."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.core.errors import InputError

FOREIGN = re.compile(r"(vision|image|video|audio|speech|encoder|decoder)\w*_config$")
BY_BLOCK = "so it cannot be pruned block by block"
DECODER_ONLY = "give a decoder-only language model"


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model, in the order of its forward.

    Attributes:
        names: module names in the model ("model.layers.0", ...).
        modules: the blocks themselves.
        returns: what each class of block returns, learned by the first `capture`: 0 for a bare tensor, else the length
            of its tuple.
    """

    names: tuple[str, ...]
    modules: list[nn.Module]
    returns: dict[type, int] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.names)


def find_blocks(model: nn.Module) -> Blocks:
    """Return the decoder blocks of `model`: its one outermost list of modules that hold matrices.

    Raises:
        InputError: naming the architecture, if it has an encoder beside its decoder, sees or hears, is quantised,
            holds an unmerged adapter, or has no list, or several lists, that could be its blocks.
    """
    _refuse_foreign(model)
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and len(module) and all(map(_is_block, module)):
            lists[name] = module
    if len(lists) > 1:
        stated = getattr(getattr(model, "config", None), "num_hidden_layers", None)
        fitting = {name: module for name, module in lists.items() if len(module) == stated}
        lists = fitting if len(fitting) == 1 else lists
    if len(lists) != 1:
        found = (
            f"several lists of blocks ({', '.join(f'`{name}`' for name in lists)})" if lists else "no list of blocks"
        )
        raise InputError(f"{architecture(model)} has {found}, {BY_BLOCK}", hint=DECODER_ONLY)
    ((name, blocks),) = lists.items()
    if len(set(map(id, blocks))) < len(blocks):
        raise InputError(f"{architecture(model)} uses one block several times in `{name}`, {BY_BLOCK}")
    return Blocks(tuple(f"{name}.{index}" for index in range(len(blocks))), list(blocks))


@contextmanager
def shortened(model: nn.Module, blocks: Blocks, count: int) -> Iterator[nn.Module]:
    """Let `model` end after its first `count` blocks; embeddings, head and the blocks' names stay as they are.

    Args:
        model: the model that `blocks` belong to; it is whole again afterwards.
        blocks: from `find_blocks(model)`.
        count: at least 1.
    """
    home, _, place = blocks.names[0].rpartition(".")[0].rpartition(".")
    parent = model.get_submodule(home)
    whole = getattr(parent, place)
    try:
        setattr(parent, place, nn.ModuleList(blocks.modules[:count]))
        yield model
    finally:
        setattr(parent, place, whole)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off in `module`, and give every submodule its own mode back afterwards."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def architecture(model: nn.Module) -> str:
    """Return the class of `model` and its model type, as errors name it."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} (model type `{kind}`)" if kind else type(model).__name__


def _refuse_foreign(model: nn.Module) -> None:
    """Raise InputError for what is no plain decoder of token ids."""
    config = getattr(model, "config", None)
    name = architecture(model)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder, {BY_BLOCK}", hint=DECODER_ONLY)
    stated = vars(config) if config is not None and hasattr(config, "__dict__") else {}
    foreign = sorted(key for key, value in stated.items() if FOREIGN.search(key) and value is not None)
    if foreign:
        raise InputError(f"{name} has more than a text decoder (its config holds `{foreign[0]}`)", hint=DECODER_ONLY)
    takes = getattr(model, "main_input_name", "input_ids")
    if takes != "input_ids":
        raise InputError(f"{name} takes `{takes}`, not token ids", hint=DECODER_ONLY)
    if getattr(model, "is_quantized", False):
        raise InputError(f"{name} holds quantised weights", hint="give the model in bf16, fp16 or fp32")
    for path, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise InputError(
                f"`{path}` of {name} is wrapped by an adapter ({type(module).__name__})",
                hint="merge it first: model = model.merge_and_unload()",
            )


def _is_block(module: nn.Module) -> bool:
    """Whether `module` is more than one layer and holds a matrix."""
    if isinstance(module, (nn.Linear, Conv1D, nn.Embedding, nn.ModuleList)):
        return False
    return any(parameter.dim() >= 2 for parameter in module.parameters())
