"""ALPS: find mask and weights together by splitting them in two, with a penalty that pulls them ever closer.

Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", NeurIPS 2024,
arXiv 2406.07831. A dense copy B minimises the layer's error, a sparse copy D carries the pattern, and the penalty rho
on their difference grows as the support of D settles (ADMM); conjugate gradients then solve the weights on it.

Inputs are scaled to mean square 1 first. With the scaled target W, the damped correlations A of the inputs and
`U = multiplier / rho`, the published iteration

    B = argmin tr((B - W) A (B - W)^T) + rho |B - D + U|^2,    Z = B + U,    D = Z on the mask of |Z|,    U = Z - D

needs one product, `Z = W + U + rho (D - U - W) (A + rho I)^-1`: no multiplier and no right-hand side are kept.

What differs from the published program, and why:

- the first rho follows the inputs instead of being 0.1: it is as large as leaves B two thirds of its freedom (see
  `first_penalty`), where 0.1 costs 5 to 30 % on steep spectra;
- rho grows at the published rate, but every fifth iteration instead of every third: two fifths fewer inverses for
  as many iterations, and a support that has settled further before it is pressed on;
- the sparse copy goes on past B, to `1.2 B - 0.2 D` (over-relaxation), which takes iterations off; on real inputs more
  than that freezes the support too early;
- one inverse, by halves, whenever rho changes, and the first is shared by all linears with the same inputs; no
  eigendecomposition, which costs more than all of these on CPU and needs float64;
- the damping is a fraction of each input's own mean square, not of their average: the result no longer depends on the
  units of the inputs, and is better on them because quiet inputs keep their correlations;
- iterations end once few entries move, where the published program goes on until none does;
- the conjugate gradients start from the sparse copy, which is near the solution already, and stop when they gain nothing;
- best so far: the plain projection of the target, solved on its own mask, wins where it is better, as with white
  inputs, for which the splitting is not exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.linalg import (
    cholesky_factor,
    invert_definite_,
    is_finite,
    quadratic_loss,
    refit_exact,
    refit_iterative,
)
from secateur.core.method import method
from secateur.core.problem import LayerProblem, Pruned
from secateur.core.select import cut_

# (share of the kept entries that moved since the last look, factor for rho), section 3 and the published program
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
GROWTH_STEPS = 3  # iterations that such a factor is for
STUCK = 0.005  # before rho has ever grown: a support that moves less than this is held by too large a penalty
FREEDOM = 0.68  # of the dense copy under the first penalty: more takes iterations, less freezes the support too early
STARTING = (1e-3, 0.13, 0.5)  # least, first tried and largest first penalty
TRIES = 4  # inverses at most to find it
RESTARTS = 3  # times that such a penalty is divided by 5
SMALL = 64  # columns up to which weights are solved directly
TOLERANCE = 5e-4  # of the conjugate gradients: the share of the loss that their last step gains

SAMPLE = 64  # rows at least that tell whether the plain projection has a chance
HOPE = 1.1  # loss over that of the splitting, on these rows, up to which it has

Select = Callable[[Tensor], Tensor]  # from absolute values `(out, in)` to the mask


@method
class ALPS:
    """Mask and weights by alternating directions: the best loss of a layer at 60 % zeros and more, and with N:M.

    Attributes:
        rho: first penalty, in units of the scaled inputs; published as 0.1, None lets `first_penalty` choose.
        iterations: products of the splitting at most.
        every: iterations between two looks at the support, after each of which rho grows; published as 3.
        settle: the splitting ends when a smaller share of the support has moved since the last look.
        relaxation: how far the sparse copy follows the dense one; published as 1, below 2.
        damping: added to the mean square of each input, as a fraction of it.
        steps: conjugate gradients at the end, at most; they stop once they gain nothing.
    """

    rho: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    iterations: Annotated[int, Field(ge=1)] = 300
    every: Annotated[int, Field(ge=1)] = 5
    settle: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    relaxation: Annotated[float, Field(gt=0, lt=2)] = 1.2
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    steps: Annotated[int, Field(ge=0)] = 20

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    scope: ClassVar[Literal["row", "layer"]] = "layer"
    gram_copies: ClassVar[int] = 4  # correlations, first inverse, present inverse, a third of one while it is made

    def prune(self, problem: LayerProblem) -> Pruned:
        """Return the better of what the splitting finds and of the plain projection, each with its weights solved.

        The splitting begins at `problem.start` where it is given, whose zeros are pruned first; it aims at the target
        all the same. Weights of inputs that are never active are pruned first, and stay as they are if the budget
        leaves them.

        Raises:
            InputError: if the Gram is missing.
            NumericError: if it has no factor even with a large damping.
        """
        scale, unit = standardised(problem, self.damping)
        target = problem.weight * scale
        zeros = None if problem.start is None else problem.start == 0

        def select(values: Tensor) -> Tensor:
            return problem.select(values if zeros is None else values.masked_fill(zeros, -1.0), self.scope)

        first = problem.point * scale
        mask = select(first.abs())
        if bool(mask.all()):
            return Pruned(problem.weight.clone(), mask)
        if not bool(mask.any()):
            return Pruned.keep(problem.weight, mask)

        def start() -> tuple[float, Tensor]:
            if self.rho is None:
                return first_penalty(unit, scale > 0)
            return self.rho, penalised_inverse(unit, self.rho)

        rho, inverse = problem.once(("alps", self.damping, self.rho), start)
        found = split(
            target,
            unit,
            select,
            Pruned.keep(first, mask),
            inverse,
            rho=rho,
            iterations=self.iterations,
            every=self.every,
            settle=self.settle,
            relaxation=self.relaxation,
        ).point
        found = Pruned(self._finish(target, unit, found.mask, found.weight), found.mask)
        if torch.equal(found.mask, mask):
            return unscaled(problem, scale, found)
        # the guard: the projection itself, as long as it has any hope
        if self._hopeless(target, unit, found, Pruned(first, mask)):
            return unscaled(problem, scale, found)
        reached = float(quadratic_loss(found.weight - target, unit))
        plain = self._finish(target, unit, mask, first, reached)
        candidates = [unscaled(problem, scale, each) for each in (found, Pruned(plain, mask))]
        return min(candidates, key=lambda each: problem.loss(each.weight))

    def score(self, problem: LayerProblem) -> Tensor:
        """Return `w^2 E[x_j^2]`: what ranks entries in the first projection, in units of `problem.loss`.

        Returns:
            `(out_features, in_features)`, not negative.
        """
        return problem.weight.square() * problem.need("gram").diagonal()

    def _hopeless(self, target: Tensor, unit: Tensor, found: Pruned, plain: Pruned) -> bool:
        """Return whether the weights of least error on another mask lose far more on some rows, of many; they are not read.

        Args:
            target: `(out_features, in_features)`, scaled.
            unit: `(in_features, in_features)`.
            found: what to compare with.
            plain: the mask, and where its solution starts.
        """
        apart = len(target) // SAMPLE
        if apart < 2:
            return False
        rows = slice(None, None, apart)
        goal = HOPE * float(quadratic_loss(found.weight[rows] - target[rows], unit))
        solved = self._finish(target[rows], unit, plain.mask[rows], plain.weight[rows], goal)
        return float(quadratic_loss(solved - target[rows], unit)) > goal

    def _finish(self, target: Tensor, unit: Tensor, mask: Tensor, start: Tensor, goal: float | None = None) -> Tensor:
        """Return the weights of least error on a mask, `(out_features, in_features)`, scaled as the target."""
        if target.shape[1] <= SMALL:
            return refit_exact(target, unit, mask, 0.0)
        return refit_iterative(target, unit, mask, start, 0.0, self.steps, TOLERANCE, goal)


def standardised(problem: LayerProblem, damping: float) -> tuple[Tensor, Tensor]:
    """Return the root mean square of each input, and their correlations damped so that the diagonal is 1 again.

    An input that is never active has the scale 0 and no correlation with others.

    Args:
        problem: its Gram is read.
        damping: what is added to each mean square, as a fraction of it.

    Returns:
        `(in_features,)` and `(in_features, in_features)`, shared by all problems with the same inputs.
    """

    def compute() -> tuple[Tensor, Tensor]:
        gram = problem.need("gram")
        kind = torch.finfo(gram.dtype)
        diagonal = gram.diagonal()
        # below: so small that its products with other inputs have no digits left
        live = diagonal > (diagonal.max() * (kind.tiny / kind.eps)).clamp_min(kind.tiny)
        scale = diagonal.where(live, 0.0).sqrt()
        inverse = torch.where(live, 1.0 / scale, 0.0)
        unit = (gram * inverse).mul_(inverse[:, None]).clamp_(-1.0, 1.0).div_(1.0 + damping)
        unit.diagonal().fill_(1.0)
        return scale, unit

    return problem.once(("standardised", damping), compute)


def unscaled(problem: LayerProblem, scale: Tensor, found: Pruned) -> Pruned:
    """Return a solution for scaled inputs in the units of the problem; inputs without scale keep the target's weight."""
    weight = torch.where(scale > 0, found.weight / scale, problem.weight)
    return Pruned.keep(weight, found.mask)


def penalised_inverse(unit: Tensor, rho: float, out: Tensor | None = None) -> Tensor:
    """Return `(A + rho I)^-1`, `(in_features, in_features)`; 4/3 n^3 flops, as much as a product with 2/3 n rows.

    Args:
        unit: A, `(in_features, in_features)`, positive semi-definite.
        rho: what is added to its diagonal.
        out: a matrix to put the inverse in.

    Raises:
        NumericError: as `cholesky_factor`, which has to help where rounding leaves the sum indefinite.
    """
    inverse = unit.clone() if out is None else out.copy_(unit)
    inverse.diagonal().add_(rho)
    if not invert_definite_(inverse) or not is_finite(inverse):
        factor, _ = cholesky_factor(unit, rho)
        inverse.copy_(torch.cholesky_inverse(factor))
    return inverse


def first_penalty(unit: Tensor, live: Tensor) -> tuple[float, Tensor]:
    """Return the penalty under which the dense copy keeps the share `FREEDOM` of its freedom, and its inverse.

    With eigenvalues l of the correlations, B follows the data in a direction by the share `l / (l + rho)` and the sparse
    copy by the rest. Their mean is `1 - rho tr((A + rho I)^-1) / n`; Newton's steps on the logarithm of rho bring it
    within 0.02 below and 0.05 above the aim, in one to three inverses.

    Args:
        unit: `(in_features, in_features)`, positive semi-definite with unit diagonal.
        live: bool `(in_features,)`, inputs to look at.

    Returns:
        rho between 0.001 and 0.5, and `(unit + rho I)^-1`.
    """
    least, rho, most = STARTING
    inverse, known = penalised_inverse(unit, rho), int(live.sum())
    for _ in range(TRIES - 1):
        apart = float(inverse.diagonal()[live].mean()) * rho if known else 1.0 - FREEDOM
        miss = apart - (1.0 - FREEDOM)
        if -0.05 < miss < 0.02 or (miss < 0 and rho >= most) or (miss > 0 and rho <= least):
            break
        squares = float(torch.linalg.vector_norm(inverse)) ** 2 - (len(unit) - known) / (1 + rho) ** 2
        slope = apart - squares / known * rho**2  # of `apart` in log rho
        rho = min(max(rho * math.exp(-miss / max(slope, 0.02)), least, rho / 20), most)
        inverse = penalised_inverse(unit, rho, inverse)
    return rho, inverse


@dataclass(frozen=True)
class Split:
    """The end of a splitting.

    Attributes:
        point: the sparse copy.
        checks: at every look at the support, the iteration, rho, and the share of the kept entries that had moved.
    """

    point: Pruned
    checks: tuple[tuple[int, float, float], ...]


def split(
    target: Tensor,
    unit: Tensor,
    select: Select,
    first: Pruned,
    inverse: Tensor,
    *,
    rho: float = 0.1,
    iterations: int = 300,
    every: int = 5,
    settle: float = 0.05,
    relaxation: float = 1.2,
) -> Split:
    """Return a sparse point near the best one, by alternating directions.

    One product `2 * out * in^2` and one selection per iteration, about 20 of them on the Grams of `benchmarks/realistic.py`.

    Args:
        target: `(out_features, in_features)`, scaled.
        unit: `(in_features, in_features)`, positive semi-definite with unit diagonal.
        select: gives the mask of absolute values; keeps equally many each time.
        first: where the sparse copy begins; keeps at least one entry.
        inverse: `(in_features, in_features)`, `(unit + rho I)^-1` of the first rho.
        rho: first penalty.
        iterations: at most.
        every: iterations between two looks at the support, after which rho grows at the rate of `GROWTH`.
        settle: end when a smaller share of the kept entries has moved, or none.
        relaxation: 1 is the published iteration; above it, Z is made of `relaxation B + (1 - relaxation) D` instead of B.

    Returns:
        The sparse copy; its values are those of `B + U` on the mask, near the optimum there but not at it.

    Source: arXiv 2406.07831, section 3.1 and algorithm 1; the schedule from the published program.
    """
    kept = int(first.mask.sum())
    mask, seen = first.mask, first.mask
    away, rest = first.weight - target, torch.zeros_like(target)  # D - W; U, zero on the mask
    spare, own = torch.empty_like(target), None
    started, restarts, checks = False, RESTARTS, []
    for iteration in range(1, iterations + 1):
        torch.sub(away, rest, out=spare)
        rest.addmm_(spare, inverse, alpha=relaxation * rho)
        if relaxation != 1.0:
            rest.add_(away, alpha=1.0 - relaxation)
        both = torch.add(rest, target, out=spare)  # Z; what `rest` holds is Z - W
        mask = select(torch.abs(both, out=away))
        cut_(both, ~mask, out=both)
        rest, away, spare = both, rest.sub_(both), away
        if iteration % every:
            continue
        moved = int((mask != seen).sum()) / kept
        checks.append((iteration, rho, moved))
        seen = mask
        if not started and moved <= STUCK:
            if not restarts:
                break
            restarts -= 1
            before, rho = rho, rho / 5
            torch.sub(first.weight, target, out=away)
            mask, seen = first.mask, first.mask
            rest.zero_()
        elif moved < settle or moved == 0:
            break
        else:
            started = True
            factor = next(factor for least, factor in GROWTH if moved > least)
            before, rho = rho, min(rho * factor ** (every / GROWTH_STEPS), 1e6)
            rest *= before / rho
        inverse = own = penalised_inverse(unit, rho, own)  # the first one belongs to others as well
    sparse = away.add_(target)
    return Split(Pruned(cut_(sparse, mask, out=sparse), mask), tuple(checks))
