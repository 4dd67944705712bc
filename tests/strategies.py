"""Matrices and patterns for the tests: weights, Grams with the spectrum of real activations, patterns that fit."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from secateur.core.pattern import NM, Unstructured

seeds = st.integers(0, 2**20)


def random_weight(rows: int, columns: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Return a float32 `(rows, columns)` weight, Gaussian with a slightly heavy tail."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    return scale * normal * (1 + 0.3 * torch.randn(rows, columns, generator=generator).abs())


def correlated_inputs(
    tokens: int, n: int, decay: float = 1.5, spread: float = 0.7, seed: int = 0, offset: float = 0.0
) -> Tensor:
    """Return float32 `(tokens, n)` inputs with eigenvalues k^-decay, rotated, and log-normal channel scales.

    Args:
        tokens: rows.
        n: features.
        decay: exponent of the spectrum; 0 is white.
        spread: standard deviation of the logarithm of the channel scales.
        seed: everything random comes from it.
        offset: mean of the inputs, in units of their channel scale.
    """
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    spectrum = torch.arange(1, n + 1).float().pow(-decay / 2)
    scale = (spread * torch.randn(n, generator=generator)).exp()
    shift = offset * torch.randn(n, generator=generator) / n**0.5
    return ((torch.randn(tokens, n, generator=generator) * spectrum) @ rotation.T + shift) * scale


def correlated_gram(
    n: int, decay: float = 1.5, spread: float = 0.7, seed: int = 0, tokens: int | None = None
) -> Tensor:
    """Return a float32 `(n, n)` Gram of `correlated_inputs`, a mean over `tokens` (four per feature by default)."""
    inputs = correlated_inputs(tokens or 4 * n, n, decay, spread, seed)
    return inputs.T @ inputs / inputs.shape[0]


@st.composite
def weights(
    draw: st.DrawFn,
    rows: st.SearchStrategy[int] = st.integers(1, 8),  # noqa: B008
    columns: st.SearchStrategy[int] = st.integers(1, 24),  # noqa: B008
) -> Tensor:
    """A random weight; about one in four has ties, one in four has zeros."""
    weight = random_weight(draw(rows), draw(columns), draw(seeds))
    kind = draw(st.sampled_from(["plain", "plain", "ties", "zeros"]))
    if kind == "ties":
        return (weight * 2).round() / 2
    return weight.where(weight.abs() > 0.7, 0.0) if kind == "zeros" else weight


@st.composite
def grams(draw: st.DrawFn, n: int) -> Tensor:
    """A Gram of width `n` with a decaying spectrum."""
    return correlated_gram(n, decay=draw(st.sampled_from([0.5, 1.0, 1.5])), seed=draw(seeds))


def patterns(width: int) -> st.SearchStrategy[NM | Unstructured]:
    """Patterns that a weight with `width` columns can carry."""
    divisors = [m for m in range(1, min(width, 32) + 1) if width % m == 0]
    groups = st.sampled_from(divisors).flatmap(lambda m: st.builds(NM, st.integers(0, m), st.just(m)))
    free = st.builds(
        Unstructured, st.sampled_from([0.0, 0.25, 0.5, 0.7, 0.93, 1.0]), st.sampled_from([None, "row", "layer"])
    )
    return groups | free
