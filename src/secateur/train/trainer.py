"""What transformers' Trainer needs to keep zeros, and to take steps that look at a batch twice.

Zeros are kept by a callback, so any Trainer will do (TRL's too). A two-pass step needs the batch again after backward,
which no callback sees, hence the one subclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback

from secateur.core.errors import RecipeError
from secateur.train.masking import FixedMasks, KeptOnly
from secateur.train.sharding import named_parameters

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


@runtime_checkable
class TwoPass(Protocol):
    """An optimizer that wants a second backward, at other weights, before its step."""

    def second_pass(self) -> AbstractContextManager[None]:
        """Move the weights for the time of the second backward, and combine both gradients at its end."""
        ...


class TwoPassTrainer(Trainer):  # type: ignore[misc]
    """A Trainer for two-pass optimizers such as CrAM; with any other optimizer it is the Trainer it extends.

    The second backward sees the same micro-batches as the first; clipping, schedule and logging come after it.
    """

    _window: list[tuple[dict[str, Any], Any]]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss of the first pass over a micro-batch; the last one of a step brings the second pass.

        Raises:
            RecipeError: under float16 with loss scaling, whose gradients have no size to move weights by.
        """
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it
        loss: Tensor = super().training_step(model, dict(inputs), num_items_in_batch)
        if not isinstance(optimizer, TwoPass):
            return loss
        if self.accelerator.scaler is not None:
            raise RecipeError("a two-pass optimizer does not work with float16 loss scaling", hint="use bf16")
        window = self.__dict__.setdefault("_window", [])
        window.append((inputs, num_items_in_batch))
        if self.accelerator.sync_gradients:
            self._window = []
            with optimizer.second_pass():
                for number, (again, count) in enumerate(window, 1):
                    last = number == len(window)  # gradients are exchanged once
                    with nullcontext() if last else self.accelerator.no_sync(model):
                        super().training_step(model, dict(again), count)
        return loss


class KeepZeros(TrainerCallback):  # type: ignore[misc]
    """Trains all weights of a sparse model and keeps its zeros, with any Trainer and any optimizer.

    Args:
        masks: which weights may change; None: the zeros that the model has when training begins. Where weights are
            sharded (FSDP), masks are given whole, as `{name of a parameter: bool mask, True = kept}`, or not at all.
    """

    def __init__(self, masks: FixedMasks | Mapping[str, Tensor] | None = None) -> None:
        self.masks = masks
        self._handles: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Guard gradients from here on, and the weights after each step of the optimizer.

        Raises:
            InputError: if the model has no zeros.
            RecipeError: if the masks are of other parameters than the model has.
        """
        masks = self._masks_of(kwargs["model"])
        known = set(map(id, kwargs["model"].parameters()))
        if any(id(parameter) not in known for parameter, _ in masks.pairs()):
            raise RecipeError(
                "the masks are not of the parameters that are trained; sharding (FSDP) replaces those of the model",
                hint="`KeepZeros()` takes the zeros that the model has when training begins, or masks by names of parameters",
            )
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        self._handles = masks.attach_gradients()
        if not isinstance(optimizer, KeptOnly):  # that one touches no other weights
            self._handles += masks.attach(optimizer)

    def _masks_of(self, model: nn.Module) -> FixedMasks:
        if isinstance(self.masks, FixedMasks):
            return self.masks
        if self.masks is None:
            return FixedMasks.from_zeros(model)
        known = dict(named_parameters(model))
        missing = [name for name in self.masks if name not in known]
        if missing:
            raise RecipeError(f"a mask is given for `{missing[0]}`, which is no parameter of the model")
        return FixedMasks((known[name], mask) for name, mask in self.masks.items())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lift the guard."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
