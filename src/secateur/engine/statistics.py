"""What is remembered of a linear's inputs: sums over tokens, collected batch by batch, never the tokens themselves."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from secateur.core.errors import InputError

STATISTICS = ("diag", "mean", "gram", "cross")
STRIPS = 8  # row strips of the lower triangle: 9/16 of the flops; more strips make the products too thin to be fast
TOKENS = 1024  # tokens of one product on CPU: all strips then read them from the cache
SQUARES = 256  # tokens whose squares are formed at once: the temporary stays in the cache


class LayerStats:
    """Sums over calibration tokens of one linear's inputs (or of several linears that share them).

    Sums are float32 and unscaled, so shards add up exactly as tokens do; the properties give means per token.
    Only what is asked for is collected; what was not is None, as in `LayerProblem`.

    Args:
        in_features: width of the inputs.
        wanted: any of `diag`, `mean`, `gram`, `cross`; a Gram brings its diagonal along.
        device: where the sums live; batches are expected there.

    Raises:
        InputError: for an unknown statistic.
    """

    def __init__(self, in_features: int, wanted: Collection[str], device: torch.device | str = "cpu") -> None:
        unknown = sorted(set(wanted) - set(STATISTICS))
        if unknown:
            raise InputError(f"statistic `{unknown[0]}` must be one of {', '.join(STATISTICS)}")
        self.in_features = in_features
        self.wanted = frozenset(wanted)
        self.count = 0
        square = (in_features, in_features)
        self._gram = torch.zeros(square, device=device) if "gram" in self.wanted else None  # lower strips only
        self._cross = torch.zeros(square, device=device) if "cross" in self.wanted else None
        self._mean = torch.zeros(in_features, device=device) if "mean" in self.wanted else None
        alone = "diag" in self.wanted and self._gram is None
        self._diag = torch.zeros(in_features, device=device) if alone else None

    def update(self, sparse_x: Tensor, dense_x: Tensor | None = None, keep: Tensor | None = None) -> None:
        """Add a batch of tokens.

        Args:
            sparse_x: `(tokens, in_features)`, any float dtype, inputs on the sparse path; further leading dimensions
                are tokens too. Zero tokens are allowed (an expert nobody was sent to).
            dense_x: same shape, the same tokens on the dense path; read by `cross` alone.
            keep: bool `(tokens,)`, False on padding, whose values are never looked at; None keeps all.

        Raises:
            InputError: if a shape does not fit, or `cross` is wanted and `dense_x` is missing.
        """
        sparse = self._rows(sparse_x, keep)
        dense = None
        if self._cross is not None:
            if dense_x is None:
                raise InputError("the statistic `cross` needs the inputs of the dense path as well")
            dense = self._rows(dense_x, keep)
            if dense.shape != sparse.shape:
                raise InputError(
                    f"{dense.shape[0]} tokens on the dense path do not match {sparse.shape[0]} on the sparse path"
                )
        self.count += sparse.shape[0]
        step = TOKENS if sparse.device.type == "cpu" else max(sparse.shape[0], 1)
        for start in range(0, sparse.shape[0], step):
            part = sparse[start : start + step].float()
            if self._gram is not None:
                _add_lower_gram_(self._gram, part)
            if self._cross is not None and dense is not None:
                self._cross.addmm_(dense[start : start + step].float().T, part)
            if self._mean is not None:
                self._mean += part.sum(0)
            if self._diag is not None:
                _add_squares_(self._diag, part)

    def merge(self, other: LayerStats) -> None:
        """Add the tokens that `other` has seen; `other` is left as it is.

        Raises:
            InputError: if the two do not collect the same statistics of the same width.
        """
        if (self.in_features, self.wanted) != (other.in_features, other.wanted):
            raise InputError(
                f"statistics {sorted(other.wanted)} of {other.in_features} inputs cannot be added to "
                f"{sorted(self.wanted)} of {self.in_features} inputs"
            )
        self.count += other.count
        for name in ("_gram", "_cross", "_mean", "_diag"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None:
                mine += theirs.to(mine.device)

    @property
    def diag(self) -> Tensor | None:
        """Mean over tokens of x^2, float32 `(in_features,)`; zeros before the first token."""
        total = self._diag if self._gram is None else self._gram.diagonal()
        return None if total is None else total / max(self.count, 1)

    @property
    def mean(self) -> Tensor | None:
        """Mean over tokens of x, float32 `(in_features,)`; zeros before the first token."""
        return None if self._mean is None else self._mean / max(self.count, 1)

    @property
    def gram(self) -> Tensor | None:
        """Mean over tokens of x x^T, sparse path, float32 `(in_features, in_features)`, symmetric, a new tensor."""
        if self._gram is None:
            return None
        result = self._gram / max(self.count, 1)
        for start, stop in _strips(self.in_features):
            result[start:stop, stop:] = result[stop:, start:stop].T
            corner = result[start:stop, start:stop]
            corner.copy_(corner.tril() + corner.tril(-1).T)
        return result

    @property
    def cross(self) -> Tensor | None:
        """Mean over tokens of x_dense x_sparse^T, float32 `(in_features, in_features)`, a new tensor."""
        return None if self._cross is None else self._cross / max(self.count, 1)

    def nbytes(self) -> int:
        """Return the bytes that the sums occupy."""
        return sum(total.nbytes for total in (self._gram, self._cross, self._mean, self._diag) if total is not None)

    def _rows(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """Return the real tokens of `x` as `(tokens, in_features)`, in its own dtype."""
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise InputError(
                f"inputs of shape {tuple(x.shape)} do not end in the {self.in_features} features of this layer"
            )
        rows = x.detach().reshape(-1, self.in_features)
        if keep is None:
            return rows
        flat = keep.reshape(-1)
        if flat.dtype != torch.bool or flat.numel() != rows.shape[0]:
            raise InputError(
                f"`keep` must be a bool per token, got {flat.numel()} of {flat.dtype} for {rows.shape[0]} tokens"
            )
        return rows if bool(flat.all()) else rows[flat]


def _strips(size: int) -> list[tuple[int, int]]:
    """Return the `(start, stop)` of the row strips that a triangle of `size` rows is computed in."""
    width = max(-(-size // STRIPS), 1)
    return [(start, min(start + width, size)) for start in range(0, size, width)]


def _add_squares_(total: Tensor, x: Tensor) -> None:
    """Add the sum over tokens of `x^2` to `total` `(in_features,)`, in place; on CPU by pieces that fit the cache."""
    step = SQUARES if x.device.type == "cpu" else x.shape[0]
    for start in range(0, x.shape[0], step):
        total += x[start : start + step].square().sum(0)


def _add_lower_gram_(gram: Tensor, x: Tensor) -> None:
    """Add `x^T x` to the lower strips of `gram`, in place; what lies right of a strip's own corner is left alone.

    torch has no symmetric rank-k product; strips save 7/16 of the flops of the full one.

    Args:
        gram: float32 `(in_features, in_features)`.
        x: float32 `(tokens, in_features)`.
    """
    for start, stop in _strips(gram.shape[0]):
        gram[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])
