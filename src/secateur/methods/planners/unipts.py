"""UniPTS: search for each linear's sparsity, then distil the dense model into a copy whose masks still move.

Xie et al., "UniPTS: A Unified Framework for Proficient Post-Training Sparsity", CVPR 2024, arXiv 2405.18810. Three parts:
an evolutionary search over how a regrown share of the weights is spread (all linears are pruned too far first); training
with masks by magnitude that are renewed on the way, gradients straight through them and decay of what is pruned (SR-STE);
and a distillation loss whose weight rises as the base of its logarithm decays.

The paper is about image classifiers. What is different for language models, and otherwise:

- Fitness is the divergence from the dense model's predictions on a few calibration sequences, no labels and no
  normalisation statistics; the uniform plan is in the first generation, the best are carried over, every candidate meets
  the budget exactly, and none is measured twice.
- The student is trained at the teacher's temperature. The published form softens the teacher alone, whose optimum is a
  student with flattened predictions: harmless for the class that is ranked first, ruinous for perplexity.
  `symmetric: false` is that form.
- Only the planned linears are trained, in float32 on a copy of the model; what comes out are weights and masks. Masks
  rest in the last part of the training, and the weights are those of the best pass over the search sequences, the pruned
  start included, so that training never makes the result worse by that measure.

It costs five copies of the planned weights and whole backward passes, far more than any layer-wise method; for a large
language model these are the better use of the time. A run that is interrupted inside the planner plans again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from secateur.core.allocation import Budget
from secateur.core.contracts import Plan, PlanTask
from secateur.core.errors import NumericError
from secateur.core.mask import Masks
from secateur.core.method import method
from secateur.core.pattern import Pattern
from secateur.core.progress import step
from secateur.engine.backward import forget_gradients, gradient, gradients_of, predictions
from secateur.models.linears import LinearView, find_all_linears

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@method
class UniPTS:
    """Searched sparsities, and weights and masks distilled under them.

    Attributes:
        regrow: share of all weights that is pruned too much first and then given back where the search says.
        population: candidates of a generation; the paper has 25.
        parents: best candidates that the next generation is made from, and that stay; the paper has 10.
        generations: rounds of the search, 0 for the uniform plan; the paper has 25.
        mutation: chance that a gene changes.
        sequences: calibration sequences that candidates, and passes of the training, are measured on.
        epochs: passes of the training over the calibration sequences, 0 to search only; the paper has 100.
        optimizer: `adamw`, or `sgd` with momentum as in the paper.
        learning_rate: its peak, reached after a tenth of the steps; falls to zero along a cosine.
        momentum: of `sgd`.
        decay: pull of pruned weights towards zero (SR-STE).
        update: steps between renewals of the masks.
        rest: last share of the steps in which masks stay as they are.
        temperature: of the teacher's predictions; the paper has 4.
        symmetric: the student has the same temperature; False is the published form.
        base: the loss is divided by this at first; the paper's 8.
        base_decay: what the divisor is multiplied by after every epoch.
    """

    regrow: Share = 0.05
    population: Annotated[int, Field(ge=2)] = 12
    parents: Annotated[int, Field(ge=1)] = 4
    generations: Annotated[int, Field(ge=0)] = 6
    mutation: Share = 0.1
    sequences: Annotated[int, Field(ge=1)] = 8
    epochs: Annotated[int, Field(ge=0)] = 3
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Positive = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-5
    update: Annotated[int, Field(ge=1)] = 10
    rest: Share = 0.1
    temperature: Positive = 2.0
    symmetric: bool = True
    base: Positive = 8.0
    base_decay: Annotated[float, Field(gt=0, le=1)] = 0.99

    @property
    def copies(self) -> int:
        """The student; trained, also what lies behind its masks, gradients, and the optimizer's moments."""
        return 2 if self.epochs == 0 else 3 + (2 if self.optimizer == "adamw" else 1)

    @property
    def backward(self) -> bool:
        """Always true: the whole model is run."""
        return True

    def plan(self, task: PlanTask) -> Plan:
        """Return searched patterns, and with training the weights and masks that were found under them.

        Raises:
            PatternError: if zeros that stay leave no room for the budget.
            NumericError: if a weight is not finite, or the loss is not.
        """
        student = Student(task)
        found, fitness = self._search(task, student)
        patterns = task.budget.near(found)
        scores = {"divergence of the uniform plan": fitness[0], "divergence of the searched plan": fitness[1]}
        if self.epochs == 0 or not task.batches:
            return Plan(patterns, scores=scores)
        best, notes = self._train(task, student, patterns)
        scores["divergence after training"] = best
        weights = {name: weight.to("cpu") for name, weight in student.kept.items()}
        masks = Masks({name: mask.cpu() for name, mask in student.kept_masks.items()})
        return Plan(patterns, masks, weights, scores=scores, notes=notes)

    def _search(self, task: PlanTask, student: Student) -> tuple[dict[str, float], tuple[float, float]]:
        """Return the best sparsities found, and the divergence of the uniform plan and of theirs."""
        budget = task.budget
        sizes = torch.tensor([linear.size for linear in budget.linears], dtype=torch.float64)
        uniform = sizes.log()  # genes whose shares are those of the sizes
        known: dict[tuple[Pattern, ...], float] = {}
        batches = measured(task, self.sequences)

        def fitness(genes: Tensor) -> float:
            patterns = budget.near(spread_out(genes, budget, self.regrow))
            key = tuple(patterns.values())
            if key not in known:
                student.prune(patterns)
                known[key] = student.divergence(batches)
            return known[key]

        with step(task.progress, "searching", self.generations + 1) as number:
            ranked = [(fitness(uniform), 0, uniform)]
            task.progress.advance(number, 1)
            count = 1
            for generation in range(self.generations):
                children: list[Tensor] = []
                if generation == 0:
                    children.append(torch.zeros_like(uniform))  # as many weights regrown everywhere, as published
                while len(children) + min(len(ranked), self.parents) < self.population:
                    children.append(self._child([genes for _, _, genes in ranked[: self.parents]], task.generator))
                for genes in children:
                    ranked.append((fitness(genes), count, genes))
                    count += 1
                ranked = sorted(ranked, key=lambda entry: entry[:2])[: max(self.parents, 1)]
                task.progress.advance(number, 1)
        best = spread_out(ranked[0][2], budget, self.regrow)
        return best, (fitness(uniform), ranked[0][0])

    def _child(self, parents: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """Return a mixture of two parents, or a mutation of one; genes are log shares."""
        count = len(parents[0])
        pair = torch.randint(len(parents), (2,), generator=generator)
        if len(parents) > 1 and float(torch.rand((), generator=generator)) < 0.5:
            take = torch.rand(count, generator=generator) < 0.5
            return torch.where(take, parents[int(pair[0])], parents[int(pair[1])])
        change = torch.rand(count, generator=generator) < max(self.mutation, 1 / count)
        noise = torch.randn(count, generator=generator, dtype=torch.float64)
        return parents[int(pair[0])] + torch.where(change, noise, 0.0)

    def _train(
        self, task: PlanTask, student: Student, patterns: Mapping[str, Pattern]
    ) -> tuple[float, tuple[str, ...]]:
        """Train the student; return the least divergence, whose weights and masks the student keeps."""
        batches = measured(task, self.sequences)
        student.prune(patterns)
        best = student.divergence(batches)
        student.keep()
        start = best
        latents = student.parameters()
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(latents, lr=self.learning_rate, weight_decay=0.0)
        else:
            optimizer = torch.optim.SGD(latents, lr=self.learning_rate, momentum=self.momentum)
        steps = self.epochs * len(task.batches)
        resting = steps - math.ceil(self.rest * steps)
        done = 0
        with step(task.progress, "distilling", steps) as number:
            for epoch in range(self.epochs):
                factor = self.temperature**2 / (self.base * self.base_decay**epoch)
                for index in torch.randperm(len(task.batches), generator=task.generator).tolist():
                    for group in optimizer.param_groups:
                        group["lr"] = self.learning_rate * schedule(done, steps)
                    if done and done % self.update == 0 and done <= resting:
                        student.renew(patterns)
                    ids, keep = task.batches[index]
                    loss = partial(self._loss, factor)
                    student.backward(loss, ids, keep, self.decay)
                    optimizer.step()
                    student.write()
                    done += 1
                    task.progress.advance(number, 1)
                now = student.divergence(batches)
                if now < best:
                    best = now
                    student.keep()
        notes: tuple[str, ...] = ()
        if best == start:
            notes = ("training did not lower the divergence from the dense model, so its start is kept",)
        return best, notes

    def _loss(self, factor: float, teacher: Tensor, own: Tensor) -> Tensor:
        """Return the distillation loss, `factor` times."""
        return factor * distillation(own, teacher, self.temperature, self.symmetric)


class Student:
    """A float32 copy of the model that is pruned, measured and trained, beside the dense model.

    Attributes:
        latents: what lies behind the masks, `(out_features, in_features)` each.
        masks: present masks, True = kept.
        kept: weights that `keep` stored, exactly zero outside `kept_masks`.
        kept_masks: their masks.
    """

    def __init__(self, task: PlanTask) -> None:
        self.budget: Budget = task.budget
        self.teacher = task.model
        self.model = copy.deepcopy(task.model).float()
        known = {view.name: view for view in find_all_linears(self.model)}
        self.views: dict[str, LinearView] = {linear.name: known[linear.name] for linear in task.budget.linears}
        self.latents = {name: nn.Parameter(view.read().clone()) for name, view in self.views.items()}
        for name, latent in self.latents.items():
            if not bool(torch.isfinite(latent.detach()).all()):
                raise NumericError(f"the weight of `{name}` holds NaN or infinity")
        self.frozen = {name: latent.detach() == 0 for name, latent in self.latents.items()} if task.freeze_zeros else {}
        self.masks: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        self.kept_masks: dict[str, Tensor] = {}

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained."""
        return list(self.latents.values())

    def prune(self, patterns: Mapping[str, Pattern]) -> None:
        """Mask the largest weights of every linear by its pattern, and put them in the model."""
        self.renew(patterns)
        self.write()

    def renew(self, patterns: Mapping[str, Pattern]) -> None:
        """Choose the masks again, by the magnitude of what lies behind them."""
        for name, latent in self.latents.items():
            score = latent.detach().abs()
            if name in self.frozen:
                score = score.masked_fill(self.frozen[name], -torch.inf)
            self.masks[name] = patterns[name].mask(score, self.budget.scope)

    def write(self) -> None:
        """Put the masked weights in the model."""
        for name, view in self.views.items():
            view.write(self.latents[name].detach().masked_fill(~self.masks[name], 0.0))

    def keep(self) -> None:
        """Remember weights and masks as they are in the model."""
        self.kept = {name: view.read().contiguous().clone() for name, view in self.views.items()}
        self.kept_masks = {name: mask.clone() for name, mask in self.masks.items()}

    def backward(
        self, loss: Callable[[Tensor, Tensor], Tensor], ids: Tensor, keep: Tensor | None, decay: float
    ) -> None:
        """Leave in every latent the gradient straight through its mask, and the decay of what is pruned.

        Args:
            loss: `loss(teacher_logits, student_logits)`, a scalar.
            ids: int64 `(batch, length)`.
            keep: bool `(batch, length)`, False on padding, or None.
            decay: factor of the pruned latents in their gradient.

        Raises:
            NumericError: if the loss is not finite.
        """
        with torch.no_grad():
            teacher, _ = predictions(self.teacher, ids, keep)
        views = list(self.views.values())
        with gradients_of(self.model, views):
            own, _ = predictions(self.model, ids, keep)
            value = loss(teacher.float(), own)
            if not bool(torch.isfinite(value.detach())):
                raise NumericError("the distillation loss is NaN or infinite", hint="lower `learning_rate`")
            value.backward()  # type: ignore[no-untyped-call]
            for name, view in self.views.items():
                # the forward uses latent * mask, so its own gradient is the straight-through one
                latent = self.latents[name]
                latent.grad = gradient(view) + decay * latent.detach().masked_fill(self.masks[name], 0.0)
                if name in self.frozen:
                    latent.grad.masked_fill_(self.frozen[name], 0.0)
            forget_gradients(views)

    @torch.no_grad()
    def divergence(self, batches: Sequence[tuple[Tensor, Tensor | None]]) -> float:
        """Return the mean over tokens of the Kullback-Leibler divergence of the model from the dense one, in nats."""
        total, tokens = 0.0, 0
        for ids, keep in batches:
            teacher, _ = predictions(self.teacher, ids, keep)
            own, _ = predictions(self.model, ids, keep)
            part = F.kl_div(own.log_softmax(-1), teacher.float().log_softmax(-1), reduction="sum", log_target=True)
            total += float(part)
            tokens += len(own)
        if not math.isfinite(total):
            raise NumericError("the predictions of the pruned model are NaN or infinite")
        return total / max(tokens, 1)


def distillation(student: Tensor, teacher: Tensor, temperature: float, symmetric: bool = True) -> Tensor:
    """Return the mean over tokens of KL(softened teacher || student).

    With `symmetric: false` the student has temperature 1, and the gradient with respect to its logits is
    `softmax(student) - softmax(teacher / T)`, divided by the number of tokens.

    Args:
        student: logits `(tokens, vocabulary)`.
        teacher: logits `(tokens, vocabulary)`.
        temperature: T.
        symmetric: whether the student is softened too.
    """
    own = (student / temperature if symmetric else student).log_softmax(-1)
    target = (teacher / temperature).log_softmax(-1)
    return F.kl_div(own, target, reduction="sum", log_target=True) / max(len(student), 1)


def spread_out(genes: Tensor, budget: Budget, regrow: float) -> dict[str, float]:
    """Return the sparsity that each linear would have: pruned too far by `regrow`, then given its share of it back.

    Args:
        genes: `(linears,)`, logarithms of the shares.
        budget: the linears and the pattern.
        regrow: fraction of all weights; less where the pattern leaves less.
    """
    shares = genes.softmax(0).tolist()
    extra = min(regrow, 1 - budget.total / budget.size)
    return {
        linear.name: extra - extra * budget.size * share / linear.size
        for linear, share in zip(budget.linears, shares, strict=True)
    }


def schedule(done: int, steps: int) -> float:
    """Return the learning rate's share of its peak: up in a tenth of the steps, then down a cosine to zero."""
    warm = max(1, steps // 10)
    if done < warm:
        return (done + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (done - warm) / max(1, steps - warm)))


def measured(task: PlanTask, sequences: int) -> list[tuple[Tensor, Tensor | None]]:
    """Return the first batches that hold at least `sequences` sequences together, or all there are."""
    chosen: list[tuple[Tensor, Tensor | None]] = []
    for ids, keep in task.batches:
        if sum(len(tokens) for tokens, _ in chosen) >= sequences:
            break
        chosen.append((ids, keep))
    return chosen
