"""S2FT: fine-tune a few whole heads and channels, as a dense slice of the weights.

Yang et al., "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity", NeurIPS 2024,
arXiv 2412.06289.
A head is a block of columns of `o`, a channel a column of `down`; only the selected ones are trained. Backward needs
the inputs of those columns alone, so k of n columns of the activations are kept, and an adapter is the change of k
columns, without any limit on its rank.

The paper moves the selected columns side by side. Here they stay where they are and are gathered instead: the same
function, no restriction under grouped queries, and adapters of different selections can be added, swapped and mixed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from secateur.core.errors import InputError, RecipeError, did_you_mean
from secateur.methods.adapters.s2ft_linear import S2ftLinear
from secateur.methods.adapters.s2ft_selection import (
    ORDERS,
    READ_TEXT,
    STRATEGIES,
    Amount,
    Order,
    Strategy,
    Units,
    Wish,
    check_amount,
    checked_units,
    choose,
)
from secateur.models.layout import KINDS, Kind, Layout, Place, find_layout
from secateur.train.adapter_config import AdapterConfig, register
from secateur.train.adapter_linear import adapted_linears
from secateur.train.adapter_model import AdapterModel, without_adapters
from secateur.train.gated_product import keep_activations_, keep_gates_only_


@dataclass
class S2ftConfig(AdapterConfig):
    """S2FT's settings.

    An amount is a fraction (float, 0.0 to 1.0) of the units of all blocks jointly, rounded down, or a whole number
    (int) of units in every block. Units are heads for `q` and `o`, heads of keys and values for `k` and `v`, channels
    for `up`, `gate` and `down`.

    Attributes:
        o: amount of heads whose columns of the attention's output projection are trained.
        down: amount of channels whose columns of the MLP's second projection are trained.
        q: amount of heads whose query rows are trained; rows keep the whole input for backward, columns do not.
        k: amount of heads of keys.
        v: amount of heads of values.
        up: amount of channels whose rows of the MLP's first projection are trained.
        gate: amount of channels whose rows of the MLP's gate are trained.
        coupled: also train the rows that fill the selected columns: `q`, `k`, `v` of the heads of `o` (keys and values
            of the groups they read), `up` and `gate` of the channels of `down`.
        by_group: select heads by whole groups that share keys and values; `o` and `q` then count groups.
        strategy: "random", or by the "weight", "activation", "product" or "gradient" of the units; the last three read
            text, see `chosen`.
        order: train the units with the "largest" or the "smallest" scores.
        units: `{kind: {block: [units]}}`, the selection itself; None: make it as the other settings say.
        exclude_units: the `units` of another adapter, to be left alone, so that both can be fused without overlap.
        keep_sparsity: weights that are zero stay zero; False also trains zeros among the selected.
    """

    o: Amount = 0.052
    down: Amount = 0.02
    q: Amount = 0.0
    k: Amount = 0.0
    v: Amount = 0.0
    up: Amount = 0.0
    gate: Amount = 0.0
    coupled: bool = False
    by_group: bool = False
    strategy: Strategy = "random"
    order: Order = "largest"
    units: Units | None = None
    exclude_units: Units | None = None
    keep_sparsity: bool = True

    method: ClassVar[str] = "s2ft"

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in KINDS:
            check_amount(kind, getattr(self, kind))
        for name, value, known in (("strategy", self.strategy, STRATEGIES), ("order", self.order, ORDERS)):
            if value not in known:
                raise RecipeError(
                    f"`{name}` is {value!r}{did_you_mean(str(value), known)}", hint=f"known: {', '.join(known)}"
                )
        own_rows = [kind for kind in KINDS if kind not in ("o", "down") and getattr(self, kind)]
        if self.coupled and own_rows:
            raise RecipeError(
                f"`{own_rows[0]}` follows the columns when `coupled` is set, so it takes no amount of its own"
            )
        if not self.units and not any(getattr(self, kind) for kind in KINDS):
            raise RecipeError("every amount is zero, so there is nothing to train", hint="set `o` or `down`")
        self.units = checked_units("units", self.units)
        self.exclude_units = checked_units("exclude_units", self.exclude_units)
        self.lines: dict[str, tuple[bool, Tensor]] = {}  # module -> columns?, index; filled in by the tuner, not saved

    def prepared(self, model: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> S2ftConfig:
        """Return the settings with their units chosen, where the strategy reads text."""
        looks = self.strategy in ("activation", "product", "gradient") and self.units is None
        return chosen(model, self, batches()) if looks else self

    def wish(self) -> Wish:
        """Return how units are to be chosen."""
        amounts: dict[Kind, Amount] = {kind: getattr(self, kind) for kind in KINDS}
        return Wish(
            amounts, self.strategy, self.order, self.by_group, self.coupled, self.exclude_units or {}, self.seed
        )


def chosen(model: nn.Module, config: S2ftConfig, batches: Iterable[Any] = ()) -> S2ftConfig:
    """Return a copy of `config` with its `units` chosen, which the strategies that read text need.

    Args:
        model: the model that is to be tuned, with adapters or without; left as it was.
        config: settings; `units` that are there already are chosen anew.
        batches: ids `(batch, tokens)`, pairs of ids and mask as `Calibration.batches` yields them, or mappings with
            `input_ids` and perhaps `attention_mask`.

    Raises:
        RecipeError: if more units are asked for than there are, or none.
        InputError: if the model's heads and channels cannot be told, or text is needed and does not fit.
        NumericError: if a score is not finite.
    """
    config = copy.deepcopy(config)
    with without_adapters(model):
        layout = find_layout(model)
        config.units = _chosen_units(model, layout, config, batches)
    return config


class S2ftModel(AdapterModel):
    """PEFT's tuner for S2FT; it selects units over the whole model before the first linear is wrapped."""

    prefix = "secateur_s2ft_"
    tuner_layer_cls = S2ftLinear
    prepared: Sequence[S2ftLinear] = ()  # the linears whose switches are prepared, see `prepare_switches_`

    def _prepare_model(self, peft_config: S2ftConfig, model: nn.Module) -> None:
        if peft_config.target_parameters:
            super()._prepare_model(peft_config, model)
        with without_adapters(model):
            layout = find_layout(model)
            if peft_config.units is None:
                if peft_config.strategy in READ_TEXT:
                    raise RecipeError(
                        f"the strategy `{peft_config.strategy}` reads text before adapters are made",
                        hint="config = secateur.methods.adapters.s2ft.chosen(model, config, batches)",
                    )
                peft_config.units = _chosen_units(model, layout, peft_config)
        peft_config.lines = _lines_of(layout, peft_config.units)
        peft_config.target_modules = {name.rpartition(".")[2] for name in peft_config.lines}  # type: ignore[assignment]

    def injected(self, model: nn.Module, config: S2ftConfig, adapter_name: str) -> None:
        """Put the indices of the slices back in memory, which PEFT has thrown away where the weights are not in it.

        What backward needs of the MLPs is then the greater part of all it needs, so their activations are not kept.
        """
        for layer in adapted_linears(model):
            index = layer.secateur_s2ft_index if isinstance(layer, S2ftLinear) else {}
            if adapter_name in index and index[adapter_name].is_meta:
                index[adapter_name] = config.lines[layer.name][1].clone()
        self.prepared = ()
        with without_adapters(model):
            keep_gates_only_(_gated_mlps(model))

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        for layer in self.prepared:
            layer.forget_()  # columns are stored as columns, which nobody could undo later
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        keep_activations_(model)
        self.prepared = ()
        return model

    @staticmethod
    def _check_target_module_exists(peft_config: S2ftConfig, key: str) -> Any:
        if key in peft_config.lines:
            return True
        found = check_target_module_exists(peft_config, key)
        return False if found else found  # PEFT tells modules that were excluded on purpose from others


def _gated_mlps(model: nn.Module) -> Iterable[nn.Module]:
    """Return the modules that hold the projections of gated MLPs; the linears of `model` have no adapters."""
    for block in find_layout(model).blocks:
        if "gate" in block.places:
            yield model.get_submodule(block.places["down"].module.rpartition(".")[0])


def _chosen_units(model: nn.Module, layout: Layout, config: S2ftConfig, batches: Iterable[Any] = ()) -> Units:
    """Return the units that `config` means.

    Raises:
        RecipeError: if they are none.
        InputError: if the strategy needs weights that are not in memory.
    """
    if config.strategy != "random" and any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(
            f"the strategy `{config.strategy}` reads weights that are not in memory",
            hint="load them in every process (`fsdp_cpu_ram_efficient_loading` false), or set `units`",
        )
    targets: Any = copy.copy(config)
    if targets.target_modules is None or targets.target_modules == "all-linear":
        targets.target_modules = {place.module for block in layout.blocks for place in block.places.values()}
        if targets.layers_to_transform is not None:  # PEFT looks at the number only for endings of names
            targets.target_modules = {name.rpartition(".")[2] for name in targets.target_modules}

    def allowed(place: Place) -> bool:
        return bool(check_target_module_exists(targets, place.module))

    units = choose(model, layout, config.wish(), allowed, batches)
    if not units:
        asked = ", ".join(f"{kind}={getattr(config, kind)}" for kind in KINDS if getattr(config, kind))
        raise RecipeError(
            f"`{asked}` selects no unit of {layout.model}, so there is nothing to train",
            hint="ask for more; a whole number counts units in every block",
        )
    return units


def _lines_of(layout: Layout, units: Units) -> dict[str, tuple[bool, Tensor]]:
    """Return for each module whether its lines are columns, and their index, ascending int64 on CPU.

    Raises:
        InputError: if a unit does not exist.
    """
    found: dict[str, tuple[bool, Tensor]] = {}
    for kind, blocks in units.items():
        for number, own in blocks.items():
            if not 0 <= number < len(layout.blocks):
                raise InputError(f"{layout.model} has blocks 0..{len(layout.blocks) - 1}, `units` names {number}")
            place = layout.blocks[number].places.get(kind)  # type: ignore[call-overload]
            if place is None:
                raise InputError(f"{layout.model} has no `{kind}` projection to train")
            if own[-1] >= place.count:
                what = "channels" if place.size == 1 else "heads"
                raise InputError(
                    f"`{kind}` of block {number} of {layout.model} has {what} 0..{place.count - 1}, `units` names {own[-1]}"
                )
            index = place.index(torch.tensor(own))
            if place.module in found:  # a fused matrix
                index = torch.cat([found[place.module][1], index]).sort().values
            found[place.module] = (place.columns, index)
    return found


register(S2ftConfig, S2ftModel)
