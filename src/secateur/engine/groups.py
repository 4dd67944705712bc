"""Statistics by distinct input: q, k and v are given the same tensor, so their inputs are counted once."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from secateur.core.errors import InputError
from secateur.engine.batches import BatchNotFinite
from secateur.engine.statistics import LayerStats
from secateur.models.linears import LinearView


class Group:
    """The statistics that linears with one input share."""

    def __init__(self, in_features: int, wanted: Collection[str], device: torch.device) -> None:
        self.stats = LayerStats(in_features, wanted, device)
        self.shared: dict[object, object] = {}
        self._means: dict[str, Tensor] | None = None

    def statistics(self) -> dict[str, Tensor]:
        """Return the means over tokens that were asked for; without any token, those of white inputs."""
        if self._means is None:
            found = {name: getattr(self.stats, name) for name in ("gram", "diag", "mean", "cross")}
            self._means = {name: value for name, value in found.items() if value is not None}
            if self.stats.count == 0:
                for name, value in self._means.items():
                    value.zero_() if name == "mean" else value.diagonal().fill_(
                        1.0
                    ) if value.dim() == 2 else value.fill_(1.0)
        return self._means


class Groups:
    """Finds out which linears share their input, by the identity of the tensor they are given.

    Args:
        wanted: statistics to collect.
        device: where the sums live.
        keeps: for each batch the bool `(batch, tokens)` that is False on padding, or None.

    Attributes:
        current: the group of the linear that was arrived at last.
    """

    def __init__(self, wanted: Collection[str], device: torch.device, keeps: Sequence[Tensor | None]) -> None:
        self.wanted = wanted
        self.device = device
        self.keeps = keeps
        batches = len(keeps)
        self.last: list[Tensor | None] = [None] * batches
        self.current = Group(0, (), device)
        self.known: dict[str, Group] = {}
        self.owner: list[Group | None] = [None] * batches

    def arrive(self, batch: int, linear: LinearView, given: Tensor, dense: Tensor | None, forget: bool = True) -> Group:
        """Count the inputs of `linear` in `batch`, once for all linears that share them; return their group."""
        same = self.last[batch] is given
        self.last[batch] = given
        group = self.owner[batch] if same else self.known.get(linear.name)
        if group is None:
            # the first batch to arrive with a new input opens its group; the others join under the linear's name
            if forget:
                self.known.clear()
            group = Group(linear.in_features, self.wanted, self.device)
        self.known[linear.name] = group
        if not same:
            self.check(batch, linear, given)
            keep = self.keeps[batch]
            group.stats.update(given, dense, None if keep is None else keep.to(given.device))
        self.owner[batch] = group
        self.current = group
        return group

    def check(self, batch: int, linear: LinearView, given: Tensor) -> None:
        """Refuse inputs that no statistic could be made of."""
        if not bool(torch.isfinite(given).all()):
            raise BatchNotFinite(f"the inputs of `{linear.name}` hold NaN or infinity", batch)
        keep = self.keeps[batch]
        if keep is not None and given.numel() != keep.numel() * given.shape[-1]:
            raise InputError(
                f"`{linear.name}` sees some of the tokens only, so padding cannot be told apart in its inputs",
                hint="calibrate mixtures of experts with samples of one length",
            )
