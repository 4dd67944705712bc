"""Linear algebra of the layer problem: damped factors, exact masked refit, masked conjugate gradients.

Everything is float32 or wider, on the device of its inputs, and never falls back to an identity in silence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.errors import NumericError

LADDER = 5  # dampings tried: p, 10 p, ... 10^4 p


def damped(gram: Tensor, damping: float) -> Tensor:
    """Return `gram + damping * mean(diag gram) * I`; an input that was never active gets a diagonal of 1.

    Args:
        gram: `(in_features, in_features)`, symmetric, positive semi-definite.
        damping: fraction of the mean of the live diagonal.
    """
    diagonal = gram.diagonal()
    live = diagonal > 0
    level = diagonal[live].mean() if bool(live.any()) else gram.new_ones(())
    result = gram.clone()
    result.diagonal().add_(damping * level)
    result.diagonal()[~live] = 1.0
    return result


def cholesky_factor(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return the lower Cholesky factor of the damped Gram and the damping that was needed.

    The damping is raised tenfold up to five times where the factorisation fails.

    Args:
        gram: `(in_features, in_features)`.
        damping: first fraction of the mean diagonal to try; 0 goes on with 1e-6.

    Raises:
        NumericError: if the Gram is not finite, or no damping of the ladder makes it positive definite.
    """
    if not torch.isfinite(gram).all():
        raise NumericError("the Gram matrix of the calibration inputs holds NaN or infinity")
    tried = damping
    for _ in range(LADDER):
        factor, info = torch.linalg.cholesky_ex(damped(gram, tried))
        if int(info) == 0 and torch.isfinite(factor).all():
            return factor, tried
        tried = max(tried * 10, 1e-6)
    raise NumericError(
        f"the Gram matrix has no Cholesky factor even with a damping of {tried / 10:g} times its mean diagonal",
        hint="use more calibration text, or a larger `damping`",
    )


def inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return the upper `U` with `(damped gram)^-1 = U^T U` and the damping that was needed.

    With J the reversal of the order, `J H J = L L^T` gives `H = R R^T` with `R = J L J` upper triangular, hence
    `U = R^-1`: one factorisation and one triangular inverse instead of factor, inverse, factor.
    Row j of `U` holds what eliminating column j needs when only the columns j, j+1, ... are left.

    Args:
        gram: `(in_features, in_features)`.
        damping: fraction of the mean diagonal, see `cholesky_factor`.
    """
    lower, used = cholesky_factor(gram.flip(0, 1), damping)
    upper = lower.flip(0, 1).contiguous()
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True), used


def quadratic_loss(error: Tensor, gram: Tensor) -> Tensor:
    """Return `tr(E G E^T)` as a float64 scalar, without forming the `(out, out)` product.

    Args:
        error: `(out_features, in_features)`.
        gram: `(in_features, in_features)`.
    """
    return ((error @ gram) * error).sum(dtype=torch.float64)


def refit(target: Tensor, gram: Tensor, mask: Tensor, damping: float = 1e-4, chunk_bytes: int = 256 << 20) -> Tensor:
    """Return `argmin_V tr((V - target) (G + d I) (V - target)^T)` over V that is zero where `mask` is False.

    Each row is the least-squares solution on its own support, by a batched Cholesky of the support's part of the Gram.
    Work in float64 on CPU (a support's Gram can be close to singular), in float32 elsewhere.

    Args:
        target: `(out_features, in_features)`.
        gram: `(in_features, in_features)`.
        mask: bool `(out_features, in_features)`, True = kept.
        damping: fraction `d / mean(diag G)`, pulls V towards the target, not towards 0.
        chunk_bytes: memory for one batch of rows, bytes.

    Returns:
        `(out_features, in_features)` in the dtype of `target`, exactly zero where `mask` is False.

    Raises:
        NumericError: as `cholesky_factor`.
    """
    regular = _definite(gram, damping)
    linear = target @ regular  # (out, in): right-hand sides before restriction to the support
    result = torch.zeros_like(target)
    sizes = mask.sum(1)
    order = sizes.argsort(stable=True)  # rows of like support size share a batch, so padding stays small
    ordered_sizes = sizes[order].tolist()
    start = 0
    while start < len(ordered_sizes):
        stop = start + 1
        while stop < len(ordered_sizes) and ordered_sizes[stop] ** 2 * (stop + 1 - start) * 8 <= chunk_bytes:
            stop += 1
        width = ordered_sizes[stop - 1]
        if width:
            rows = order[start:stop]
            result[rows] = _refit_rows(linear[rows], regular, mask[rows], width)
        start = stop
    return result


def _refit_rows(linear: Tensor, gram: Tensor, mask: Tensor, width: int) -> Tensor:
    """Solve `G_SS v_S = linear_S` for rows whose supports S hold at most `width` columns; `(rows, in_features)`."""
    support = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]  # kept columns first
    valid = mask.gather(1, support)  # (rows, width), False on the padding of short supports
    system = gram[support.unsqueeze(2), support.unsqueeze(1)]  # (rows, width, width)
    both = valid.unsqueeze(2) & valid.unsqueeze(1)
    system.masked_fill_(~both, 0.0)
    system.diagonal(dim1=1, dim2=2).masked_fill_(~valid, 1.0)
    right = linear.gather(1, support).masked_fill_(~valid, 0.0)
    factor = torch.linalg.cholesky(system)
    solution = torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)
    return torch.zeros_like(linear).scatter_(1, support, solution.masked_fill(~valid, 0.0))


def refit_iterative(
    target: Tensor,
    gram: Tensor,
    mask: Tensor,
    start: Tensor,
    damping: float = 1e-4,
    iterations: int = 50,
    tolerance: float = 1e-6,
) -> Tensor:
    """Return the masked refit of `refit` by diagonally preconditioned conjugate gradients, all rows at once.

    One product of `(out, in)` with `(in, in)` per iteration: cheaper than `refit` where supports are large.

    Args:
        target: `(out_features, in_features)`.
        gram: `(in_features, in_features)`.
        mask: bool `(out_features, in_features)`.
        start: `(out_features, in_features)`, zero where `mask` is False.
        damping: as in `refit`.
        iterations: products at most.
        tolerance: stop when the squared residual of every row fell below `tolerance^2` times its first value.

    Returns:
        `(out_features, in_features)`, exactly zero where `mask` is False, its loss not above that of `start`.
    """
    regular = _definite(gram, damping)
    inverse_diagonal = 1.0 / regular.diagonal()
    value = start.clone()
    residual = ((target - value) @ regular).masked_fill_(~mask, 0.0)
    scaled = residual * inverse_diagonal
    direction = scaled.clone()
    energy = (residual * scaled).sum(1, keepdim=True)
    goal = energy * tolerance**2
    for _ in range(iterations):
        product = (direction @ regular).masked_fill_(~mask, 0.0)
        curvature = (direction * product).sum(1, keepdim=True)
        step = torch.where(curvature > 0, energy / curvature.clamp_min(torch.finfo(energy.dtype).tiny), 0.0)
        value.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        scaled = residual * inverse_diagonal
        following = (residual * scaled).sum(1, keepdim=True)
        if bool((following <= goal).all()):
            break
        ratio = torch.where(energy > 0, following / energy.clamp_min(torch.finfo(energy.dtype).tiny), 0.0)
        direction = scaled.addcmul_(ratio, direction)
        energy = following
    return value.masked_fill_(~mask, 0.0)


def corrected_target(weight: Tensor, cross: Tensor, gram: Tensor, damping: float = 1e-2) -> Tensor:
    """Return the target that makes a sparse-path problem answer for the dense path's outputs.

    `argmin_V E||W x_dense - V x_sparse||^2`, without any mask, is `W cross gram^-1`; with the same damping on both
    matrices equal paths give back `W` exactly in exact arithmetic.

    Args:
        weight: `(out_features, in_features)`, the dense weight.
        cross: `(in_features, in_features)`, E[x_dense x_sparse^T].
        gram: `(in_features, in_features)`, E[x_sparse x_sparse^T].
        damping: fraction of the mean diagonal of `gram`, added to both.
    """
    factor, used = cholesky_factor(gram, damping)
    shifted = cross.clone()
    diagonal = gram.diagonal()
    live = diagonal > 0
    shifted.diagonal().add_(used * (diagonal[live].mean() if bool(live.any()) else gram.new_ones(())))
    shifted.diagonal()[~live] = 1.0
    return torch.cholesky_solve((weight @ shifted).T, factor).T.contiguous()


def _definite(gram: Tensor, damping: float) -> Tensor:
    """Return the damped Gram with the first damping of the ladder that makes it positive definite."""
    _, used = cholesky_factor(gram, damping)
    return damped(gram, used)
