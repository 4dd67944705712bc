"""Linear algebra of the layer problem: damped factors, exact masked refit, masked conjugate gradients.

Everything is float32 or wider, on the device of its inputs, and never falls back to an identity in silence.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from secateur.core.errors import NumericError

LADDER = 5  # dampings tried: p, 10 p, ... 10^4 p
TRIANGLE = 256  # size below which a triangular matrix is inverted in one call
STRIPS = 8  # strips of a symmetric product
STRIP_WIDTH = 64  # columns below which a strip's product is no longer efficient
BATCH_BYTES = 256 << 20  # memory of one batch of small systems away from CPU
SMALL_FLOP = 3.0  # what a flop of a small factorisation costs in flops of a large product
EXPECTED_STEPS = 40  # steps that the iterative refit needs on Grams of real activations
TOLERANCE = 1e-5  # its last step's share of the loss; leaves it 1e-5 to 3e-4 above the exact one on such Grams
PATIENCE = 6  # gains like the last that may still come; on such Grams two or three do


def is_finite(tensor: Tensor) -> bool:
    """Return whether every entry is finite; looks at single entries only if their sum is not finite."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


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

    Where float32 fails, float64 is tried; where that fails too, the damping is raised tenfold, up to five times.

    Args:
        gram: `(in_features, in_features)`.
        damping: first fraction of the mean diagonal to try; 0 goes on with 1e-6.

    Raises:
        NumericError: if the Gram is not finite, or no damping of the ladder makes it positive definite.
    """
    if not is_finite(gram):
        raise NumericError("the Gram matrix of the calibration inputs holds NaN or infinity")
    tried = damping
    for _ in range(LADDER):
        regular = damped(gram, tried)
        for precision in dict.fromkeys((gram.dtype, torch.float64)):
            factor, info = torch.linalg.cholesky_ex(regular.to(precision))
            if int(info) == 0 and is_finite(factor):
                return factor.to(gram.dtype), tried
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
    return _lower_inverse(lower).flip(0, 1), used  # J L^-1 J is the inverse of J L J


def invert_definite_(matrix: Tensor) -> bool:
    """Replace a symmetric positive definite matrix by its inverse; return whether it had one, else its content is void.

    By halves, with `S = D - C A^-1 C^T` for `[[A, C^T], [C, D]]`: nearly all the work is in large products, which takes
    two thirds of the time of factor and inverse on CPU, and room for a third of the matrix beside it.

    Args:
        matrix: `(n, n)`, float32 or float64.
    """
    size = matrix.shape[0]
    if size <= TRIANGLE:
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) != 0:
            return False
        matrix.copy_(torch.cholesky_inverse(factor))
        return True
    half = size // 2
    upper, corner, lower = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    if not invert_definite_(upper):
        return False
    spread = corner @ upper  # C A^-1
    lower.addmm_(spread, corner.T, alpha=-1)
    if not invert_definite_(lower):
        return False
    corner.addmm_(lower, spread, beta=0, alpha=-1)
    matrix[:half, half:] = corner.T
    upper.addmm_(spread.T, corner, alpha=-1)
    return True


def quadratic_loss(error: Tensor, gram: Tensor) -> Tensor:
    """Return `tr(E G E^T)` as a float64 scalar, without forming the `(out, out)` product.

    The Gram's symmetry saves up to 7/16 of the flops: what is above the diagonal counts twice, the rest is not formed.

    Args:
        error: `(out_features, in_features)`.
        gram: `(in_features, in_features)`, symmetric.
    """
    size = gram.shape[0]
    width = max(-(-size // STRIPS), STRIP_WIDTH)
    total = torch.zeros((), dtype=torch.float64, device=error.device)
    for start in range(0, size, width):
        strip = error[:, start : start + width]
        product = 2 * (error[:, :start] @ gram[:start, start : start + width])  # (out, width)
        product.addmm_(strip, gram[start : start + width, start : start + width])
        total += product.mul_(strip).sum(dtype=torch.float64)
    return total


def refit(
    target: Tensor,
    gram: Tensor,
    mask: Tensor,
    damping: float = 1e-4,
    start: Tensor | None = None,
    form: Literal["auto", "exact", "iterative"] = "auto",
) -> Tensor:
    """Return `argmin_V tr((V - target) (G + d I) (V - target)^T)` over V that is zero where `mask` is False.

    `exact` solves each row's least squares on its own support by a Cholesky factor of the support's part of the Gram:
    `out * support^3 / 3` flops in small pieces. `iterative` runs conjugate gradients on all rows at once: `2 * out *
    in^2` flops per step in one large product, 20 to 60 steps on Grams of real activations. `auto` takes the cheaper,
    and the exact form after all if the iteration has not settled in the time that one would have taken.

    Args:
        target: `(out_features, in_features)`.
        gram: `(in_features, in_features)`.
        mask: bool `(out_features, in_features)`, True = kept.
        damping: fraction `d / mean(diag G)`, pulls V towards the target, not towards 0.
        start: `(out_features, in_features)`, where the iterative form starts; the masked target if None.
        form: which form to use.

    Returns:
        `(out_features, in_features)` in the dtype of `target`, exactly zero where `mask` is False.

    Raises:
        NumericError: as `cholesky_factor`.
    """
    start = target if start is None else start
    if form == "iterative":
        return refit_iterative(target, gram, mask, start, damping)
    # the work of the exact form, in steps of the iterative one
    steps = float((mask.sum(1).double() ** 3).sum()) * SMALL_FLOP / (6.0 * mask.shape[0] * mask.shape[1] ** 2)
    if form == "auto" and steps > EXPECTED_STEPS:
        value, settled = _conjugate_gradients(target, gram, mask, start, damping, int(steps), TOLERANCE)
        if settled:
            return value
    return refit_exact(target, gram, mask, damping)


def refit_exact(target: Tensor, gram: Tensor, mask: Tensor, damping: float = 1e-4) -> Tensor:
    """Return `refit` row by row; a row whose float32 factor fails is solved in float64.

    On CPU this is a Python loop over rows, 0.2 ms each for a support of 230: batched calls are up to seven times slower
    there. Elsewhere rows of like support go through batched calls together.

    Args:
        target: `(out_features, in_features)`.
        gram: `(in_features, in_features)`.
        mask: bool `(out_features, in_features)`.
        damping: as in `refit`.
    """
    regular = _definite(gram, damping)
    linear = target @ regular  # (out, in): right-hand sides before restriction to the support
    result = torch.zeros_like(target)
    sizes = mask.sum(1)
    if target.device.type == "cpu":
        for row in range(target.shape[0]):
            support = mask[row].nonzero().squeeze(1)
            if support.numel():
                system = regular.index_select(0, support).index_select(1, support)
                result[row, support] = _solve_definite(system, linear[row, support])
        return result
    order = sizes.argsort(stable=True)  # rows of like support size share a batch, so padding stays small
    ordered_sizes = sizes[order].tolist()
    first = 0
    while first < len(ordered_sizes):
        last = first + 1
        while last < len(ordered_sizes) and ordered_sizes[last] ** 2 * (last + 1 - first) * 8 <= BATCH_BYTES:
            last += 1
        width = ordered_sizes[last - 1]
        if width:
            rows = order[first:last]
            result[rows] = _refit_rows(linear[rows], regular, mask[rows], width)
        first = last
    return result


def refit_iterative(
    target: Tensor,
    gram: Tensor,
    mask: Tensor,
    start: Tensor,
    damping: float = 1e-4,
    iterations: int = 300,
    tolerance: float = TOLERANCE,
    goal: float | None = None,
) -> Tensor:
    """Return `refit` by diagonally preconditioned conjugate gradients, all rows at once.

    Args:
        target: `(out_features, in_features)`.
        gram: `(in_features, in_features)`.
        mask: bool `(out_features, in_features)`.
        start: `(out_features, in_features)`, read where `mask` is True.
        damping: as in `refit`.
        iterations: products of `(out, in)` with `(in, in)` at most.
        tolerance: stop when a step lowers the loss of all rows together by less than this fraction.
        goal: give up where even `PATIENCE` more gains like the last would leave the damped loss above this.

    Returns:
        `(out_features, in_features)`, exactly zero where `mask` is False, its damped loss not above that of `start`.
    """
    return _conjugate_gradients(target, gram, mask, start, damping, iterations, tolerance, goal)[0]


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


def _conjugate_gradients(
    target: Tensor,
    gram: Tensor,
    mask: Tensor,
    start: Tensor,
    damping: float,
    iterations: int,
    tolerance: float,
    goal: float | None = None,
) -> tuple[Tensor, bool]:
    """Return what `refit_iterative` returns, and whether the tolerance was reached."""
    # without anything to add the Gram itself will do
    regular = damped(gram, damping) if damping or not bool((gram.diagonal() > 0).all()) else gram
    allowed = mask.to(target.dtype)
    inverse_diagonal = 1.0 / regular.diagonal()
    value = start * allowed
    error = target - value
    product = error @ regular
    loss = float((product * error).sum(dtype=torch.float64))
    residual = product.mul_(allowed)
    direction = residual * inverse_diagonal
    energy = (residual * direction).sum(1, keepdim=True)
    product = torch.empty_like(residual)
    tiny = torch.finfo(energy.dtype).tiny
    settled = False
    for _ in range(iterations):
        torch.mm(direction, regular, out=product)
        product *= allowed
        curvature = (direction * product).sum(1, keepdim=True)
        step = torch.where(curvature > 0, energy / curvature.clamp_min(tiny), 0.0)
        value.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        gain = float((step * energy).sum(dtype=torch.float64))
        loss -= gain
        settled = gain <= tolerance * loss or gain == 0
        if settled or (goal is not None and loss - PATIENCE * gain > goal):
            break
        torch.mul(residual, inverse_diagonal, out=product)
        following = (residual * product).sum(1, keepdim=True)
        direction.mul_(torch.where(energy > 0, following / energy.clamp_min(tiny), 0.0)).add_(product)
        energy = following
    return value.masked_fill_(~mask, 0.0), settled


def _lower_inverse(lower: Tensor) -> Tensor:
    """Return the inverse of a lower triangular matrix.

    By halves, `[[A, 0], [C, D]]^-1 = [[A^-1, 0], [-D^-1 C A^-1, D^-1]]`: two thirds of the flops of a triangular solve
    with the identity, nearly all of them in large products.
    """
    size = lower.shape[0]
    if size <= TRIANGLE:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        small: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
        return small
    half = size // 2
    result = torch.zeros_like(lower)
    result[:half, :half] = _lower_inverse(lower[:half, :half])
    result[half:, half:] = _lower_inverse(lower[half:, half:])
    result[half:, :half] = result[half:, half:] @ (lower[half:, :half] @ result[:half, :half]).neg_()
    return result


def _solve_definite(system: Tensor, right: Tensor) -> Tensor:
    """Return the solution `(size,)` of one positive definite system, in float64 if float32 does not suffice."""
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info) == 0:
        return torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1)
    solution: Tensor = torch.linalg.solve(system.double(), right.double())
    return solution.to(right.dtype)


def _refit_rows(linear: Tensor, gram: Tensor, mask: Tensor, width: int) -> Tensor:
    """Solve `G_SS v_S = linear_S` for rows whose supports S hold at most `width` columns; `(rows, in_features)`."""
    support = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]  # kept columns first
    valid = mask.gather(1, support)  # (rows, width), False on the padding of short supports
    system = gram[support.unsqueeze(2), support.unsqueeze(1)]  # (rows, width, width)
    both = valid.unsqueeze(2) & valid.unsqueeze(1)
    system.masked_fill_(~both, 0.0)
    system.diagonal(dim1=1, dim2=2).masked_fill_(~valid, 1.0)
    right = linear.gather(1, support).masked_fill_(~valid, 0.0).unsqueeze(2)
    factor, info = torch.linalg.cholesky_ex(system)
    solution = torch.cholesky_solve(right, factor)
    failed = info != 0
    if bool(failed.any()):
        solution[failed] = torch.linalg.solve(system[failed].double(), right[failed].double()).to(right.dtype)
    return torch.zeros_like(linear).scatter_(1, support, solution.squeeze(2).masked_fill(~valid, 0.0))
