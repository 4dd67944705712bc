"""A linear with a trained slice of its columns or rows: S2FT's forward and exact merging.

Yang et al., NeurIPS 2024, arXiv 2412.06289, section 3.3.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.core.errors import NumericError
from secateur.core.shards import is_sharded
from secateur.methods.adapters.s2ft_merging import Merging, Ready, stamp_of, widest_element
from secateur.methods.adapters.s2ft_product import Sliced, is_copied, with_slice
from secateur.train.adapter_linear import AdapterLinear, smallest_kept


class S2ftLinear(AdapterLinear):
    """A frozen linear and, for each adapter, the change of a few of its columns or rows.

    All slices of a linear are of one side: columns of `o` and `down`, rows of the others. A slice is stored as
    `(k, other side)`. Merging keeps a copy of what it overwrites, so undoing it is exact.
    """

    adapter_layer_names = ("secateur_s2ft_slice",)
    other_param_names = ("configs", "secateur_s2ft_index", "secateur_s2ft_zeros")

    secateur_s2ft_slice: nn.ParameterDict  # adapter -> (k, other side)

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.columns = False
        self.secateur_s2ft_index = BufferDict()  # adapter -> int64 (k,), ascending
        self.secateur_s2ft_zeros = BufferDict()  # adapter -> bool (k, other side), what must stay zero; often nothing
        self._unseen: set[str] = set()  # adapters that were made while the weight was not in memory
        self.merging = Merging()

    def create_(self, adapter: str, config: Any, generator: torch.Generator) -> None:
        """Create a slice of zeros at the lines that the tuner has found for this linear."""
        self.merging.ready.pop(adapter, None)
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
        self._unseen.discard(adapter)
        if config.keep_sparsity:
            self._find_zeros(adapter)

    def _find_zeros(self, adapter: str) -> None:
        """Note which entries of the slice must stay zero, as soon as the whole weight is in memory.

        Adapters can be made before: the weight is then seen in the first forward.
        """
        weight = self.original_weight()
        if weight.is_meta or is_sharded(weight):
            self._unseen.add(adapter)
            return
        self._unseen.discard(adapter)
        zeros = self.lines(weight).index_select(0, self.secateur_s2ft_index[adapter]) == 0
        if zeros.any():
            self.secateur_s2ft_zeros[adapter] = zeros

    def lines(self, matrix: Tensor) -> Tensor:
        """Return `matrix` `(out_features, in_features)` as a view whose first dimension the slices are of."""
        return matrix.T if self.columns else matrix

    def tensors(self, adapter: str) -> tuple[Tensor, ...]:
        """Return the slice, zero where the weight must stay zero."""
        part, zeros = self._unmasked(adapter)
        return (part if zeros is None else part.masked_fill(zeros, 0.0),)

    def _unmasked(self, adapter: str) -> tuple[Tensor, Tensor | None]:
        """Return the parameter of `adapter`, and which of its entries must count as zero, None if none."""
        if adapter in self._unseen:
            self._find_zeros(adapter)
        held = adapter in self.secateur_s2ft_zeros
        return self.secateur_s2ft_slice[adapter], self.secateur_s2ft_zeros[adapter] if held else None

    def delta(self, adapter: str, weight: Tensor, *tensors: Tensor) -> Tensor:
        """Return zeros with the slice in its place."""
        return with_slice(torch.zeros_like(weight), tensors[0], self.secateur_s2ft_index[adapter], self.columns)

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
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        base = self.get_base_layer()
        if torch.is_grad_enabled() and len(adapters) == 1 and _is_plain(base):
            part, zeros = self._unmasked(adapters[0])  # masked inside, so that no masked copy is kept for backward
            index = self.secateur_s2ft_index[adapters[0]]
            output: Tensor = Sliced.apply(x, self.weight_view(), base.bias, part, index, self.columns, zeros)  # type: ignore[no-untyped-call]
            return output
        index, part = self._joined(adapters)
        if not torch.is_grad_enabled() and self.columns and not is_copied(x, index, self.in_features):
            plain, seen = self._plain(x), x.reshape(-1, self.in_features).index_select(1, index)
            return torch.addmm(plain.reshape(-1, self.out_features), seen, part.to(x.dtype)).view(plain.shape)
        if _is_plain(base):
            output = Sliced.apply(x, self.weight_view(), base.bias, part, index, self.columns)  # type: ignore[no-untyped-call]
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

    def _served(self, output: Tensor, x: Tensor, rows: Tensor, part: Tensor, index: Tensor, own: Tensor) -> Tensor:
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
        if self.merging.overwritten is None:
            return weight
        weight = weight.clone()
        weight.index_copy_(int(self.columns), *self.merging.overwritten)
        return weight

    @torch.no_grad()
    def merged_weight(self, adapters: Sequence[str]) -> Tensor:
        """Return the weight `(out_features, in_features)` with `adapters` merged into it, in its own dtype.

        Raises:
            NumericError: if a merged value is not finite.
            StateError: if the weight is sharded (FSDP).
        """
        self.check_whole()
        weight, dim = self.original_weight().clone(), int(self.columns)
        index, part = self._summed(adapters)
        return weight.index_copy_(dim, index, self._merged(weight.index_select(dim, index), part, adapters))

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

    def remerge_(self, adapters: Sequence[str]) -> None:
        """Leave exactly `adapters` merged, whatever was merged before; only selected rows or columns are written.

        Args:
            adapters: names; those that this linear does not have are passed over.

        Raises:
            NumericError: if a merged value is not finite; the weight then has no adapter merged.
            StateError: if the weight is sharded (FSDP).
        """
        if not self._swapped(adapters):
            self._remerge_([name for name in adapters if self.has(name)])

    @torch.no_grad()
    def _remerge_(self, names: list[str]) -> None:
        self.check_whole()
        merging = self.merging
        before, merging.overwritten, self.merged_adapters = merging.overwritten, None, []
        if before is not None:
            self._write(*before)
        if names:
            index, part = self._summed(names)
            former = self._read(index)
            merged = self._merged(former, part, names)
            self._write(index, merged)
            merging.overwritten, self.merged_adapters = (index, former), names

    def _swapped(self, adapters: Sequence[str]) -> bool:
        """Merge at most one adapter by copying lines that are ready; return False, with nothing done, if they are not.

        What is ready is dropped if somebody else has written to the weight.
        """
        merging = self.merging
        if not merging.ready or len(adapters) > 1:
            return False
        base: Any = self.base_layer  # `get_base_layer` takes as long as a copy of a dozen columns
        weight: Tensor = base.weight
        if merging.stamp != stamp_of(weight):
            merging.ready.clear()
            return False
        new, before = None, merging.overwritten
        if adapters and self.has(adapters[0]):
            new = merging.ready.get(adapters[0])
            if new is None or new.seen != stamp_of(self.secateur_s2ft_slice[adapters[0]]):
                return False
        lines = weight.detach()
        place = (lines if self.columns == self.transposed else lines.T).view(merging.element)
        if before is not None and (new is None or new.index is not before[0]):
            old = merging.ready.get(self.merged_adapters[0])
            if old is not None and old.former is before[1]:
                place.index_copy_(0, old.index, old.pieces[0])
            else:
                self._write(*before)
        if new is not None:
            place.index_copy_(0, new.index, new.pieces[1])
        merging.overwritten = None if new is None else (new.index, new.former)
        merging.stamp = stamp_of(weight)
        self.merged_adapters[:] = [] if new is None else adapters
        return True

    @torch.no_grad()
    def prepare_(self, adapters: Sequence[str]) -> None:
        """Compute what each of `adapters` writes when it is merged alone, and store columns as columns.

        The weight keeps its shape and its bits; where slices are of columns its memory is laid out by columns, so that a
        merge copies whole pieces of it. See `prepare_switches_`.

        Raises:
            NumericError: if a merged value is not finite; nothing is prepared then.
            StateError: if the weight is sharded (FSDP).
        """
        self.check_whole()
        original, found = self.original_weight(), {}
        for adapter in adapters:
            if self.has(adapter):
                index, part = self._summed([adapter])
                former = original.index_select(int(self.columns), index)
                found[adapter] = (index, former, self._merged(former, part, [adapter]))
        base: Any = self.get_base_layer()
        if self.merging.stamp != stamp_of(base.weight):
            self.merging.ready.clear()
        if self.lines(self.weight_view()).stride(1) != 1:
            base.weight.data = self.lines(self.weight_view().detach()).contiguous().T
        element = self.merging.element = widest_element(self.lines(self.weight_view().detach()))
        for adapter, (index, former, merged) in found.items():
            old, new = (self.lines(lines).clone(memory_format=torch.contiguous_format) for lines in (former, merged))
            pieces, seen = (old.view(element), new.view(element)), stamp_of(self.secateur_s2ft_slice[adapter])
            known = (other.index for other in self.merging.ready.values() if torch.equal(other.index, index))
            index = next(known, index)  # adapters of the same lines are told by the same index
            self.merging.ready[adapter] = Ready(index, self.lines(old), self.lines(new), pieces, seen)
        self.merging.stamp = stamp_of(base.weight)

    def forget_(self) -> None:
        """Drop what `prepare_` computed, and store the weight by rows again."""
        self.merging.ready.clear()
        base: Any = self.get_base_layer()
        base.weight.data = base.weight.data.contiguous()

    def _read(self, index: Tensor) -> Tensor:
        """Return a copy of the lines of the weight, `(out_features, k)` or `(k, in_features)`."""
        weight = self.weight_view().detach()
        if weight.stride(int(not self.columns)) == 1:  # each line is one piece of memory
            return self.lines(self.lines(weight).index_select(0, index))
        return weight.index_select(int(self.columns), index)

    def _write(self, index: Tensor, values: Tensor) -> None:
        """Write lines `(out_features, k)` or `(k, in_features)` into the weight."""
        weight = self.weight_view().detach()
        if weight.stride(int(not self.columns)) == 1:
            self.lines(weight).index_copy_(0, index, self.lines(values))
        else:
            weight.index_copy_(int(self.columns), index, values)
        self.merging.stamp = stamp_of(self.get_base_layer().weight)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> S2ftLinear:
        """Move and convert what was overwritten with the weight, into which it is copied back."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.merging.overwritten is not None:
            index, values = self.merging.overwritten
            self.merging.overwritten = fn(index), fn(values)
        return self

    def overwritten(self) -> tuple[Tensor, Tensor] | None:
        """Return the index of what the merged adapters changed, and its former values; None if nothing is merged.

        The index is int64 `(k,)`; the values are columns `(out_features, k)` or rows `(k, in_features)`.
        """
        return self.merging.overwritten

    def _summed(self, adapters: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the index, ascending, and the sum `(k, other side)` of the slices of `adapters`."""
        index, part = self._joined(adapters)
        if len(adapters) > 1:
            index, place = index.unique(return_inverse=True)  # type: ignore[no-untyped-call]
            part = part.new_zeros(len(index), part.shape[1]).index_add_(0, place, part)
        return index, part

    def _merged(self, former: Tensor, part: Tensor, adapters: Sequence[str]) -> Tensor:
        """Return what lines of the weight become.

        Summed in float32 or wider and rounded once. Where zeros are kept, a weight that would become zero takes the
        smallest number of its dtype, and zeros keep their sign, so that the zero pattern is the same to the last bit.

        Args:
            former: what they are without any adapter merged, `(out_features, k)` or `(k, in_features)`.
            part: the sum of the slices, `(k, other side)`.
            adapters: names; this linear has them all.

        Raises:
            NumericError: if a merged value is not finite.
        """
        wide = former.to(torch.promote_types(former.dtype, part.dtype))
        merged = (wide + (part.T if self.columns else part)).to(former.dtype)
        if not torch.stack(torch.aminmax(merged)).isfinite().all():  # 15 times as fast as asking each value
            names = ", ".join(f"`{adapter}`" for adapter in adapters)
            raise NumericError(f"merging {names} into `{self.name}` would make some of its weights NaN or infinite")
        configs: list[Any] = [self.configs[adapter] for adapter in adapters]
        if all(config.keep_sparsity for config in configs) and merged.abs().amin() == 0:
            vanished = (merged == 0) & (former != 0)
            smallest = torch.full_like(former, smallest_kept(former.dtype)).copysign(former)
            merged = torch.where(former == 0, former, torch.where(vanished, smallest, merged))
        return merged


def _is_plain(module: nn.Module) -> bool:
    """Return whether `module` is a frozen linear whose forward nobody has changed or listens to."""
    return (
        type(module) in (nn.Linear, Conv1D)
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        and not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    )
