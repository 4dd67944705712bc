"""Which heads and channels S2FT trains: drawn at random, or by weight, activation, their product, or gradient.

Section 3.2 and table 4 of arXiv 2412.06289 name the strategies. A score belongs to a *unit*: a head with all its columns
or rows, or a single channel. Units are compared over all blocks jointly, so blocks may end up with different counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.core.errors import InputError, NumericError, RecipeError, did_you_mean
from secateur.core.pattern import pruned_count
from secateur.models.blocks import evaluating
from secateur.models.layout import HEADS, KINDS, BlockLayout, Kind, Layout, Place, oriented
from secateur.train.adapter_linear import generator_of

Strategy = Literal["random", "weight", "activation", "product", "gradient"]
Order = Literal["largest", "smallest"]
Amount = int | float
Units = dict[str, dict[int, list[int]]]  # kind -> number of the block -> units, ascending; empty blocks are left out

STRATEGIES: tuple[Strategy, ...] = ("random", "weight", "activation", "product", "gradient")
ORDERS: tuple[Order, ...] = ("largest", "smallest")
READ_TEXT: tuple[Strategy, ...] = ("activation", "product", "gradient")


@dataclass(frozen=True)
class Wish:
    """How units are to be chosen.

    Attributes:
        amounts: for each kind a fraction (float) of the units of all blocks, or a whole number (int) for every block.
        strategy: one of `STRATEGIES`.
        order: whether the largest or the smallest scores are chosen.
        by_group: heads are drawn by whole groups that share keys and values; amounts of `q` and `o` then count groups.
        coupled: `q`, `k`, `v` follow the heads of `o`, and `up`, `gate` the channels of `down`.
        exclude: units that another adapter has taken.
        seed: of the random draw; each kind draws from a stream of its own.
    """

    amounts: Mapping[Kind, Amount]
    strategy: Strategy = "random"
    order: Order = "largest"
    by_group: bool = False
    coupled: bool = False
    exclude: Units = field(default_factory=dict)
    seed: int = 0


def check_amount(kind: str, amount: object) -> None:
    """Raise RecipeError unless `amount` is a fraction or a count."""
    whole = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 0
    if not whole and not (isinstance(amount, float) and math.isfinite(amount) and 0 <= amount <= 1):
        raise RecipeError(
            f"`{kind}` must be a fraction 0.0 to 1.0 of all units, or a whole number of units in every block, got {amount!r}"
        )


def checked_units(name: str, units: Any) -> Units | None:
    """Return `units` with whole numbers as block numbers (JSON has none as keys), sorted.

    Raises:
        RecipeError: if they are malformed.
    """
    if units is None:
        return None
    shape = f"`{name}` must be {{kind: {{block: [units]}}}}"
    if not isinstance(units, Mapping):
        raise RecipeError(f"{shape}, got {units!r}")
    found: Units = {}
    for kind, blocks in units.items():
        if kind not in KINDS:
            raise RecipeError(
                f"`{name}` has no kind {kind!r}{did_you_mean(str(kind), KINDS)}", hint=f"known: {', '.join(KINDS)}"
            )
        if not isinstance(blocks, Mapping):
            raise RecipeError(f"{shape}, `{kind}` has {blocks!r}")
        for number, own in blocks.items():
            if not str(number).isdecimal() or not isinstance(own, list | tuple):
                raise RecipeError(f"{shape}, `{kind}` has {number!r}: {own!r}")
            if any(isinstance(unit, bool) or not isinstance(unit, int) or unit < 0 for unit in own):
                raise RecipeError(
                    f"`{name}` of `{kind}` in block {number} must be whole numbers from 0, got {list(own)}"
                )
            if len(set(own)) < len(own):
                raise RecipeError(f"`{name}` of `{kind}` in block {number} names a unit twice: {list(own)}")
            if own:
                found.setdefault(kind, {})[int(number)] = sorted(own)
    return found


def choose(
    model: nn.Module,
    layout: Layout,
    wish: Wish,
    allowed: Callable[[Place], bool] = lambda place: True,
    batches: Iterable[Any] = (),
) -> Units:
    """Return the units that `wish` means.

    Args:
        model: the model, left as it was.
        layout: where its units live.
        wish: how to choose.
        allowed: whether the units of a place may be chosen.
        batches: text for the strategies that read it, see `token_batches`.

    Raises:
        RecipeError: if more units are asked for than there are.
        InputError: if a strategy needs text and there is none, or a block has no place of a wanted kind.
        NumericError: if a score is not finite.
    """
    kinds = [kind for kind in KINDS if wish.amounts.get(kind)]
    for kind in kinds:
        if kind not in layout.kinds():
            raise InputError(f"{layout.model} has no `{kind}` projection to train")
    scores = unit_scores(model, layout, kinds, wish.strategy, batches)
    units: Units = {}
    for kind in kinds:
        grouped = [block.queries_per_group if wish.by_group and kind in ("q", "o") else 1 for block in layout.blocks]
        totals, pools = [], []
        for number, (block, size) in enumerate(zip(layout.blocks, grouped, strict=True)):
            place = block.places[kind]
            free = torch.ones(place.count, dtype=torch.bool)
            free[wish.exclude.get(kind, {}).get(number, [])] = False
            free = free.reshape(-1, size).all(1) & allowed(place)
            totals.append(place.count // size if allowed(place) else 0)
            pools.append(free.nonzero()[:, 0])
        amount = wish.amounts[kind]
        if kind in scores:
            own = [score.reshape(-1, size).sum(1) for score, size in zip(scores[kind], grouped, strict=True)]
            chosen = ranked(own, pools, totals, amount, wish.order, kind)
        else:
            chosen = drawn(pools, totals, amount, generator_of(wish.seed, kind), kind)
        units[kind] = {
            number: (picked.reshape(-1, 1) * size + torch.arange(size)).reshape(-1).tolist()
            for number, (picked, size) in enumerate(zip(chosen, grouped, strict=True))
            if len(picked)
        }
    if wish.coupled:
        units |= _followers(layout, units)
    return {kind: units[kind] for kind in KINDS if units.get(kind)}


def drawn(
    pools: Sequence[Tensor], totals: Sequence[int], amount: Amount, generator: torch.Generator, what: str = "units"
) -> list[Tensor]:
    """Return units drawn uniformly without replacement, ascending, int64 for each block.

    Args:
        pools: for each block the units that may be drawn, int64.
        totals: for each block how many units it has, free or not; what a fraction is of.
        amount: a fraction of the units of all blocks, drawn jointly, or a whole number for every block.
        generator: on CPU.
        what: names the units in errors.

    Raises:
        RecipeError: if fewer units are left than are asked for.
    """
    scores = [torch.empty(len(pool)) for pool in pools]
    if isinstance(amount, int):
        orders = [torch.randperm(len(pool), generator=generator) for pool in pools]
    else:
        joint = torch.randperm(sum(map(len, pools)), generator=generator)
        orders = list(torch.split(joint, [len(pool) for pool in pools]))
    for score, order in zip(scores, orders, strict=True):
        score.copy_(order)
    return _first(scores, pools, totals, amount, what)


def ranked(
    scores: Sequence[Tensor],
    pools: Sequence[Tensor],
    totals: Sequence[int],
    amount: Amount,
    order: Order = "largest",
    what: str = "units",
) -> list[Tensor]:
    """Return the units with the largest or smallest scores, ascending, int64 for each block; ties keep the first.

    Args:
        scores: for each block `(units,)`, of all its units.
        pools: for each block the units that may be chosen, int64.
        totals: for each block how many units it has, free or not; what a fraction is of.
        amount: a fraction of the units of all blocks, ranked jointly, or a whole number for every block.
        order: "largest" or "smallest".
        what: names the units in errors.

    Raises:
        RecipeError: if fewer units are left than are asked for.
        NumericError: if a score is not finite.
    """
    bad = sum(int((~torch.isfinite(score)).sum()) for score in scores)
    if bad:
        raise NumericError(f"{bad} scores of `{what}` are not finite, so units cannot be ranked")
    sign = -1.0 if order == "largest" else 1.0
    return _first([sign * score[pool] for score, pool in zip(scores, pools, strict=True)], pools, totals, amount, what)


def unit_scores(
    model: nn.Module, layout: Layout, kinds: Sequence[Kind], strategy: Strategy, batches: Iterable[Any] = ()
) -> dict[Kind, list[Tensor]]:
    """Return for each kind and block the score of every unit, float32 `(units,)` on CPU; nothing for "random".

    - "weight": Frobenius norm of the unit's rows or columns;
    - "activation": mean over tokens of the norm of the unit's activation, its part of the input of `o` or `down`; a
      head of keys and values takes the mean over the query heads that read it;
    - "product": for columns the sum over the unit of `||column|| * ||its input||`, norms over all tokens as in Wanda;
      for rows the norm of the unit's rows times the norm of its activation;
    - "gradient": norm of the loss gradient of the unit's weights, summed over the batches.

    Args:
        model: the model; its mode, flags and gradients are left as they were.
        layout: where its units live.
        kinds: what to score.
        strategy: one of `STRATEGIES`.
        batches: text for the strategies that read it, see `token_batches`.

    Raises:
        InputError: if there is no text, or it does not fit the model.
        NumericError: if the loss is not finite.
    """
    if strategy == "random":
        return {}
    if strategy == "weight":
        return {
            kind: [_norms(_lines(model, block.places[kind]), block.places[kind]) for block in layout.blocks]
            for kind in kinds
        }
    if strategy == "gradient":
        return _gradients(model, layout, kinds, batches)
    means, squares = _activations(model, layout, kinds, batches)
    if strategy == "activation":
        return {kind: [_read_by(means, kind, block) for block in layout.blocks] for kind in kinds}
    return {kind: [_product(model, squares, kind, block) for block in layout.blocks] for kind in kinds}


def token_batches(model: nn.Module, batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield ids and attention mask, int64 `(batch, tokens)` on the model's device; the mask may be None.

    Args:
        model: the model that is to read them.
        batches: ids; or pairs of ids and mask, as `Calibration.batches` yields them; or mappings with `input_ids` and
            perhaps `attention_mask`, as a tokenizer or a data loader gives them.

    Raises:
        InputError: if there are none, or they do not fit the model.
    """
    device = next(model.parameters()).device
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    number = -1
    for number, batch in enumerate(batches):
        if isinstance(batch, Mapping):
            ids, keep = batch.get("input_ids"), batch.get("attention_mask")
        else:
            ids, keep = (batch, None) if isinstance(batch, Tensor) else batch
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
            raise InputError(f"batch {number} holds no integer token ids `(batch, tokens)`")
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise InputError(
                f"token ids must lie in 0..{vocabulary - 1}, batch {number} has {int(ids.min())}..{int(ids.max())}"
            )
        if keep is not None and keep.shape != ids.shape:
            raise InputError(f"batch {number} has a mask of shape {tuple(keep.shape)} for ids {tuple(ids.shape)}")
        yield ids.to(device, torch.long), None if keep is None else keep.to(device, torch.long)
    if number < 0:
        raise InputError(
            "the strategies activation, product and gradient read text, and there is none",
            hint="choose the units first: config = secateur.methods.adapters.s2ft.chosen(model, config, batches)",
        )


def _first(
    scores: Sequence[Tensor], pools: Sequence[Tensor], totals: Sequence[int], amount: Amount, what: str
) -> list[Tensor]:
    """Return the units of the smallest scores (one for each unit of a pool); ties keep the first."""
    if isinstance(amount, int):
        short = next(
            (n for n, (pool, total) in enumerate(zip(pools, totals, strict=True)) if total and len(pool) < amount), None
        )
        if short is not None:
            raise RecipeError(
                f"`{what}={amount}` asks block {short} for more than the {len(pools[short])} units it has left"
            )
        picked = [score.argsort(stable=True)[:amount] for score in scores]
        return [pool[own.sort().values] for pool, own in zip(pools, picked, strict=True)]
    count, left = pruned_count(amount, sum(totals)), sum(map(len, pools))
    if count > left:
        raise RecipeError(f"`{what}={amount}` asks for {count} of {sum(totals)} units, and {left} are left")
    sizes = [len(pool) for pool in pools]
    taken = torch.zeros(left, dtype=torch.bool)
    taken[torch.cat(list(scores)).argsort(stable=True)[:count]] = True
    return [pool[own] for pool, own in zip(pools, torch.split(taken, sizes), strict=True)]


def _followers(layout: Layout, units: Units) -> Units:
    """Return the rows that fill the chosen columns: of `q`, `k`, `v` for heads of `o`, of `up`, `gate` for channels."""
    found: Units = {}
    for kind in layout.kinds():
        leader = "o" if kind in HEADS else "down"
        if kind in ("o", "down") or leader not in units:
            continue
        found[kind] = {}
        for number, chosen in units[leader].items():
            per_group = layout.blocks[number].queries_per_group if kind in ("k", "v") else 1
            found[kind][number] = sorted({unit // per_group for unit in chosen})
    return found


def _lines(model: nn.Module, place: Place) -> Tensor:
    """Return the rows or columns of a place as they are in the model, float32 or wider, `(units * size, other side)`."""
    module = model.get_submodule(place.module)
    lines = place.lines(oriented(module, module.get_parameter("weight").detach()))
    return lines.to(torch.promote_types(lines.dtype, torch.float32))


def _norms(lines: Tensor, place: Place) -> Tensor:
    """Return the Frobenius norm of every unit, float32 `(units,)` on CPU."""
    return lines.square().sum(1).reshape(place.count, place.size).sum(1).sqrt().float().cpu()


def _read_by(values: Mapping[str, Tensor], kind: Kind, block: BlockLayout) -> Tensor:
    """Return the statistic `(heads or channels,)` of a block for the units of `kind`; groups take the mean."""
    own = values[block.unit_place(kind).module]
    return own.reshape(-1, block.queries_per_group).mean(1) if kind in ("k", "v") else own


def _product(model: nn.Module, squares: Mapping[str, Tensor], kind: Kind, block: BlockLayout) -> Tensor:
    place, inputs = block.places[kind], block.unit_place(kind)
    square = squares[inputs.module]  # (heads * size,) or (channels,)
    lines = _lines(model, place)
    if place.columns:
        return (lines.square().sum(1).cpu() * square).sqrt().reshape(place.count, place.size).sum(1).float()
    total = square.reshape(inputs.count, inputs.size).sum(1)
    return _norms(lines, place) * _read_by({inputs.module: total}, kind, block).sqrt().float()


@torch.no_grad()
def _activations(
    model: nn.Module, layout: Layout, kinds: Sequence[Kind], batches: Iterable[Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return of every `o` and `down`: mean norm of each unit's input `(units,)`, and sum of squares of each input."""
    places = {block.unit_place(kind).module: block.unit_place(kind) for kind in kinds for block in layout.blocks}
    sums = {name: torch.zeros(place.count) for name, place in places.items()}
    squares = {name: torch.zeros(place.count * place.size, dtype=torch.float64) for name, place in places.items()}
    keep: Tensor | None = None
    tokens = 0

    def look(place: Place) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].float()
            x = x.reshape(-1, x.shape[-1]) if keep is None else x[keep != 0]  # (tokens, units * size)
            units = x.reshape(len(x), place.count, place.size)
            sums[place.module] += units.norm(dim=2).sum(0).cpu()
            squares[place.module] += x.square().sum(0).double().cpu()

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, place in places.items():
            stack.callback(model.get_submodule(name).register_forward_pre_hook(look(place)).remove)
        for ids, keep in token_batches(model, batches):  # the hooks read `keep`
            tokens += ids.numel() if keep is None else int((keep != 0).sum())
            model(input_ids=ids, attention_mask=keep, use_cache=False)
    if not tokens:
        raise InputError("the text for choosing units is all padding")
    return {name: total / tokens for name, total in sums.items()}, squares


def _gradients(
    model: nn.Module, layout: Layout, kinds: Sequence[Kind], batches: Iterable[Any]
) -> dict[Kind, list[Tensor]]:
    """Return the summed gradient norms; one matrix's gradient is in memory at a time, reduced as soon as it is made."""
    scores = {kind: [torch.zeros(block.places[kind].count) for block in layout.blocks] for kind in kinds}
    parts: dict[str, list[tuple[Tensor, Place]]] = {}
    for kind in kinds:
        for score, block in zip(scores[kind], layout.blocks, strict=True):
            parts.setdefault(block.places[kind].module, []).append((score, block.places[kind]))
    modules = {name: model.get_submodule(name) for name in parts}

    def reduce(module: nn.Module, own: list[tuple[Tensor, Place]]) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None  # autograd has just stored it
            for score, place in own:
                score += _norms(place.lines(oriented(module, gradient)).float(), place)

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(_only_these_train(model, [module.get_parameter("weight") for module in modules.values()]))
        for name, module in modules.items():
            weight: Any = module.get_parameter("weight")
            stack.callback(weight.register_post_accumulate_grad_hook(reduce(module, parts[name])).remove)
        stack.enter_context(torch.enable_grad())
        for ids, keep in token_batches(model, batches):
            labels = ids if keep is None else ids.masked_fill(keep == 0, -100)
            loss = model(input_ids=ids, attention_mask=keep, labels=labels, use_cache=False).loss
            if not torch.isfinite(loss):
                raise NumericError(f"the loss is {float(loss)}, so gradients cannot choose units")
            loss.backward()
    return scores


@contextmanager
def _only_these_train(model: nn.Module, chosen: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let only the chosen parameters need gradients; flags and gradients of all come back afterwards."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, needed, gradient in before:
            parameter.requires_grad_(needed)
            parameter.grad = gradient
