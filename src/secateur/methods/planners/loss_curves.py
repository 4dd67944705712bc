"""Loss curves: the budget is solved exactly over what each linear measurably loses at each sparsity.

Ours. For every linear the loss of its layer problem is measured at a few sparsities, with the statistics that one pass
over the dense model gives. What is left is a small optimisation, solved exactly: for unstructured patterns all linears
meet at one slope of their curves (the Lagrange multiplier of the budget; Everett, "Generalized Lagrange Multiplier
Method", Operations Research 11, 1963); for N:M each linear takes one of a few choices, a knapsack.

Losses of different linears are not comparable as they are: the outputs of one enter a softmax, those of another the
residual stream. `weight` says what a linear's loss counts. `gradient` multiplies it by the curvature of the model's own
loss per unit of squared output error, from one backward pass per batch; it is a second-order model that ignores how the
errors of different linears add up. `relative` divides it by the loss of pruning the whole linear.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from secateur.core.allocation import Budget, Prunable, choose, fill, level, settle
from secateur.core.contracts import Plan, PlanTask, Pruner, Statistic
from secateur.core.errors import NumericError, PatternError
from secateur.core.method import method
from secateur.core.pattern import NM, Pattern, parse_pattern
from secateur.core.problem import LayerProblem
from secateur.methods.planners.mixed_sparsity import fisher_traces
from secateur.methods.pruners.wanda import Wanda


@method
class LossCurves:
    """Sparsities, or one N:M for each linear, that make the sum of weighted layer losses least.

    Attributes:
        base: the pruner that the curves are measured with; a cheap one tells most of what a good one would.
        gram: measure losses with the whole Gram matrix, not with its diagonal alone.
        weight: what a linear's loss counts: `gradient` (needs backward passes), `relative` or `absolute`.
        points: sparsities at which an unstructured curve is measured.
        spread: how far a sparsity may lie from the average; for N:M patterns all choices are allowed.
        least: lower bound of every sparsity.
        most: upper bound of every sparsity.
        candidates: for N:M patterns, what a linear may get, such as `["1:4", "2:4", "4:8", "dense"]`; empty takes every N
            of the pattern's M from 1 up.
    """

    base: Pruner = Wanda()
    gram: bool = True
    weight: Literal["gradient", "relative", "absolute"] = "gradient"
    points: Annotated[int, Field(ge=2, le=101)] = 9
    spread: Annotated[float, Field(ge=0, le=1)] = 0.2
    least: Annotated[float, Field(ge=0, le=1)] = 0.0
    most: Annotated[float, Field(ge=0, le=1)] = 1.0
    candidates: tuple[str, ...] = ()

    @property
    def copies(self) -> int:
        """One where gradients are taken."""
        return int(self.backward)

    @property
    def backward(self) -> bool:
        """Whether the model is run with gradients."""
        return self.weight == "gradient"

    def plan(self, task: PlanTask) -> Plan:
        """Return the plan: one pass over the dense model, and one backward pass per batch for `gradient`.

        Raises:
            PatternError: if the bounds or the candidates leave no room for the budget.
            NumericError: if a loss or a gradient is NaN or infinite.
        """
        budget = task.budget
        coarse = isinstance(budget.pattern, NM)
        choices = {linear.name: self._choices(budget, linear) for linear in budget.linears}
        ends = {name: (min(z for z, _ in options), max(z for z, _ in options)) for name, options in choices.items()}
        lowest = [ends[linear.name][0] for linear in budget.linears]
        highest = [ends[linear.name][1] for linear in budget.linears]
        budget.refuse_outside(sum(lowest), sum(highest), *self._bounds(budget))
        traces = fisher_traces(task) if self.weight == "gradient" else {}
        wanted: set[Statistic] = {"gram"} if self.gram else {"diag"}
        for statistic in self.base.needs:
            wanted.add(statistic)  # type: ignore[arg-type]
        curves: dict[str, list[tuple[int, float]]] = {}
        weights: dict[str, float] = {}
        for name, problem in task.problems(wanted):
            weights[name] = self._weight(problem, traces.get(name, 0.0))
            curves[name] = [(zeros, self._loss(problem, pattern)) for zeros, pattern in choices[name]]
            if not all(loss < float("inf") for _, loss in curves[name]):
                raise NumericError(f"the loss of `{name}` is NaN or infinite")
        notes: tuple[str, ...] = ()
        if not any(weights.values()):
            weights = dict.fromkeys(weights, 1.0)
            notes = ("the gradients of all linears are zero, so their losses counted alike",)
        priced = [[(z, weights[linear.name] * loss) for z, loss in curves[linear.name]] for linear in budget.linears]
        patterns: dict[str, Pattern] = {}
        if coarse:
            chosen = choose(priced, budget.total)
            spent = sum(part[index][0] for part, index in zip(priced, chosen, strict=True))
            if spent < budget.total:
                notes += (f"the candidates give {spent} zeros at most, {budget.total - spent} below the budget",)
            patterns = {
                linear.name: choices[linear.name][index][1]
                for linear, index in zip(budget.linears, chosen, strict=True)
            }
        else:
            steps = [budget.step(linear) for linear in budget.linears]
            real = self._solve(budget, priced, lowest, highest)
            counts = settle(real, steps, lowest, highest, budget.total)
            patterns = {
                linear.name: budget.pattern_of(linear, count)
                for linear, count in zip(budget.linears, counts, strict=True)
            }
        return Plan(patterns, scores=weights, notes=notes)

    def _solve(
        self, budget: Budget, priced: list[list[tuple[int, float]]], lowest: list[int], highest: list[int]
    ) -> list[float]:
        """Return the zeros of every linear as real numbers; curves that are all flat give equal sparsities."""
        if all(loss == curve[0][1] for curve in priced for _, loss in curve):
            sizes = [linear.size for linear in budget.linears]
            return level([0.0] * len(sizes), sizes, budget.total, lowest, highest)
        return fill(priced, budget.total)

    def _bounds(self, budget: Budget) -> tuple[float, float]:
        """Return the sparsities between which every linear stays."""
        if isinstance(budget.pattern, NM):
            return self.least, self.most
        middle = budget.pattern.sparsity
        return max(self.least, middle - self.spread), min(self.most, middle + self.spread)

    def _choices(self, budget: Budget, linear: Prunable) -> list[tuple[int, Pattern]]:
        """Return the zeros and patterns that are measured for `linear`, zeros rising."""
        low, high = budget.bounds(linear, self.least, self.most)
        if isinstance(budget.pattern, NM):
            least, most = self.least, self.most
            texts = self.candidates or [f"{n}:{budget.pattern.m}" for n in range(1, budget.pattern.m + 1)]
            found: dict[int, Pattern] = {}
            for text in texts:
                pattern = NM(1, 1) if text == "dense" else parse_pattern(text)
                if not isinstance(pattern, NM):
                    raise PatternError(f"the candidate `{text}` is no N:M pattern", hint="write `2:4` or `dense`")
                zeros = budget.zeros_of(linear, pattern)
                fits = linear.columns % pattern.m == 0 and low <= zeros <= most * linear.size
                # of two candidates with as many zeros, the wider groups are the freer choice
                if fits and (zeros not in found or _width(found[zeros]) < pattern.m):
                    found[zeros] = pattern
            if not found:
                raise PatternError(
                    f"no candidate fits `{linear.name}` between {100 * least:.6g}% and {100 * most:.6g}%",
                    hint="give more `candidates`, or leave the linear out with `ignore`",
                )
            return sorted(found.items())
        step = budget.step(linear)
        least, most = self._bounds(budget)  # to the next step outwards, so that the average itself is always inside
        low = max(low, math.floor(least * linear.size / step) * step)
        high = max(low, min(high, math.ceil(most * linear.size / step) * step))
        counts = sorted(
            {low + round((high - low) * index / (self.points - 1) / step) * step for index in range(self.points)}
        )
        return [(zeros, budget.pattern_of(linear, zeros)) for zeros in counts if zeros <= high]

    def _loss(self, problem: LayerProblem, pattern: Pattern) -> float:
        """Return the loss of `problem` solved by the base pruner under `pattern`."""
        other = LayerProblem(
            problem.weight,
            pattern,
            gram=problem.gram,
            diag=problem.diag,
            mean=problem.mean,
            frozen=problem.frozen,
            shared=problem.shared,
        )
        return problem.loss(self.base.prune(other).weight)

    def _weight(self, problem: LayerProblem, trace: float) -> float:
        """Return what one unit of the linear's loss counts."""
        if self.weight == "absolute":
            return 1.0
        if self.weight == "relative":
            size = problem.size()
            return 1 / size if size > 0 else 0.0
        diagonal = problem.gram.diagonal() if problem.gram is not None else problem.need("diag")
        energy = float(diagonal.double().sum()) * problem.weight.shape[0]
        return trace / energy if energy > 0 else 0.0


def _width(pattern: Pattern) -> int:
    return pattern.m if isinstance(pattern, NM) else 0
