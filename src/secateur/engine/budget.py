"""Which linear gets which pattern: one pattern for all, overrides by name, and budgets over the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.core.errors import PatternError, RecipeError, did_you_mean
from secateur.core.pattern import Pattern, Unstructured, parse_pattern, pruned_count
from secateur.models.blocks import find_blocks
from secateur.models.linears import (
    LinearView,
    all_unknown_matrices,
    check_prunable,
    find_all_linears,
    find_outside_linears,
    match,
)

BUCKETS = 1 << 16


def assign(
    model: nn.Module,
    pattern: str | float | Pattern,
    overrides: Mapping[str, str | float | Pattern | None] | None = None,
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
) -> dict[str, Pattern]:
    """Return the pattern of every linear that will be pruned, checked against its shape.

    Args:
        model: a causal language model.
        pattern: for every linear of the blocks.
        overrides: `{name pattern: pattern}`, the last match wins; None (or `dense`) leaves the linear alone.
        ignore: name patterns of linears, and of matrices that cannot be pruned, to leave alone.
        include: name patterns of linears outside the blocks to prune as well; an embedding by its exact name.

    Raises:
        PatternError: if a pattern does not fit the linear it is for.
        RecipeError: if an entry of `overrides`, `ignore` or `include` matches nothing.
        InputError: if a matrix of the blocks cannot be pruned and is not ignored, or an included linear is tied to a
            module that is not included.
    """
    outside = find_outside_linears(model, include) if include else []
    _refuse_strangers(model, include, outside)
    blocks = find_blocks(model)
    check_prunable(model, ignore, blocks)
    linears = [*find_all_linears(model, blocks=blocks), *outside]
    chosen: dict[str, Pattern] = {}
    general = parse_pattern(pattern)
    special = [(names, _parse_or_none(wanted)) for names, wanted in (overrides or {}).items()]
    unknown = all_unknown_matrices(model, blocks)
    idle = [names for names in ignore if not any(matrix.is_meant([names]) for matrix in unknown)]
    for names in [*(names for names, _ in special), *idle]:
        _refuse_idle(names, linears)
    for linear in linears:
        if _matches(linear, ignore):
            continue
        wanted: Pattern | None = general
        for names, other in special:
            if _matches(linear, [names]):
                wanted = other
        if wanted is None:
            continue
        wanted.fit(linear.out_features, linear.in_features, linear.name)
        chosen[linear.name] = wanted
    if not chosen:
        raise RecipeError(
            "no linear is left to prune", hint="look at `ignore` and `overrides`; `secateur inspect` lists the names"
        )
    return chosen


def divides_model(patterns: Iterable[Pattern]) -> bool:
    """Return whether any pattern counts its budget over the whole model."""
    return any(isinstance(pattern, Unstructured) and pattern.scope == "model" for pattern in patterns)


def divide(patterns: Mapping[str, Pattern], scores: Callable[[], Iterable[tuple[str, Tensor]]]) -> dict[str, Pattern]:
    """Return `patterns` with every `model` budget divided into exact budgets per layer.

    One threshold over all scores of the model: each linear loses what lies below it. Scores are compared by the upper 16
    bits of their float32 form (a relative step below 1 %); within the one undecided step the linears share what is left
    in proportion, so the total is exact and memory is 65,536 counters per linear whatever the model's size.

    Args:
        patterns: `{linear name: Pattern}`.
        scores: returns an iterable over `(linear name, score (out_features, in_features))`, scores not negative.

    Raises:
        PatternError: if different `model` budgets are asked for at once.
    """
    shared = {
        name: pattern
        for name, pattern in patterns.items()
        if isinstance(pattern, Unstructured) and pattern.scope == "model"
    }
    if not shared:
        return dict(patterns)
    targets = {pattern.sparsity for pattern in shared.values()}
    if len(targets) > 1:
        raise PatternError(f"one budget over the whole model is possible, got {len(targets)}: {sorted(targets)}")
    counts: dict[str, Tensor] = {}
    for name, score in scores():
        if name in shared:
            bits = score.detach().float().clamp_min(0).contiguous().view(torch.int32) >> 16
            counts[name] = torch.bincount(bits.reshape(-1), minlength=BUCKETS).cpu()
    sizes = {name: int(count.sum()) for name, count in counts.items()}
    budget = pruned_count(targets.pop(), sum(sizes.values()))
    below = torch.stack(list(counts.values())).sum(0).cumsum(0)
    edge = int(torch.searchsorted(below, budget))  # first bucket in which the budget is used up
    sure = {name: int(count[:edge].sum()) for name, count in counts.items()}
    open_ = {name: int(count[edge]) if edge < BUCKETS else 0 for name, count in counts.items()}
    left, room = budget - sum(sure.values()), sum(open_.values())
    result = dict(patterns)
    for name in counts:
        share = left * open_[name] // room if room else 0
        left, room = left - share, room - open_[name]
        result[name] = Unstructured((sure[name] + share) / sizes[name], "layer")
    return result


def _parse_or_none(wanted: str | float | Pattern | None) -> Pattern | None:
    return None if wanted is None or wanted == "dense" else parse_pattern(wanted)


def _matches(linear: LinearView, names: Sequence[str]) -> bool:
    return match(linear.name, linear.class_name, names)


def _refuse_strangers(model: nn.Module, include: Sequence[str], outside: Sequence[LinearView]) -> None:
    modules = dict(model.named_modules())
    for names in include:
        tied = isinstance(modules.get(names), nn.Embedding)  # its head may stand for it
        if not tied and not any(_matches(linear, [names]) for linear in outside):
            known = [name for name, module in modules.items() if isinstance(module, nn.Embedding | nn.Linear)]
            raise RecipeError(
                f"`include` names `{names}`, which is no linear or embedding outside the blocks{did_you_mean(names, known)}",
                hint="for example lm_head; linears of the blocks are pruned anyway",
            )


def _refuse_idle(names: str, linears: Sequence[LinearView]) -> None:
    if not any(_matches(linear, [names]) for linear in linears):
        known = [linear.name for linear in linears]
        raise RecipeError(
            f"`{names}` matches no linear of the model{did_you_mean(names, known)}",
            hint="a name may be exact, a class, a glob such as `*.down_proj`, or `re:<regex>`",
        )
