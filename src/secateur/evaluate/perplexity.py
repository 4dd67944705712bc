"""Perplexity of a text: non-overlapping windows, tail dropped, exp of the mean loss over all predicted tokens.

The protocol of the pruning papers (GPTQ, SparseGPT, Wanda), whose mean over windows is the same number, because every
window predicts `length - 1` tokens.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.errors import InputError, NumericError, RecipeError, ResourceError
from secateur.core.progress import Progress, Silent, step
from secateur.evaluate.placement import ready, refuse_unknown_tokens

LOGIT_BYTES = 256 << 20  # what the logits of one batch may take when the batch size is left to us
CHUNK_BYTES = 32 << 20  # float32 log-probabilities alive at once
LARGEST_BATCH = 8


@dataclass(frozen=True)
class Perplexity:
    """The result of one evaluation.

    Attributes:
        value: exp of the mean negative log-likelihood, in nats, of all predicted tokens.
        tokens: how many tokens were predicted.
        windows: how many windows they came from.
        seconds: wall time.
    """

    value: float
    tokens: int
    windows: int
    seconds: float


def perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    length: int,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Return the perplexity of `model` on a text that was tokenised once, as a whole.

    The full model is called, so whatever it does to its logits (soft caps, scaling) is included. Log-probabilities are
    float32, the sum over tokens is float64. Peak memory beside the model: the logits of one batch,
    `batch * length * vocabulary` in the model's dtype, and 32 MiB.

    Args:
        model: a causal language model; left as it was.
        ids: integer `(tokens,)`, any device.
        length: tokens of a window, at least 2; the first token of a window is given and not predicted.
        limit: windows to use, from the start; None uses all.
        batch_size: windows run together; None takes as many as keep the logits under 256 MiB, at most 8. Halved up to
            three times where the device runs out of memory.
        device: where to run; None leaves the model where it is.
        progress: told about every batch.

    Raises:
        RecipeError: if `length`, `limit` or `batch_size` is out of range.
        InputError: if the text is shorter than one window, `length` exceeds the model's positions, or an id is unknown.
        NumericError: if the loss is not finite.
        ResourceError: if not even a single window fits in memory.
    """
    windows = _windows(model, ids, length, limit)
    refuse_unknown_tokens(windows, model)
    if batch_size is not None and batch_size < 1:
        raise RecipeError(f"batch_size is {batch_size}, but must be at least 1")
    sequences = batch_size or _fitting_batch(model, length)
    progress = progress or Silent()
    started = time.perf_counter()
    total, done, halved = 0.0, 0, 0
    with ready(model, device) as place, torch.no_grad(), step(progress, "perplexity", len(windows)) as number:
        while done < len(windows):
            batch = windows[done : done + sequences]  # (sequences, length)
            try:
                loss = _summed_loss(model, batch.to(place))
            except torch.OutOfMemoryError as error:
                if len(batch) == 1 or halved == 3:
                    raise ResourceError(
                        f"the device has no memory for {len(batch)} windows of {length} tokens",
                        hint="lower `length`, or run on another device",
                    ) from error
                sequences, halved = max(1, len(batch) // 2), halved + 1
                continue
            if not math.isfinite(loss):
                raise NumericError(
                    f"the loss is {loss} in windows {done + 1} to {done + len(batch)} of the evaluation text",
                    hint="look for NaN or infinity in the weights, or use a wider dtype",
                )
            total += loss
            done += len(batch)
            progress.advance(number, len(batch))
    tokens = len(windows) * (length - 1)
    mean = total / tokens
    if mean > math.log(1e300):
        raise NumericError(f"the mean loss is {mean:.1f} nats, too large for a perplexity")
    return Perplexity(math.exp(mean), tokens, len(windows), time.perf_counter() - started)


def _windows(model: nn.Module, ids: Tensor, length: int, limit: int | None) -> Tensor:
    """Return int64 `(windows, length)`, checked."""
    if length < 2:
        raise RecipeError(f"length is {length}, but a window needs at least 2 tokens")
    if limit is not None and limit < 1:
        raise RecipeError(f"limit is {limit}, but must be at least 1 window")
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(
            f"token ids must be integers of shape (tokens,), got {ids.dtype} with shape {tuple(ids.shape)}"
        )
    positions = _positions(model)
    if positions is not None and length > positions:
        raise InputError(
            f"length is {length}, but the model has {positions} positions", hint=f"use a length of at most {positions}"
        )
    count = ids.numel() // length
    if count == 0:
        raise InputError(
            f"the evaluation text has {ids.numel()} tokens, but one window of {length} was asked for",
            hint="use a longer text or a smaller length",
        )
    count = count if limit is None else min(count, limit)
    return ids[: count * length].reshape(count, length).long()


def _summed_loss(model: nn.Module, batch: Tensor) -> float:
    """Return the summed negative log-likelihood, nats, of `batch` `(sequences, length)`; first tokens are given."""
    logits: Tensor = model(input_ids=batch, use_cache=False).logits  # (sequences, length, vocabulary)
    rows = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for sequence, targets in zip(logits, batch, strict=True):
        for start in range(0, len(targets) - 1, rows):
            stop = min(start + rows, len(targets) - 1)
            wanted = targets[start + 1 : stop + 1].to(logits.device)
            total += F.cross_entropy(sequence[start:stop].float(), wanted, reduction="none").sum(dtype=torch.float64)
    return float(total)


def _fitting_batch(model: nn.Module, length: int) -> int:
    """Return how many windows keep their logits under `LOGIT_BYTES`."""
    vocabulary = int(getattr(_text_config(model), "vocab_size", 0) or 1)
    itemsize = next(model.parameters()).element_size()
    return max(1, min(LARGEST_BATCH, LOGIT_BYTES // (length * vocabulary * itemsize)))


def _positions(model: nn.Module) -> int | None:
    """Return how many positions the model has, or None where it sets no limit."""
    positions = getattr(_text_config(model), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _text_config(model: nn.Module) -> Any:
    """Return the configuration of the language part."""
    config = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    return getter() if getter is not None else config
