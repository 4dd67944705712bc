"""CrAM: train a dense model so that it survives being pruned in one shot.

Peste et al., "CrAM: A Compression-Aware Minimizer", ICLR 2023, arXiv 2207.14200.
Each step takes the gradient where the weights would be after one step uphill *and* after pruning, and gives that
gradient, by itself or added to the ordinary one (CrAM+), to any optimizer. Several sparsities can be drawn at random,
one each step, so that a single dense model serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core.errors import NumericError, PatternError, RecipeError, StateError
from secateur.core.method import method
from secateur.core.pattern import Pattern, Unstructured, parse_pattern, pruned_count
from secateur.core.shards import is_sharded
from secateur.models.linears import find_all_linears

BINS = 1 << 16


def top_of_all(values: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Return masks of exactly `keep` largest magnitudes over all `values` together; among equals the earlier stays.

    Works by counting the high and then the low half of the float32 bits, so nothing is sorted or put side by side.

    Args:
        values: tensors of any shapes on one device, no NaN.
        keep: entries to keep over all of them, 0 to their number.
    """
    if keep <= 0:
        return [torch.zeros_like(value, dtype=torch.bool) for value in values]
    words = [value.detach().abs().float().contiguous().view(torch.int32) for value in values]  # ordered as magnitudes
    high = _bin_of([word >> 16 for word in words], keep)
    above = sum(int((word >> 16 > high).sum()) for word in words)
    low = _bin_of([(word & (BINS - 1))[word >> 16 == high] for word in words], keep - above)
    threshold = (high << 16) | low
    masks = [word > threshold for word in words]
    missing = keep - sum(int(mask.sum()) for mask in masks)
    for word, mask in zip(words, masks, strict=True):
        if missing <= 0:
            break
        equal = (word == threshold).flatten().nonzero().flatten()[:missing]
        mask.view(-1)[equal] = True
        missing -= len(equal)
    return masks


def _bin_of(words: Sequence[Tensor], keep: int) -> int:
    """Return the bin of the `keep`-th largest of all entries, each in 0 to 65535."""
    counts = sum(torch.bincount(word.flatten(), minlength=BINS).cpu() for word in words)
    assert isinstance(counts, Tensor)
    reached = counts.flip(0).cumsum(0) >= keep
    return BINS - 1 - int(reached.int().argmax())


@method
class CrAM:
    """Compression-aware training around any optimizer.

    Attributes:
        rho: length of the step uphill, in units of the gradient (of 1 with `normalise`).
        patterns: what the weights are compressed to, one drawn each step; a sparsity counts over the whole model unless
            it says otherwise ("50%", "70% layer", "2:4").
        plus: add the ordinary gradient (CrAM+), which keeps the dense model good and costs nothing more.
        sparse_gradient: let only the weights that survive the compression have the second gradient.
        normalise: divide the step uphill by the norm of the whole gradient, as SAM does.
        seed: of the draws; all processes of a run draw alike, and a resumed run goes on as if never stopped.
    """

    rho: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    patterns: tuple[str, ...] = Field(default=("50%", "70%", "90%"), min_length=1)
    plus: bool = True
    sparse_gradient: bool = True
    normalise: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for text in self.patterns:
            if parse_pattern(text).sparsity >= 1:
                raise PatternError(f"`patterns` holds `{text}`, which leaves no weight to train")

    def around(self, optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> CrAMOptimizer:
        """Return an optimizer that takes CrAM's steps with `optimizer`.

        Args:
            optimizer: what the combined gradient is given to; its groups and state are shared, not copied.
            model: if given, the linears of its blocks are compressed, and nothing but what `prune` would prune; without
                it every weight of two or more dimensions is, embeddings and heads too. Statistics of batch norms are
                left alone in the second pass if the model is known.

        Raises:
            PatternError: if an N:M pattern does not divide the inputs of a weight.
        """
        return CrAMOptimizer(optimizer, self, model)


@dataclass(frozen=True)
class _Piece:
    """A matrix inside a parameter: what selects it, and whether it is stored transposed."""

    index: tuple[int | slice, ...] = ()
    transposed: bool = False

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the matrix as `(rows, inputs)`, the inputs of a convolution along its channels; maybe a copy."""
        part = tensor[self.index] if self.index else tensor
        if self.transposed:
            return part.T
        if part.dim() > 3:
            part = part.movedim(1, -1)
        return part.reshape(-1, part.shape[-1])

    def write_(self, tensor: Tensor, rows: Tensor) -> None:
        """Store `rows` where `rows()` read them."""
        part = tensor[self.index] if self.index else tensor
        if self.transposed:
            part = part.T
        elif part.dim() > 3:
            part = part.movedim(1, -1)
        part.copy_(rows.reshape(part.shape))


class CrAMOptimizer(torch.optim.Optimizer):
    """CrAM's step: `step(closure)` for a loop, `second_pass()` for a trainer, then the step of the optimizer inside.

    Args:
        inner: the optimizer; groups and state are its own.
        settings: CrAM's.
        model: see `CrAM.around`.
    """

    def __init__(self, inner: torch.optim.Optimizer, settings: CrAM, model: nn.Module | None = None) -> None:
        super().__init__([{**group} for group in inner.param_groups], {})
        self.inner = inner
        self.settings = settings
        self.draws = 0  # steps so far
        self._share()
        self._norms = (
            [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)] if model else []
        )
        self._patterns = [parse_pattern(text) for text in settings.patterns]
        self._refuse_shards()
        self._pieces = self._find_pieces(model)
        if not self._pieces:
            raise RecipeError("the optimizer has no weight that CrAM could compress")
        for parameter, pieces in self._pieces:
            for pattern in self._patterns:
                for piece in pieces:
                    rows, columns = piece.rows(parameter.detach()).shape
                    pattern.fit(rows, columns, f"a weight of shape {tuple(parameter.shape)}")
        self._ready = False  # both gradients are combined
        self._inside = False

    def pattern(self) -> Pattern:
        """Return the pattern of the coming step."""
        generator = torch.Generator().manual_seed((self.settings.seed << 32) + self.draws)
        return self._patterns[int(torch.randint(len(self._patterns), (), generator=generator))]

    @contextmanager
    def second_pass(self) -> Iterator[None]:
        """Hold the weights uphill and compressed; run backward on the same batch inside.

        At the end the weights are bit for bit what they were, and every gradient is the combined one. If backward
        fails inside, weights and first gradients come back.

        Raises:
            StateError: if there is no first gradient, or it is called inside of itself.
            RecipeError: if the weights are sharded (FSDP).
        """
        self._refuse_shards()
        if self._inside:
            raise StateError("the second pass has begun already")
        parameters = [p for group in self.param_groups for p in group["params"]]
        first = {p: _own(p.grad) for p in parameters if p.grad is not None}
        if not first:
            raise StateError(
                "no weight has a gradient, so there is nothing to go uphill by", hint="call backward first"
            )
        before = {p: p.detach().clone() for p in {**first, **dict.fromkeys(p for p, _ in self._pieces)}}
        tracked = [norm.track_running_stats for norm in self._norms]
        self._inside = True
        try:
            with torch.no_grad():
                self._climb(first)
                masks = self._compress()
            for parameter in parameters:
                parameter.grad = None
            for norm in self._norms:
                norm.track_running_stats = False
            yield
        except BaseException:
            for parameter in parameters:
                parameter.grad = first.get(parameter)
            raise
        else:
            with torch.no_grad():
                for parameter in parameters:
                    self._combine(parameter, first.get(parameter), masks.get(parameter))
            self._ready = True
        finally:
            for norm, tracks in zip(self._norms, tracked, strict=True):
                norm.track_running_stats = tracks
            with torch.no_grad():
                for parameter, values in before.items():
                    parameter.copy_(values)
            self._inside = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step with the combined gradient and return the loss of the first pass.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss; called twice. Not
                needed if `second_pass` was used since the last step.

        Raises:
            StateError: without closure, if there was no second pass.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
                with self.second_pass():
                    closure()
        if not self._ready:
            raise StateError(
                "CrAM's step needs a second pass over the batch",
                hint="give `step` a closure, or train with `secateur.train.trainer.TwoPassTrainer`",
            )
        self.inner.step()
        self._ready = False
        self.draws += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer inside, and how far the draws are."""
        return {**self.inner.state_dict(), "cram": {"draws": self.draws}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of `state_dict`."""
        inner = {name: value for name, value in state_dict.items() if name != "cram"}
        self.inner.load_state_dict(inner)
        self.draws = int(state_dict.get("cram", {}).get("draws", 0))
        self._share()

    def _refuse_shards(self) -> None:
        if any(is_sharded(parameter) for group in self.param_groups for parameter in group["params"]):
            raise RecipeError(
                "CrAM does not work with sharded weights (FSDP): it compares the weights of the whole model",
                hint="train with replicas of the model (DDP)",
            )

    def _share(self) -> None:
        self.param_groups, self.state, self.defaults = self.inner.param_groups, self.inner.state, self.inner.defaults

    def _find_pieces(self, model: nn.Module | None) -> list[tuple[nn.Parameter, tuple[_Piece, ...]]]:
        """Return each parameter that is compressed, with its matrices."""
        mine = [p for group in self.param_groups for p in group["params"]]
        if model is None:
            return [(p, (_Piece(),)) for p in mine if p.dim() > 1]
        known = {id(p) for p in mine}
        found: dict[int, tuple[nn.Parameter, list[_Piece]]] = {}
        for view in find_all_linears(model):
            if id(view.parameter) in known:
                _, pieces = found.setdefault(id(view.parameter), (view.parameter, []))
                piece = _Piece(view.index, view.transposed)
                if piece not in pieces:  # a linear that two blocks share
                    pieces.append(piece)
        return [(parameter, tuple(pieces)) for parameter, pieces in found.values()]

    def _climb(self, first: dict[nn.Parameter, Tensor]) -> None:
        length = self.settings.rho
        if self.settings.normalise:
            norms = [torch.linalg.vector_norm(gradient.float()) for gradient in first.values()]
            length = length / (
                float(torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))) + 1e-12
            )
        for parameter, gradient in first.items():
            parameter.add_(gradient, alpha=length)

    def _compress(self) -> dict[nn.Parameter, Tensor]:
        """Set what the pattern of this step prunes to zero and return the masks."""
        pattern = self.pattern()
        whole = isinstance(pattern, Unstructured) and pattern.scope in (None, "model")
        matrices = [(p, piece, piece.rows(p.detach())) for p, pieces in self._pieces for piece in pieces]
        if not all(bool(rows.sum().isfinite()) for _, _, rows in matrices):
            raise NumericError("a weight or its gradient is NaN or infinite, so CrAM cannot compress the weights")
        if whole:
            size = sum(rows.numel() for _, _, rows in matrices)
            chosen = top_of_all([rows for _, _, rows in matrices], size - pruned_count(pattern.sparsity, size))
        else:
            chosen = [pattern.mask(rows.abs(), "layer") for _, _, rows in matrices]
        masks = {p: torch.ones_like(p, dtype=torch.bool) for p, _ in self._pieces}
        for (parameter, piece, _), mask in zip(matrices, chosen, strict=True):
            piece.write_(masks[parameter], mask)
        for parameter, mask in masks.items():
            parameter.masked_fill_(~mask, 0.0)
        return masks

    def _combine(self, parameter: nn.Parameter, first: Tensor | None, mask: Tensor | None) -> None:
        """Put the gradient of both passes into `parameter.grad`."""
        second = parameter.grad
        if second is not None and mask is not None and self.settings.sparse_gradient:
            second.masked_fill_(~mask, 0.0)
        if not self.settings.plus or first is None:
            return
        parameter.grad = first if second is None else second.add_(first)


def _own(gradient: Tensor) -> Tensor:
    """Return `gradient` in memory of its own: DDP may have it in a buffer that the next backward writes."""
    alone = gradient.untyped_storage().nbytes() == gradient.nbytes
    return gradient if alone else gradient.clone()
