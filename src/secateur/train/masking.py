"""Fixed masks: training that leaves every pruned weight exactly zero.

The forward uses the weights as they are, zeros included; only the *gradient* is masked. An optimizer whose moments saw
nothing but zeros keeps zeros, so pruned weights stay exact positive zeros with no mask in the forward, no node of it in
autograd and no float copy of it in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.core.errors import InputError, RecipeError
from secateur.core.shards import anywhere, is_sharded, local, sharded_like
from secateur.models.linears import find_all_linears

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class FixedMasks:
    """Parameters, and the positions of them that stay zero; one byte per weight on the parameter's device.

    Of parameters that are sharded (FSDP2) each process masks the part that it holds.

    Args:
        masked: pairs of a parameter and its bool mask of the same shape, True = kept; masks are not changed.

    Raises:
        InputError: if a mask is not bool or does not have the parameter's shape.
    """

    def __init__(self, masked: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        self._pairs: list[tuple[nn.Parameter, Tensor]] = []
        for parameter, mask in masked:
            if mask.dtype != torch.bool or mask.shape != parameter.shape:
                raise InputError(
                    f"a mask must be bool with its parameter's shape {tuple(parameter.shape)}, "
                    f"got {mask.dtype} with shape {tuple(mask.shape)}"
                )
            part = local(sharded_like(mask.to(parameter.device), parameter))
            self._pairs.append((parameter, part.to(torch.int8).neg_()))  # -1, all bits set, = kept

    @classmethod
    def from_zeros(cls, model: nn.Module) -> FixedMasks:
        """Return the masks that the linears of the blocks of `model` have now; experts count, packed or not.

        Raises:
            InputError: if the architecture is unknown, or none of those weights is zero.
        """
        parameters = {id(view.parameter): view.parameter for view in find_all_linears(model)}
        masked = [(parameter, parameter.detach() != 0) for parameter in parameters.values()]
        if not any(anywhere(not bool(local(mask).all()), parameter) for parameter, mask in masked):
            raise InputError("the model is not sparse: no weight of its blocks is zero", hint="prune it first")
        return cls(masked)

    def pairs(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return each parameter with its bool mask, True = kept, made anew from the stored bytes.

        The mask of a sharded parameter is that of the part which this process holds.
        """
        return [(parameter, bits != 0) for parameter, bits in self._pairs]

    def mask_gradients_(self) -> None:
        """Set the gradient of every pruned weight to zero; call it after backward, before clipping and the step."""
        for parameter, bits in self._pairs:
            if parameter.grad is not None:
                _and_(local(parameter.grad), bits)

    @torch.no_grad()
    def apply_(self) -> None:
        """Set every pruned weight to an exact positive zero."""
        for parameter, bits in self._pairs:
            _and_(local(parameter), bits)

    def attach(self, optimizer: torch.optim.Optimizer) -> tuple[RemovableHandle, RemovableHandle]:
        """Guard every step of `optimizer`, whichever it is, and return the handles that end the guard.

        Gradients are masked before the step, and weights after it: some optimizers move a weight whose gradient was
        always zero (orthogonalised updates, moments that are older than the masks).
        """

        def before(*_: Any) -> None:
            self.mask_gradients_()

        def after(*_: Any) -> None:
            self.apply_()

        return optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)

    def attach_gradients(self) -> list[RemovableHandle]:
        """Mask every gradient as soon as backward has added to it, so that clipping sees kept weights alone.

        Returns the handles that end it.
        """

        def hook_of(bits: Tensor) -> Callable[[Tensor], None]:
            def after(parameter: Tensor) -> None:
                if parameter.grad is not None:
                    _and_(local(parameter.grad), bits)

            return after

        handles: list[RemovableHandle] = []
        for parameter, bits in self._pairs:
            handles.append(parameter.register_post_accumulate_grad_hook(hook_of(bits)))  # type: ignore[no-untyped-call]
        return handles


class KeptOnly(torch.optim.Optimizer):
    """An optimizer that is run on the kept weights alone, so that its moments have one entry for each of them.

    At 50 % zeros AdamW's state is half as large. The results are those of the optimizer on all weights with masked
    gradients, for every optimizer that treats weights one by one (SGD, Adam and its kin, RMSprop, Lion) or by norms of
    tensors (LAMB). Optimizers that read the shape of a matrix (Muon, Shampoo) need `FixedMasks.attach` instead.

    Args:
        build: makes the optimizer from groups: `lambda groups: torch.optim.AdamW(groups, lr=1e-4)`.
        parameters: parameters or groups of them, as any optimizer takes them; those without mask are passed on.
        masks: the masks; pruned weights are left as they are, so they must be zero.

    Raises:
        RecipeError: here or at the first step, if the weights are sharded (FSDP).
    """

    def __init__(
        self,
        build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        parameters: Iterable[Any],
        masks: FixedMasks,
    ) -> None:
        super().__init__(parameters, {})
        self._refuse_shards()
        found = {id(parameter): mask for parameter, mask in masks.pairs()}
        self._kept: list[tuple[nn.Parameter, nn.Parameter, Tensor]] = []  # parameter, its kept weights, mask
        inner_groups = [
            {**group, "params": [self._inner_of(one, found.get(id(one))) for one in group["params"]]}
            for group in self.param_groups
        ]
        self.inner = build(inner_groups)
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({name: value for name, value in inner.items() if name != "params"})
        self._release()

    def _inner_of(self, parameter: nn.Parameter, mask: Tensor | None) -> nn.Parameter:
        if mask is None:
            return parameter
        kept = nn.Parameter(parameter.detach().masked_select(mask), requires_grad=parameter.requires_grad)
        self._kept.append((parameter, kept, mask))
        return kept

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; settings of the groups, such as a scheduled rate, are read anew."""
        self._refuse_shards()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._hand_settings()
        for parameter, kept, mask in self._kept:
            kept.data = parameter.detach().masked_select(mask)
            kept.grad = None if parameter.grad is None else parameter.grad.masked_select(mask)
        self.inner.step()
        for parameter, kept, mask in self._kept:
            parameter.data.masked_scatter_(mask, kept.data)
        self._release()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer inside."""
        self._hand_settings()
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an optimizer of the same kind, over the same masks."""
        self.inner.load_state_dict(state_dict)
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({name: value for name, value in inner.items() if name != "params"})

    def _hand_settings(self) -> None:
        """Give the settings of the groups, which a schedule may have changed, to the optimizer inside."""
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({name: value for name, value in group.items() if name != "params"})

    def _refuse_shards(self) -> None:
        if any(is_sharded(parameter) for group in self.param_groups for parameter in group["params"]):
            raise RecipeError(
                "`KeptOnly` does not work with sharded weights (FSDP), where every process keeps the state of its part",
                hint="use the optimizer itself and the callback `KeepZeros()`",
            )

    def _release(self) -> None:
        """Hold no copy of weights or gradients between steps."""
        for parameter, kept, _ in self._kept:
            kept.data, kept.grad = parameter.detach().new_empty(0), None


def _and_(values: Tensor, bits: Tensor) -> None:
    # Bitwise, not a product (0 * inf is NaN, 0 * -1 is -0.0); 3 times as fast on CPU as masked_fill_ with a bool mask.
    values.view(_INTEGERS[values.element_size()]).bitwise_and_(bits)
