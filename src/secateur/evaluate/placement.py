"""A model made ready to be looked at: evaluation mode, on one device, and put back afterwards exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from secateur.core.errors import InputError


@contextmanager
def ready(model: nn.Module, device: str | torch.device | None = None) -> Iterator[torch.device]:
    """Hold `model` in evaluation mode on `device`, and yield the device its inputs belong on.

    A model that is already there in evaluation mode is not touched at all, so threads may share it.

    Args:
        model: a model with weights; modules in training mode are put back into it.
        device: where to run; None leaves the model where it is.

    Raises:
        InputError: if the model has no weights in memory.
    """
    home = device_of(model)
    target = torch.device(device) if device is not None else home
    moved = target != home and target != torch.device(home.type)  # "cuda" is wherever on CUDA the model already is
    training = [module for module in model.modules() if module.training]
    try:
        if training:
            model.eval()
        if moved:
            model.to(target)
        yield device_of(model)
    finally:
        if moved:
            model.to(home)
        for module in training:
            module.training = True


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the input embedding, else of the first parameter.

    Raises:
        InputError: if the model has no parameters, or they are on the meta device.
    """
    embedding = embedding_of(model)
    parameter = embedding if embedding is not None else next(model.parameters(), None)
    if parameter is None or parameter.device.type == "meta":
        raise InputError(
            f"the model `{type(model).__name__}` has no weights in memory", hint="load it with `secateur.load`"
        )
    return parameter.device


def embedding_of(model: nn.Module) -> torch.Tensor | None:
    """Return the input embedding `(vocabulary, hidden)`, or None where the model does not tell it."""
    getter = getattr(model, "get_input_embeddings", None)
    weight = getattr(getter(), "weight", None) if getter is not None else None
    return weight if isinstance(weight, torch.Tensor) else None


def refuse_unknown_tokens(ids: torch.Tensor, model: nn.Module) -> None:
    """Raise InputError if a token id has no row in the embedding of `model` (on a GPU it would kill the process).

    Args:
        ids: token ids of any shape.
        model: what they are to be given to.
    """
    embedding = embedding_of(model)
    if embedding is None or not ids.numel():
        return
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= embedding.shape[0]:
        bad = lowest if lowest < 0 else highest
        raise InputError(
            f"token id {bad} is outside the model's embedding, which has {embedding.shape[0]} rows",
            hint="use the tokenizer that belongs to this model",
        )
