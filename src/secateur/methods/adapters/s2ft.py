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
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge, check_target_module_exists
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from secateur.core.errors import InputError, NumericError, RecipeError, did_you_mean
from secateur.methods.adapters.s2ft_selection import (
    ORDERS,
    READ_TEXT,
    STRATEGIES,
    Amount,
    Order,
    Strategy,
    Units,
    Wish,
    choose,
)
from secateur.models.layout import KINDS, Kind, Layout, Place, find_layout
from secateur.train.adapter import (
    AdapterConfig,
    AdapterLinear,
    AdapterModel,
    register,
    smallest_kept,
    without_adapters,
)

# Adding the slice to a copy of the weight costs two passes over the weight, adding its product to the output costs a
# thin product: for `tokens * k / width` above this the copy is cheaper (float32, CPU, measured between 20 and 100).
COPY_FROM = 25


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
            _check_amount(kind, getattr(self, kind))
        for name, value, known in (("strategy", self.strategy, STRATEGIES), ("order", self.order, ORDERS)):
            if value not in known:
                raise RecipeError(
                    f"`{name}` is {value!r}{did_you_mean(str(value), known)}", hint=f"known: {', '.join(known)}"
                )
        own_rows = [kind for kind in KINDS if kind not in ("o", "down") and getattr(self, kind)]
        if self.coupled and own_rows:
            raise RecipeError(f"`{own_rows[0]}` follows the columns when `coupled` is set, so it takes no amount of its own")
        if not self.units and not any(getattr(self, kind) for kind in KINDS):
            raise RecipeError("every amount is zero, so there is nothing to train", hint="set `o` or `down`")
        self.units = _checked_units("units", self.units)
        self.exclude_units = _checked_units("exclude_units", self.exclude_units)
        self.lines: dict[str, tuple[bool, Tensor]] = {}  # module -> columns?, index; filled in by the tuner, not saved

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


class Sliced(torch.autograd.Function):
    """The output of a frozen linear with a trained slice; keeps k columns of the input, and no view of it.

    For columns `x W^T + x[:, I] S`, for rows `x W^T` with `x S^T` added at `[:, I]`; S is `(k, other side)`.
    Source: section 3.3, partial back-propagation.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, part: Tensor, index: Tensor, columns: bool
    ) -> Tensor:
        """Return `(..., out_features)` in the dtype of x.

        Args:
            ctx: autograd's.
            x: `(..., in_features)`.
            weight: `(out_features, in_features)`, frozen.
            bias: `(out_features,)` or None, frozen.
            part: `(k, out_features)` of columns, `(k, in_features)` of rows.
            index: int64 `(k,)`; repeated entries add up.
            columns: whether the slice is of columns.
        """
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            width = weight.shape[1] if columns else weight.shape[0]
            # in 16 bits the sum of weight and slice would round small steps away
            copied = x.dtype.itemsize >= 4 and flat.shape[0] * len(index) > COPY_FROM * width
            wide, own = weight.detach().to(x.dtype), part.detach().to(x.dtype)
            seen = flat.index_select(1, index) if columns else flat  # (tokens, k), a copy: a view would pin all of x
            offset = None if bias is None else bias.to(x.dtype)
            if copied:
                output = F.linear(flat, _with_slice(wide, own, index, columns), offset)
            else:
                output = F.linear(flat, wide, offset)
                if columns:
                    output.addmm_(seen, own)
                else:
                    output.index_add_(1, index, flat @ own.T)
        ctx.columns, ctx.copied, ctx.shape = columns, copied, x.shape
        ctx.save_for_backward(seen if ctx.needs_input_grad[3] else None, weight, part, index)
        return output.reshape(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the slice; nothing else is trained."""
        seen, weight, part, index = ctx.saved_tensors
        of_x = of_part = None
        with torch.autocast(upstream.device.type, enabled=False):
            rows = upstream.reshape(-1, upstream.shape[-1])  # (tokens, out_features)
            heard = rows if ctx.columns else rows.index_select(1, index)
            if ctx.needs_input_grad[0]:
                wide, own = weight.detach().to(rows.dtype), part.detach().to(rows.dtype)
                if ctx.copied:
                    of_x = rows @ _with_slice(wide, own, index, ctx.columns)
                elif ctx.columns:
                    of_x = (rows @ wide).index_add_(1, index, rows @ own.T)
                else:
                    of_x = torch.addmm(heard @ own, rows, wide)
                of_x = of_x.reshape(ctx.shape)
            if seen is not None:
                of_part = (seen.T @ heard if ctx.columns else heard.T @ seen).to(part.dtype)
        return of_x, None, None, of_part, None, None


class S2ftLinear(AdapterLinear):
    """A frozen linear and, for each adapter, the change of a few of its columns or rows.

    All slices of a linear are of one side: columns of `o` and `down`, rows of the others. A slice is stored as
    `(k, other side)`. Merging keeps a copy of what it overwrites, so undoing it is exact.
    """

    adapter_layer_names = ("secateur_s2ft_slice",)
    other_param_names = ("configs", "secateur_s2ft_index", "secateur_s2ft_zeros")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.columns = False
        self.secateur_s2ft_index = BufferDict()  # adapter -> int64 (k,), ascending
        self.secateur_s2ft_zeros = BufferDict()  # adapter -> bool (k, other side), what must stay zero; often nothing
        self._overwritten: tuple[Tensor, Tensor] | None = None  # index and former lines of what is merged

    def create_(self, adapter: str, config: S2ftConfig, generator: torch.Generator) -> None:
        """Create a slice of zeros at the lines that the tuner has found for this linear."""
        self.columns, index = config.lines[self.name]
        other = self.out_features if self.columns else self.in_features
        part = torch.zeros(len(index), other)
        if not config.init_weights:
            part.normal_(std=0.02, generator=generator)
        self.put_(adapter, secateur_s2ft_slice=part)
        weight = self.original_weight()
        self.secateur_s2ft_index[adapter] = index.to(weight.device if not weight.is_meta else "cpu")
        if adapter in self.secateur_s2ft_zeros:
            del self.secateur_s2ft_zeros[adapter]
        if config.keep_sparsity and not weight.is_meta:
            zeros = self.lines(weight).index_select(0, self.secateur_s2ft_index[adapter]) == 0
            if zeros.any():
                self.secateur_s2ft_zeros[adapter] = zeros

    def lines(self, matrix: Tensor) -> Tensor:
        """Return `matrix` `(out_features, in_features)` as a view whose first dimension the slices are of."""
        return matrix.T if self.columns else matrix

    def tensors(self, adapter: str) -> tuple[Tensor, ...]:
        """Return the slice, zero where the weight must stay zero."""
        part = self.secateur_s2ft_slice[adapter]
        if adapter in self.secateur_s2ft_zeros:
            part = part.masked_fill(self.secateur_s2ft_zeros[adapter], 0.0)
        return (part,)

    def delta(self, adapter: str, weight: Tensor, *tensors: Tensor) -> Tensor:
        """Return zeros with the slice in its place."""
        return _with_slice(torch.zeros_like(weight), tensors[0], self.secateur_s2ft_index[adapter], self.columns)

    def kept(self, adapters: Sequence[str], weight: Tensor) -> Tensor | None:
        """Return the support of `weight`, or None if an adapter may fill zeros."""
        configs: list[Any] = [self.configs[adapter] for adapter in adapters]
        return weight != 0 if all(config.keep_sparsity for config in configs) else None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return that a slice is a low-rank change, exactly."""
        return True

    # --- forward ---

    def adapted(self, x: Tensor, adapters: Sequence[str]) -> Tensor:
        """Return the output for `x` `(..., in_features)` with the sum of `adapters`."""
        index, part = self._joined(adapters)
        base = self.get_base_layer()
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if _is_plain(base):
            output: Tensor = Sliced.apply(x, self.weight_view(), base.bias, part, index, self.columns)  # type: ignore[no-untyped-call]
            return output
        output, part = self._plain(x), part.to(x.dtype)
        if self.columns:
            return output + x.index_select(-1, index) @ part
        return output.index_add(-1, index, x @ part.T)

    def mixed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Return the output for `x` `(batch, ..., in_features)` with the adapter `names[i]` for row i.

        One product with the weight serves all rows. The slices, padded to the widest, follow in one batched product, or
        in one product for each adapter where adapters have many rows.

        Raises:
            RecipeError: if there is not one name for each row, or adapters are merged.
        """
        self.check_mixed(x, names)
        output = self._plain(x)
        rows_of = {name: [row for row, other in enumerate(names) if other == name] for name in names if self.has(name)}
        flat, result = x.reshape(len(x), -1, x.shape[-1]), output.reshape(len(x), -1, output.shape[-1])
        if sum(map(len, rows_of.values())) > 4 * len(rows_of):
            groups = [[name] for name in rows_of]
        else:
            groups = [list(rows_of)] if rows_of else []
        for group in groups:
            rows = torch.tensor([row for name in group for row in rows_of[name]], device=x.device)
            part, index = self._stacked(group, x.dtype)  # (adapters, k, other side), (adapters, k)
            own = torch.tensor([number for number, name in enumerate(group) for _ in rows_of[name]], device=x.device)
            result = self._served(result, flat, rows, part, index, own)
        return result.reshape(output.shape)

    def _served(
        self, output: Tensor, x: Tensor, rows: Tensor, part: Tensor, index: Tensor, own: Tensor
    ) -> Tensor:
        """Add adapter `own[i]` of the stack to row `rows[i]` of `output` `(batch, tokens, out)`, and return it."""
        some = x.index_select(0, rows)
        if len(part) == 1:
            if self.columns:
                return output.index_add_(0, rows, some.index_select(2, index[0]) @ part[0])
            added = output.new_zeros(len(rows), *output.shape[1:]).index_copy_(2, index[0], some @ part[0].T)
            return output.index_add_(0, rows, added)
        place = index[own].unsqueeze(1).expand(-1, x.shape[1], -1)  # (rows, tokens, k)
        if self.columns:
            return output.index_add_(0, rows, torch.bmm(some.gather(2, place), part[own]))
        added = output.new_zeros(len(rows), *output.shape[1:])
        return output.index_add_(0, rows, added.scatter_add_(2, place, torch.bmm(some, part[own].mT)))

    def _stacked(self, adapters: Sequence[str], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return slices `(adapters, k, other side)` and indices `(adapters, k)`, padded with zeros at line 0."""
        parts = [self.tensors(adapter)[0].to(dtype) for adapter in adapters]
        indices = [self.secateur_s2ft_index[adapter] for adapter in adapters]
        return (
            nn.utils.rnn.pad_sequence(parts, batch_first=True),
            nn.utils.rnn.pad_sequence(indices, batch_first=True),
        )

    def _joined(self, adapters: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return index `(k,)` and slice `(k, other side)` of several adapters, one below the other."""
        parts = [self.tensors(adapter)[0] for adapter in adapters]
        indices = [self.secateur_s2ft_index[adapter] for adapter in adapters]
        return (indices[0], parts[0]) if len(parts) == 1 else (torch.cat(indices), torch.cat(parts))

    # --- merging ---

    def original_weight(self) -> Tensor:
        """Return the weight `(out_features, in_features)` without any merged adapter, detached."""
        weight = self.weight_view().detach()
        if self._overwritten is None:
            return weight
        index, former = self._overwritten
        weight = weight.clone()
        self.lines(weight).index_copy_(0, index, former)
        return weight

    @torch.no_grad()
    def merged_weight(self, adapters: Sequence[str]) -> Tensor:
        """Return the weight `(out_features, in_features)` with `adapters` merged into it, in its own dtype.

        Raises:
            NumericError: if a merged value is not finite.
        """
        weight = self.original_weight().clone()
        index, _, merged, finite = self._merged_lines(self.lines(weight), adapters)
        self._check_finite(finite, adapters)
        self.lines(weight).index_copy_(0, index, merged)
        return weight

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the sum of weight and slices into the weight; always checked first, with `safe_merge` or without.

        Raises:
            NumericError: if a merged value is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has(name)]
        if names:
            self.remerge_([*self.merged_adapters, *names])

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the unmerged weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.remerge_([])

    @torch.no_grad()
    def remerge_(self, adapters: Sequence[str], *, check: bool = True) -> Tensor | None:
        """Leave exactly `adapters` merged, whatever was merged before; only selected lines are written.

        Args:
            adapters: names; those that this linear does not have are passed over.
            check: raise for values that are not finite; else return whether all are, to be looked at later.

        Raises:
            NumericError: if a merged value is not finite; the weight then has no adapter merged.
        """
        lines = self.lines(self.weight_view().detach())
        if self._overwritten is not None:
            lines.index_copy_(0, *self._overwritten)
            self._overwritten = None
        self.merged_adapters = []
        names = [name for name in adapters if self.has(name)]
        if not names:
            return None
        index, former, merged, finite = self._merged_lines(lines, names)
        if check:
            self._check_finite(finite, names)
        lines.index_copy_(0, index, merged)
        self._overwritten, self.merged_adapters = (index, former), names
        return finite

    def _merged_lines(self, lines: Tensor, adapters: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return which lines change, what they were, what they become, and whether that is finite (a bool scalar).

        Summed in float32 or wider and rounded once. Where zeros are kept, a weight that would become zero takes the
        smallest number of its dtype, so that the zero pattern is the same to the last bit.
        """
        index, part = self._joined(adapters)
        if len(adapters) > 1:
            index, place = index.unique(return_inverse=True)
            part = part.new_zeros(len(index), part.shape[1]).index_add_(0, place, part)
        former = lines.index_select(0, index)
        merged = (former.to(torch.promote_types(former.dtype, part.dtype)) + part).to(former.dtype)
        configs: list[Any] = [self.configs[adapter] for adapter in adapters]
        if all(config.keep_sparsity for config in configs):
            vanished = (merged == 0) & (former != 0)
            merged = torch.where(vanished, torch.full_like(former, smallest_kept(former.dtype)).copysign(former), merged)
            merged = torch.where(former == 0, former, merged)
        return index, former, merged, torch.isfinite(merged).all()

    def _check_finite(self, finite: Tensor, adapters: Sequence[str]) -> None:
        if not finite:
            names = ", ".join(f"`{adapter}`" for adapter in adapters)
            raise NumericError(f"merging {names} into `{self.name}` would make some of its weights NaN or infinite")


class S2ftModel(AdapterModel):
    """PEFT's tuner for S2FT; it selects units over the whole model before the first linear is wrapped."""

    prefix = "secateur_s2ft_"
    tuner_layer_cls = S2ftLinear

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
        peft_config.target_modules = {name.rpartition(".")[2] for name in peft_config.lines}

    @staticmethod
    def _check_target_module_exists(peft_config: S2ftConfig, key: str) -> Any:
        if key in peft_config.lines:
            return True
        found = check_target_module_exists(peft_config, key)
        return False if found else found  # PEFT tells modules that were excluded on purpose from others


def _chosen_units(model: nn.Module, layout: Layout, config: S2ftConfig, batches: Iterable[Any] = ()) -> Units:
    """Return the units that `config` means.

    Raises:
        RecipeError: if they are none.
    """
    targets = copy.copy(config)
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


def _with_slice(matrix: Tensor, part: Tensor, index: Tensor, columns: bool) -> Tensor:
    """Return a copy of `matrix` `(out_features, in_features)` with `part` `(k, other side)` added at its lines."""
    return matrix.index_add(1, index, part.T) if columns else matrix.index_add(0, index, part)


def _is_plain(module: nn.Module) -> bool:
    """Return whether `module` is a frozen linear whose forward nobody has changed or listens to."""
    return (
        type(module) in (nn.Linear, Conv1D)
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        and not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    )


def _check_amount(kind: str, amount: object) -> None:
    """Raise RecipeError unless `amount` is a fraction or a count."""
    whole = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 0
    if not whole and not (isinstance(amount, float) and math.isfinite(amount) and 0 <= amount <= 1):
        raise RecipeError(
            f"`{kind}` must be a fraction 0.0 to 1.0 of all units, or a whole number of units in every block, got {amount!r}"
        )


def _checked_units(name: str, units: Any) -> Units | None:
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
            raise RecipeError(f"`{name}` has no kind {kind!r}{did_you_mean(str(kind), KINDS)}", hint=f"known: {', '.join(KINDS)}")
        if not isinstance(blocks, Mapping):
            raise RecipeError(f"{shape}, `{kind}` has {blocks!r}")
        for number, own in blocks.items():
            if not str(number).isdecimal() or not isinstance(own, list | tuple):
                raise RecipeError(f"{shape}, `{kind}` has {number!r}: {own!r}")
            if any(isinstance(unit, bool) or not isinstance(unit, int) or unit < 0 for unit in own):
                raise RecipeError(f"`{name}` of `{kind}` in block {number} must be whole numbers from 0, got {list(own)}")
            if len(set(own)) < len(own):
                raise RecipeError(f"`{name}` of `{kind}` in block {number} names a unit twice: {list(own)}")
            if own:
                found.setdefault(kind, {})[int(number)] = sorted(own)
    return found


register(S2ftConfig, S2ftModel)
