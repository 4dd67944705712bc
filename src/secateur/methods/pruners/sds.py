"""SDS: prune, make dense again under mild regularisation, prune a second time.

Li et al., "Enhancing One-shot Pruned Pre-trained Language Models through Sparse-Dense-Sparse Mechanism", COLING 2025,
arXiv 2408.10473. A pruned layer that is drawn part of the way back to the dense layer's outputs has the dense layer's
quality and the pruned layer's histogram, so that the second pruning loses less than the first.

What is published as two times 200 epochs of gradient steps over the calibration tokens is done on the Gram matrix:

- The loss of the re-dense step is quadratic, so T steps of rate r from W_s are `W* + (W_s - W*) (I - r (G + l2))^T`, a
  filter on the eigenvalues of G. Its limit for small rates is a gradient flow whose one parameter is the time `t = r T`.
  One decomposition, shared by all linears with the same inputs, serves every time. Without regularisation the goal W*
  is the dense weight itself: all of the effect lies in stopping on the way, so several times are tried and judged by
  the layer loss after the second pruning. (On CPU the decomposition costs as much as 6 to 8 products of its size, no
  more than powers of the step matrix by squaring would.)
- The L1 term has no closed form; its proximal gradient steps are products with the Gram, too.
- The second weight adjustment runs its soft mask on the Gram: every step selects the mask anew from the latent
  magnitudes, and lets the gradient pass straight through the mask. Here magnitudes are compared where all inputs have
  the same size (`scaled`), latent weights outside the mask decay (Zhou et al., "Learning N:M Fine-Grained Structured
  Sparse Neural Networks From Scratch", ICLR 2021), and steps have momentum; published are plain magnitudes.
- `exact` solves the kept weights after each pruning, the argmin of the paper's formula for a given mask.

The paper's data modes are settings of the sweep: `sequential` gives inputs from the pruned model (its "SD data"),
`error_correction` aims at the dense model's outputs from there ("KD"), neither takes the dense model's inputs ("DD").
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.contracts import Pruner, Scoring
from secateur.core.errors import NumericError, PatternError, RecipeError
from secateur.core.linalg import is_finite, refit, refit_iterative
from secateur.core.method import method
from secateur.core.problem import LayerProblem, Pruned
from secateur.methods.pruners.sparsegpt import SparseGPT

JUDGING_STEPS = 10  # conjugate gradient steps before candidates are compared
POWER_STEPS = 30  # products that find the largest eigenvalue, to about a percent
FLOOR = 1e-12  # smallest diagonal entry that coordinates are scaled by, of the mean one
MIN_GAIN = 1e-3  # another round is started while one lowers the loss by at least this fraction

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of a Gram matrix divided by `level`.

    Attributes:
        values: `(in_features,)`, ascending, not negative.
        vectors: `(in_features, in_features)`, one in each column.
        level: mean of the live diagonal of the Gram.
    """

    values: Tensor
    vectors: Tensor
    level: float

    @classmethod
    def of(cls, gram: Tensor) -> Spectrum:
        """Return the spectrum of `gram`, `(in_features, in_features)`, symmetric, positive semi-definite.

        Raises:
            NumericError: if it is not finite.
        """
        if not is_finite(gram):
            raise NumericError("the Gram matrix of the calibration inputs holds NaN or infinity")
        level = mean_diagonal(gram)
        try:
            values, vectors = torch.linalg.eigh(gram / level)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # missing from its stubs
            values, vectors = (part.to(gram.dtype) for part in torch.linalg.eigh(gram.double() / level))
        return cls(values.clamp_min_(0.0), vectors, level)


def redense(
    sparse: Tensor, target: Tensor, spectrum: Spectrum, time: float, *, l2: float = 0.0, steps: int | None = None
) -> Tensor:
    """Return where gradient descent from `sparse` on the layer loss arrives, all entries free (section 3 of the paper).

    The loss is `1/2 tr((W - target) G (W - target)^T) + l2/2 ||W||^2` with G the Gram over its mean diagonal; it comes
    to rest at `W* = target G (G + l2)^-1`. `time = 0` is `sparse` itself.

    Args:
        sparse: `(out_features, in_features)`, where the descent starts.
        target: `(out_features, in_features)`, the dense weight.
        spectrum: of the Gram.
        time: rate times number of steps, in units of one over the mean diagonal of the Gram.
        l2: weight of the L2 term, in units of the mean diagonal.
        steps: number of explicit steps of equal rate; None is the limit of infinitely many, the gradient flow.

    Raises:
        NumericError: if steps of the rate `time / steps` diverge.
    """
    slopes = spectrum.values + l2
    if steps is None:
        left = torch.exp(-time * slopes)
    else:
        refuse_divergence(time, steps, float(slopes[-1]))
        left = (1 - (time / steps) * slopes).pow(steps)
    # the share of the target at rest; where nothing pulls, what starts there stays there
    rest = spectrum.values / slopes.clamp_min(torch.finfo(slopes.dtype).tiny)
    start, goal = sparse @ spectrum.vectors, (target @ spectrum.vectors) * rest
    return (goal + (start - goal) * left) @ spectrum.vectors.T


def redense_l1(
    sparse: Tensor, target: Tensor, gram: Tensor, time: float, *, l1: float, l2: float = 0.0, steps: int | None = None
) -> Tensor:
    """Return `redense` with the term `l1 ||W||_1` added, by explicit proximal gradient steps on the Gram.

    Each step costs one product of `(out, in)` with `(in, in)`.

    Args:
        sparse: `(out_features, in_features)`, where the descent starts.
        target: `(out_features, in_features)`, the dense weight.
        gram: `(in_features, in_features)`.
        time: rate times number of steps, as in `redense`.
        l1: weight of the L1 term, in units of the mean diagonal times the root mean square of `target`.
        l2: weight of the L2 term, as in `redense`.
        steps: number of steps; None takes as few as are stable.

    Raises:
        NumericError: if steps of the rate `time / steps` diverge.
    """
    unit = gram / mean_diagonal(gram)
    largest = largest_eigenvalue(unit) + l2
    count = max(1, int(time * largest) + 1) if steps is None else steps
    refuse_divergence(time, count, largest)
    rate = time / count
    threshold = rate * l1 * float(target.square().mean().sqrt())
    value = sparse.clone()
    for _ in range(count):
        gradient = (value - target) @ unit
        value.mul_(1 - rate * l2).sub_(gradient, alpha=rate)
        value = torch.nn.functional.softshrink(value, threshold)
    return value


def adjust(
    problem: LayerProblem,
    sparse: Pruned,
    scope: Literal["row", "layer"],
    *,
    steps: int,
    momentum: float = 0.95,
    decay: tuple[float, float] = (0.3, 0.8),
    scaled: bool = True,
) -> Pruned:
    """Return the best of `steps` gradient steps under a soft mask, `sparse` among them (section 3 of the paper).

    Latent weights V, in coordinates in which inputs have the mean square 1 (`scaled`) or as they are, follow
    `(M V - target) G + decay (1 - M) V` for all entries, with M the mask of the largest |V| that the pattern allows,
    selected anew in every step. At rest a latent weight outside the mask is `1 / decay` times what it would become if
    it alone were let in. Below 1 that is optimistic, for its fellows will move too: the search starts with many trials,
    and ends with a mask that stays, as the decay rises.

    Args:
        problem: the layer, with its Gram.
        sparse: a solution of it, where the steps start.
        scope: what an unstructured budget is counted over where the pattern names nothing.
        steps: products of `(out, in)` with `(in, in)`, and selections.
        momentum: share of the last step that is added to each.
        decay: pull on the latent weights outside the mask in the first and the last step, linear between them, in units
            of the mean diagonal; 0 lets them grow for ever.
        scaled: compare magnitudes times the root mean square of their input.
    """
    gram = problem.need("gram")
    level = mean_diagonal(gram)
    diagonal = gram.diagonal().clamp_min(FLOOR * level) if scaled else gram.diagonal().new_full(gram.shape[:1], level)
    size = problem.weight.square().mean().sqrt()  # so that squares neither overflow nor vanish
    if not bool(size > 0):
        return sparse
    scale = diagonal.sqrt() / size

    def compute() -> tuple[Tensor, float]:
        root = diagonal.sqrt()
        unit = gram / root[:, None] / root
        return unit, largest_eigenvalue(unit)

    unit, largest = problem.once(("sds", scaled), compute)
    if largest <= 0:
        return sparse
    target, latent = problem.weight * scale, sparse.weight * scale
    velocity, mask = torch.zeros_like(latent), sparse.mask
    best, least = sparse, float("inf")
    for step in range(steps + 1):
        value = latent * mask
        error = value - target
        gradient = error @ unit
        loss = float(torch.dot(gradient.flatten(), error.flatten()))
        if loss < least:
            least = loss
            if step:
                best = Pruned(value, mask)
        if step == steps:
            break
        pull = decay[0] + (decay[1] - decay[0]) * step / steps
        gradient.add_(latent, alpha=pull).sub_(value, alpha=pull)
        velocity.mul_(momentum).sub_(gradient, alpha=1 / largest)
        latent += velocity
        mask = problem.select(latent.abs(), scope)
    return sparse if best is sparse else Pruned.keep(best.weight / scale, best.mask)


def mean_diagonal(gram: Tensor) -> float:
    """Return the mean of the positive diagonal entries of `gram`; 1 if there are none."""
    live = gram.diagonal()[gram.diagonal() > 0]
    return float(live.mean()) if live.numel() else 1.0


def largest_eigenvalue(gram: Tensor) -> float:
    """Return the largest eigenvalue of `gram`, symmetric, positive semi-definite, a percent too large rather than too small."""
    vector = gram.abs().sum(1)
    found = 0.0
    for _ in range(POWER_STEPS):
        length = float(vector.norm())
        if not length > 0:
            return 0.0
        vector = vector / length
        product = gram @ vector
        found = float(vector @ product)
        vector = product
    return 1.01 * found


def refuse_divergence(time: float, steps: int, largest: float) -> None:
    """Raise NumericError if gradient steps of the rate `time / steps` diverge on a slope of `largest`."""
    if time * largest > 2 * steps:
        raise NumericError(
            f"{steps} gradient steps that reach the time {time:g} diverge: their rate {time / steps:.3g} is above "
            f"{2 / largest:.3g}, two over the largest eigenvalue of the Gram",
            hint=f"take at least {int(time * largest / 2) + 1} steps, shorter times, or leave `redense_steps` out",
        )


@method
class SDS:
    """Three steps around any pruner: prune, re-dense, prune again with a second adjustment of mask and weights.

    The result is never worse than the base pruner's, nor than its exact refit with `exact`.

    Attributes:
        base: prunes both times; the first time not, where `problem.start` is given and fits the pattern.
        times: how long the re-dense step pulls towards the dense weight, each an alternative of which the best is taken,
            in units of one over the mean diagonal of the Gram; empty leaves the re-dense step and second pruning out.
        redense_steps: explicit gradient steps in that time (published 200); None is the limit of many.
        l1: L1 regularisation of the re-dense step, in units of the mean diagonal and the weights' size.
        l2: L2 regularisation of the re-dense step, in units of the mean diagonal.
        rounds: how often dense and sparse follow; 2 is S-D-S-D-S. Ends early when a round gains less than 0.1 %.
        steps: steps of the second adjustment under a soft mask, see `adjust`; 0 leaves it out.
        momentum: of these steps; published none.
        decay: pull on latent weights outside the soft mask in the first and in the last step; published none.
        scaled: compare magnitudes of weights times the root mean square of their input; published as they are.
        exact: solve the kept weights exactly after each pruning and in the end.
        early_exit: return the second pruning unchanged where it is better than the first, as the paper does for large
            models. Saves time and not loss, so off.
    """

    base: Pruner = SparseGPT()
    times: tuple[Positive, ...] = (1.0, 3.0, 10.0)
    redense_steps: Annotated[int, Field(ge=1)] | None = None
    l1: NotNegative = 0.0
    l2: NotNegative = 0.0
    rounds: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=0)] = 100
    momentum: Fraction = 0.95
    decay: tuple[NotNegative, NotNegative] = (0.3, 0.8)
    scaled: bool = True
    exact: bool = True
    early_exit: bool = False

    gram_copies: ClassVar[int] = 6  # tests/engine/test_memory.py measures it

    @property
    def needs(self) -> frozenset[str]:
        """The Gram, and what the base pruner reads."""
        return self.base.needs | {"gram"}

    @property
    def scope(self) -> Literal["row", "layer"]:
        """The base pruner's scope, in all steps."""
        return self.base.scope

    def prune(self, problem: LayerProblem) -> Pruned:
        """Return `problem` solved in three steps.

        The zeros of a `problem.start` that does not fit the pattern, but leaves room for it, stay as frozen ones do.

        Raises:
            InputError: if a statistic is missing.
            PatternError: if the base pruner cannot give the pattern.
            NumericError: if the Gram is not finite, or explicit re-dense steps diverge.
        """
        problem.need("gram")
        problem, first = self._first(problem)
        best = _Judged.of(problem, first)
        if best.loss == 0 or not bool(first.mask.any()):
            return first
        best = self._solved(problem, best)
        for _ in range(self.rounds):
            before = best.loss
            second, eased = self._second(problem, best.pruned)
            if self.early_exit and problem.loss(second.weight) < problem.loss(first.weight):
                return second
            moved = adjust(
                problem,
                eased.pruned,
                self.scope,
                steps=self.steps,
                momentum=self.momentum,
                decay=self.decay,
                scaled=self.scaled,
            )
            best = min(best, eased, self._solved(problem, _Judged.of(problem, moved)), key=lambda each: each.loss)
            if not best.loss < (1 - MIN_GAIN) * before:
                break
        return best.pruned

    def score(self, problem: LayerProblem) -> Tensor:
        """Return the base pruner's score, `(out_features, in_features)`.

        Raises:
            RecipeError: if the base pruner has none.
        """
        if not isinstance(self.base, Scoring):
            raise RecipeError(f"the base pruner `{type(self.base).__name__}` of SDS has no score of single weights")
        return self.base.score(problem)

    def _first(self, problem: LayerProblem) -> tuple[LayerProblem, Pruned]:
        """Return the problem without its start, and the first pruning."""
        if problem.start is None:
            return problem, self._pruned(problem)
        zeros = problem.start == 0
        rest = replace(problem, start=None)
        try:
            problem.pattern.check(~zeros, self.scope)
        except PatternError:
            held = zeros if problem.frozen is None else zeros | problem.frozen
            tight = replace(rest, frozen=held)
            room = not bool((tight.select(problem.start.abs(), self.scope) & held).any())
            return (tight if room else rest), self._pruned(problem)
        return rest, Pruned(problem.start.clone(), ~zeros)

    def _pruned(self, problem: LayerProblem) -> Pruned:
        """Return the base pruner's answer, checked.

        Raises:
            PatternError: naming the base pruner, if it cannot give the pattern.
        """
        try:
            pruned = self.base.prune(problem)
            problem.pattern.check(pruned.mask, self.scope)
        except PatternError as error:
            name = type(self.base).__name__
            raise PatternError(
                f"the base pruner `{name}` of SDS cannot prune to `{problem.pattern}`: {error}"
            ) from error
        return pruned

    def _second(self, problem: LayerProblem, sparse: Pruned) -> tuple[Pruned, _Judged]:
        """Return the best second pruning of all times, as the base left it and with its kept weights eased."""
        found = []
        for time in self.times:
            dense = self._redense(problem, sparse.weight, time)
            pruned = self._pruned(replace(problem, weight=dense, dense=None))
            eased = pruned
            if self.exact:
                weight = refit_iterative(
                    problem.weight, problem.need("gram"), pruned.mask, pruned.weight, iterations=JUDGING_STEPS
                )
                eased = Pruned(weight, pruned.mask)
            found.append((pruned, _Judged.of(problem, eased)))
        return min(found, key=lambda pair: pair[1].loss) if found else (sparse, _Judged.of(problem, sparse))

    def _redense(self, problem: LayerProblem, sparse: Tensor, time: float) -> Tensor:
        """Return the re-dense weight after `time`."""
        gram = problem.need("gram")
        if self.l1 > 0:
            return redense_l1(sparse, problem.weight, gram, time, l1=self.l1, l2=self.l2, steps=self.redense_steps)
        spectrum = problem.once("sds spectrum", lambda: Spectrum.of(gram))
        return redense(sparse, problem.weight, spectrum, time, l2=self.l2, steps=self.redense_steps)

    def _solved(self, problem: LayerProblem, found: _Judged) -> _Judged:
        """Return `found` with its kept weights solved exactly, where that is asked for and better."""
        if not self.exact:
            return found
        weight = refit(problem.weight, problem.need("gram"), found.pruned.mask, start=found.pruned.weight)
        solved = _Judged.of(problem, Pruned(weight, found.pruned.mask))
        return solved if solved.loss < found.loss else found


@dataclass(frozen=True)
class _Judged:
    """A solution and its layer loss, infinite where that is no number."""

    pruned: Pruned
    loss: float

    @classmethod
    def of(cls, problem: LayerProblem, pruned: Pruned) -> _Judged:
        loss = problem.loss(pruned.weight) if is_finite(pruned.weight) else math.inf
        return cls(pruned, math.inf if math.isnan(loss) else loss)
