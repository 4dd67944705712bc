"""Pruning what stands outside the blocks, for those who ask: the head, projections behind the blocks, the embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from secateur.core.pattern import Pattern
from secateur.core.problem import LayerProblem, Pruned
from secateur.engine.batches import Batches
from secateur.engine.groups import Group
from secateur.models.blocks import Blocks
from secateur.models.linears import LinearView, find_all_linears, find_outside_linears


class Outside:
    """The linears outside the blocks that have a pattern, in the order in which the model defines them.

    Args:
        model: the model.
        blocks: its blocks.
        patterns: `{name: Pattern}` of everything that is pruned.
        ignore: linears of the blocks to leave out.
    """

    def __init__(
        self, model: nn.Module, blocks: Blocks, patterns: Mapping[str, Pattern], ignore: Sequence[str]
    ) -> None:
        self.linears: list[LinearView] = []
        if not patterns:
            return
        inside = {linear.name for linear in find_all_linears(model, ignore, blocks)}
        named = [name for name in patterns if name not in inside]
        if named:
            self.linears = find_outside_linears(model, named, blocks, tied=True)


class Largest:
    """What prunes an embedding, whatever the pruner of the linears: no input is known, so the largest weights stay."""

    needs: ClassVar[frozenset[str]] = frozenset()
    scope: ClassVar[Literal["row", "layer"]] = "layer"

    def prune(self, problem: LayerProblem) -> Pruned:
        """Return the target with its smallest entries set to zero."""
        return Pruned.keep(problem.weight, problem.select(problem.weight.abs(), self.scope))


def statistics(batches: Batches, linear: LinearView, wanted: set[str]) -> Group:
    """Return the statistics of the inputs of `linear`, which runs behind the last block; an embedding has none.

    Raises:
        InputError: if it does not.
    """
    if linear.class_name == "Embedding":
        return Group(linear.in_features, (), batches.device)
    group = Group(linear.in_features, wanted - {"cross"}, batches.device)
    for batch in range(len(batches)):
        given = batches.behind_blocks(batch, linear).to(batches.device, torch.float32)
        keep: Tensor | None = batches.keeps[batch]
        group.stats.update(given, None, None if keep is None else keep.to(given.device))
    return group
