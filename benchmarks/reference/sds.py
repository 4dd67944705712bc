"""SDS as its paper describes it: epochs of gradient steps over the calibration tokens, twice.

Step 2 starts at the pruned weight and draws all entries towards the dense outputs; step 3 prunes again and goes on under
a soft mask that is selected anew from the magnitudes in every step, gradients passing straight through. The paper names
neither its optimizer nor how the soft mask is kept from wandering, so the plausible readings are all here: Adam on
mini-batches or plain gradient steps on all tokens, a mask that moves or stays. The best epoch is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Prune = Callable[[Tensor], Tensor]  # a dense weight to a pruned one
Select = Callable[[Tensor], Tensor]  # a score to a bool mask of the pattern


def sds(
    dense: Tensor,
    inputs: Tensor,
    prune: Prune,
    select: Select,
    *,
    epochs: int = 200,
    optimizer: Literal["adam", "gradient"] = "adam",
    learning_rate: float = 1e-3,
    batch: int = 4096,
    soft: bool = True,
    l1: float = 0.0,
    l2: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the pruned weight after steps 1 and 3.

    Args:
        dense: `(out_features, in_features)`.
        inputs: `(tokens, in_features)`.
        prune: the one-shot pruner, used in steps 1 and 3.
        select: masks of magnitudes.
        epochs: passes over the tokens in step 2, and again in step 3.
        optimizer: `adam` steps on every `batch` tokens; `gradient` once per epoch at the largest stable rate.
        learning_rate: of Adam, in units of the weights' root mean square; it falls to zero in a line.
        batch: tokens of a step of Adam.
        soft: select the mask anew in every step of step 3; False keeps that of the second pruning.
        l1: weight of the L1 term.
        l2: weight of the L2 term.
    """
    outputs = inputs @ dense.T
    first = prune(dense)
    settings = (epochs, optimizer, learning_rate * float(dense.square().mean().sqrt()), batch)
    redense = descend(first, inputs, outputs, None, *settings, l1, l2)
    second = prune(redense)
    kept = second != 0
    chosen = select if soft else lambda score: kept
    return first, descend(second, inputs, outputs, chosen, *settings, 0.0, 0.0)


def descend(
    start: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    select: Select | None,
    epochs: int,
    optimizer: str,
    rate: float,
    batch: int,
    l1: float,
    l2: float,
) -> Tensor:
    """Return the weight at the start of the best epoch; `select` gives its mask in each step, None trains all entries.

    Without `select` it is the weight after all epochs, as stopping early is the point of the re-dense step.
    """
    weight = start.clone().requires_grad_()
    whole = optimizer == "gradient"
    if whole:
        rate = 0.5 * len(inputs) / float(torch.linalg.matrix_norm(inputs, 2)) ** 2
    steps = torch.optim.SGD([weight], lr=rate) if whole else torch.optim.Adam([weight], lr=rate)
    pairs = list(zip(inputs.split(batch), outputs.split(batch), strict=True))
    total, done = epochs * len(pairs), 0
    best, least = start, float("inf")
    for _ in range(epochs):
        steps.zero_grad()
        error, first = 0.0, weight.detach().clone()
        if select is not None:
            first *= select(first.abs())
        for x, y in pairs:
            if not whole:
                steps.zero_grad()
            used = weight
            if select is not None:
                mask = select(weight.detach().abs())
                used = weight + (weight * mask - weight).detach()  # forward masked, backward straight through
            squares = (x @ used.T - y).square().sum()
            error += float(squares.detach())
            loss = squares / (len(inputs) if whole else len(x))  # per token, summed over the outputs
            if l1 or l2:
                loss = loss + (l1 * weight.abs().sum() + l2 * weight.square().sum()) / (len(pairs) if whole else 1)
            torch.autograd.backward(loss)
            if not whole:
                done += 1
                steps.param_groups[0]["lr"] = rate * (1 - done / (total + 1))
                steps.step()
        if whole:
            steps.step()
        if error < least:
            best, least = first, error
    return weight.detach() if select is None else best
