"""Weights and inputs with the traits of a real layer: correlated inputs, a decaying spectrum, unlike channels."""

from __future__ import annotations

import torch
from torch import Tensor


def weight(rows: int, columns: int, seed: int) -> Tensor:
    """Return a float32 `(rows, columns)` weight."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed)) / columns**0.5


def inputs(tokens: int, columns: int, seed: int, decay: float = 1.0) -> Tensor:
    """Return float32 `(tokens, columns)` with eigenvalues k^-decay, rotated, and log-normal channel scales."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    spectrum = torch.arange(1, columns + 1).float().pow(-decay / 2)
    scale = (0.7 * torch.randn(columns, generator=generator)).exp()
    return (torch.randn(tokens, columns, generator=generator) * spectrum) @ rotation.T * scale


def gram(columns: int, seed: int, decay: float = 1.0) -> Tensor:
    """Return the `(columns, columns)` Gram of `inputs`, a mean over four tokens per column."""
    found = inputs(4 * columns, columns, seed, decay)
    return found.T @ found / len(found)
