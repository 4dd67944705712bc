"""The whole model differentiated: losses of one batch, and the gradients of single linears, the model left as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.models.linears import LinearView


@contextmanager
def gradients_of(model: nn.Module, linears: Sequence[LinearView]) -> Iterator[None]:
    """Let backward passes reach the weights of `linears` and nothing else; afterwards all is as it was.

    Args:
        model: a model.
        linears: linears of it.
    """
    wanted = {id(linear.parameter) for linear in linears}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for parameter, required, gradient in before:
            parameter.grad = None
            parameter.requires_grad_(required)
            parameter.grad = gradient


def gradient(linear: LinearView) -> Tensor:
    """Return the gradient of the weight, `(out_features, in_features)`, zeros if no backward pass reached it."""
    found = linear.parameter.grad
    if found is None:
        return torch.zeros_like(linear.read())
    part = found[linear.index] if linear.index else found
    return part.T if linear.transposed else part


def forget_gradients(linears: Iterable[LinearView]) -> None:
    """Drop the gradients of `linears`."""
    for linear in linears:
        linear.parameter.grad = None


def predictions(model: nn.Module, ids: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the logits of the real tokens `(tokens, vocabulary)`, and the tokens that followed them `(tokens,)`.

    The last token of each sequence predicts nothing that is known.

    Args:
        model: a causal language model.
        ids: int64 `(batch, length)`.
        keep: bool `(batch, length)`, False on padding; None where all tokens are real.
    """
    device = next(model.parameters()).device
    tokens = ids.to(device)
    mask = None if keep is None else keep.to(device)
    logits = model(input_ids=tokens, attention_mask=None if mask is None else mask.long(), use_cache=False).logits
    before, after = logits[:, :-1], tokens[:, 1:]
    if mask is None:
        return before.reshape(-1, before.shape[-1]), after.reshape(-1)
    real = mask[:, :-1] & mask[:, 1:]
    return before[real], after[real]


def next_token_loss(model: nn.Module, ids: Tensor, keep: Tensor | None) -> Tensor:
    """Return the sum over tokens of the cross entropy of the text, in nats; arguments as `predictions`."""
    logits, following = predictions(model, ids, keep)
    return F.cross_entropy(logits.float(), following, reduction="sum")


def sampled_loss(model: nn.Module, ids: Tensor, keep: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return the sum over tokens of the cross entropy of tokens drawn from the model's own predictions.

    Its gradient has mean zero, and its second moment is the generalised Gauss-Newton matrix (which for cross entropy is
    the Fisher matrix): draws of different tokens are independent, so this holds for sums over tokens too.
    """
    logits, _ = predictions(model, ids, keep)
    logits = logits.float()
    with torch.no_grad():
        cumulated = logits.softmax(-1).cumsum(-1)
        ticket = torch.rand(len(logits), 1, generator=generator).to(logits.device) * cumulated[:, -1:]
        drawn = torch.searchsorted(cumulated, ticket).squeeze(1).clamp_max(logits.shape[1] - 1)
    return F.cross_entropy(logits, drawn, reduction="sum")
