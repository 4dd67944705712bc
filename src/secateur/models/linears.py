"""The prunable matrices of a block, all behind one view `(out_features, in_features)`.

A linear is an `nn.Linear`, a transposed Conv1D of GPT-2, or one expert's slice of a 3-D parameter. Routers, embeddings
and norms are left alone. A matrix of any other kind is refused by name where a model is to be pruned, unless it is left
out by name: left out in silence, it would make every statement about the model's sparsity wrong.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.core.errors import InputError, RecipeError
from secateur.core.shards import local
from secateur.models.blocks import Blocks, find_blocks
from secateur.models.experts import Index, expert_linears, is_experts

FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
ROUTER = re.compile("router", re.IGNORECASE)
GATE = re.compile("gat(e|ing)$", re.IGNORECASE)
OUTSIDE = -1


@dataclass(frozen=True, eq=False)
class LinearView:
    """One prunable matrix, wherever and however its model stores it.

    Attributes:
        name: module name in the model, in memory ("model.layers.0.mlp.down_proj").
        block: number of its block, `OUTSIDE` if it is in none.
        class_name: "Linear" or "Conv1D", what patterns may name; an expert's slice is a "Linear". "Embedding" outside
            the blocks.
        parameter: the parameter it lives in.
        module: the module that applies it; None for a slice of packed experts, which has none of its own.
        bias: `(out_features,)` or None.
        index: what selects it from the parameter; empty for all of it.
        transposed: whether the parameter stores `(in_features, out_features)`.
    """

    name: str
    block: int
    class_name: str
    parameter: nn.Parameter
    module: nn.Module | None
    bias: Tensor | None = None
    index: Index = ()
    transposed: bool = False

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return int(self.read().shape[0])

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return int(self.read().shape[1])

    def read(self) -> Tensor:
        """Return the weight `(out_features, in_features)` as a view without gradient; edits of it reach the model."""
        weight = self.parameter.detach()[self.index] if self.index else self.parameter.detach()
        return weight.T if self.transposed else weight

    def write(self, weight: Tensor) -> None:
        """Store `weight` `(out_features, in_features)`, from any device, rounded to the parameter's dtype.

        Raises:
            InputError: if the shape is another.
        """
        place = self.read()
        if weight.shape != place.shape:
            raise InputError(f"the weight of `{self.name}` is {tuple(place.shape)}, got {tuple(weight.shape)}")
        place.copy_(weight.detach())

    def parameter_mask(self, mask: Tensor) -> Tensor:
        """Return `mask` `(out_features, in_features)` in the orientation of the parameter, or of its part `[index]`."""
        return mask.T.contiguous() if self.transposed else mask


@dataclass(frozen=True)
class UnknownMatrix:
    """A matrix in a block that is of no known kind, so that it cannot be pruned.

    Attributes:
        name: of the parameter or buffer in the model ("model.layers.0.mixer.A_log").
        class_name: of the module that owns it, what patterns may name.
    """

    name: str
    class_name: str

    def is_meant(self, patterns: Sequence[str]) -> bool:
        """Return whether any of `patterns` means the matrix or its module, see `match`."""
        return match(self.name.rpartition(".")[0], self.class_name, patterns) or match(self.name, "", patterns)


def find_linears(block: nn.Module, name: str, index: int, ignore: Sequence[str] = ()) -> list[LinearView]:
    """Return the prunable linears of `block`, in the order in which it defines them.

    Works on packed and on unpacked blocks and gives the same names for both. Whether all that is there can be pruned is
    for `check_prunable` to say.

    Args:
        block: a block, or a copy of it.
        name: its module name in the model, in front of all names.
        index: its number.
        ignore: linears to leave out, see `match`.

    Raises:
        InputError: naming the module, if a weight is quantised.
    """
    views: list[LinearView] = []
    for path, module, _ in _walk(block):
        views += _views(module, f"{name}.{path}" if path and name else path or name, index)
    kept = [view for view in views if not match(view.name, view.class_name, ignore)]
    for view in kept:
        _refuse_quantised(view)
    return kept


def find_all_linears(model: nn.Module, ignore: Sequence[str] = (), blocks: Blocks | None = None) -> list[LinearView]:
    """Return the prunable linears of all blocks of `model`, without a forward.

    Args:
        model: a decoder-only language model.
        ignore: what to leave out, see `match`.
        blocks: from `find_blocks(model)`, if known already.

    Raises:
        InputError: as `find_blocks` and `find_linears` do.
    """
    blocks = blocks or find_blocks(model)
    views: list[LinearView] = []
    for index, (name, block) in enumerate(zip(blocks.names, blocks.modules, strict=True)):
        views += find_linears(block, name, index, ignore)
    return views


def check_prunable(model: nn.Module, ignore: Sequence[str] = (), blocks: Blocks | None = None) -> None:
    """Raise InputError unless every matrix of the blocks can be pruned, or is left out by name.

    Args:
        model: a decoder-only language model.
        ignore: linears, and matrices of unknown kinds, that are left as they are, see `match`.
        blocks: from `find_blocks(model)`, if known already.

    Raises:
        InputError: naming the module, if a matrix is of an unknown kind or quantised, or if a linear shares its weight
            with another module, wherever that is.
    """
    blocks = blocks or find_blocks(model)
    unknown = [matrix for matrix in all_unknown_matrices(model, blocks) if not matrix.is_meant(ignore)]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        names = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", matrix.name, count=1) for matrix in unknown)
        patterns = ", ".join(f'"{name}"' for name in names)
        raise InputError(
            f"the model holds a matrix of an unknown kind: `{unknown[0].name}` of {unknown[0].class_name}{more}",
            hint=f"leave what cannot be pruned as it is with `ignore: [{patterns}]`",
        )
    _refuse_shared(model, find_all_linears(model, ignore, blocks))


def find_outside_linears(
    model: nn.Module, patterns: Sequence[str], blocks: Blocks | None = None, *, tied: bool = False
) -> list[LinearView]:
    """Return the linears outside the blocks (the head, projections of embeddings) that match `patterns`.

    An embedding is among them only if a pattern is its exact name; its rows are tokens and it has no inputs to calibrate
    on. Where the head is tied to the embedding both must be named, and one view stands for both: the head's.

    Args:
        model: a decoder-only language model.
        patterns: which ones, see `match`; none are returned that are not asked for.
        blocks: from `find_blocks(model)`, if known already.
        tied: do not ask whether all that is tied is named, because it is known already.

    Raises:
        InputError: if one of them is tied to a module that is not named, such as a head to the embedding.
    """
    blocks = blocks or find_blocks(model)
    views: list[LinearView] = []
    embeddings: list[LinearView] = []
    for name, module in model.named_modules():
        if any(name == block or name.startswith(f"{block}.") for block in blocks.names):
            continue
        if _is_linear(module):
            views += [view for view in _views(module, name, OUTSIDE) if match(name, view.class_name, patterns)]
        elif isinstance(module, nn.Embedding) and name in patterns:
            embeddings.append(LinearView(name, OUTSIDE, "Embedding", module.get_parameter("weight"), module))
    named = [*views, *embeddings]
    for view in named:
        _refuse_quantised(view)
    if not tied:
        _refuse_shared(model, named, together={view.name for view in named})
    heads = {_place(view.parameter) for view in views}
    return views + [view for view in embeddings if _place(view.parameter) not in heads]


def sparsity(model: nn.Module) -> float:
    """Return the fraction of zeros over all linears of the blocks, 0..1."""
    zeros = size = 0
    for linear in find_all_linears(model):
        weight = linear.read()
        zeros += weight.numel() - int(torch.count_nonzero(weight))
        size += weight.numel()
    return zeros / size if size else 0.0


def unknown_matrices(block: nn.Module, name: str = "") -> list[UnknownMatrix]:
    """Return the matrices in `block` that are of no known kind.

    Those are parameters of two or more dimensions, and integer tables of quantised layers, that belong to no linear,
    experts module, router, embedding or norm. A matrix with one row or one column counts as a vector.

    Args:
        block: a block.
        name: its module name in the model, in front of all names.
    """
    prefix = f"{name}." if name else ""
    return [
        UnknownMatrix(f"{prefix}{path}{'.' if path else ''}{parameter}", type(module).__name__)
        for path, module, strange in _walk(block)
        for parameter in strange
    ]


def all_unknown_matrices(model: nn.Module, blocks: Blocks | None = None) -> list[UnknownMatrix]:
    """Return the matrices of no known kind in all blocks of `model`, which no statement about its sparsity counts."""
    blocks = blocks or find_blocks(model)
    pairs = zip(blocks.modules, blocks.names, strict=True)
    return [matrix for block, name in pairs for matrix in unknown_matrices(block, name)]


def match(name: str, class_name: str, patterns: Sequence[str]) -> bool:
    """Return whether any of `patterns` means the module `name` of class `class_name`.

    A pattern is a class name ("Linear"), an exact module name ("lm_head"), a glob over the whole name ("*.down_proj"),
    or a regular expression that the name must start with ("re:.*down_proj$").

    Raises:
        RecipeError: if a regular expression is malformed.
    """
    return any(_matches(name, class_name, pattern) for pattern in patterns)


def _matches(name: str, class_name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern.removeprefix("re:"), name) is not None
        except re.error as error:
            raise RecipeError(f"`{pattern}` is not a regular expression: {error}") from error
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return pattern in (name, class_name)


def _walk(block: nn.Module) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Yield path, module, and the names of its own matrices of unknown kinds, for what may hold matrices to prune.

    Routers are left out with all that is in them. A module that is registered twice comes twice.
    """
    routers: list[str] = []
    for path, module in block.named_modules(remove_duplicate=False):
        if any(path.startswith(f"{router}.") for router in routers):
            continue
        if path and _is_router(block, path, module):
            routers.append(path)
        elif not isinstance(module, nn.Embedding) and "norm" not in type(module).__name__.lower():
            known = {"weight"} if _is_linear(module) else set()
            yield path, module, [] if is_experts(module) else [own for own in _matrices(module) if own not in known]


def _views(module: nn.Module, name: str, block: int) -> list[LinearView]:
    """Return the linears that `module` itself is or holds as slices."""
    if _is_linear(module):
        weight = module.get_parameter("weight")
        if not _is_matrix(weight):
            return []
        kind, turned = ("Conv1D", True) if isinstance(module, Conv1D) else ("Linear", False)
        return [LinearView(name, block, kind, weight, module, module._parameters.get("bias"), transposed=turned)]
    if not is_experts(module):
        return []
    return [
        LinearView(
            f"{name}.{linear.expert}.{linear.name}",
            block,
            "Linear",
            module.get_parameter(linear.parameter),
            None,
            linear.bias_of(module),
            linear.index,
            linear.transposed,
        )
        for linear in expert_linears(module)
    ]


def _is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear whose weight is an ordinary parameter and that is applied by being called."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # nn.MultiheadAttention reads its weight and never calls it
    return isinstance(module, (nn.Linear, Conv1D)) and isinstance(module._parameters.get("weight"), nn.Parameter)


def _is_router(block: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether `module` chooses experts: a router by class, or a gate beside experts, one row for each."""
    kind = type(module).__name__
    if ROUTER.search(kind):
        return True
    parent, _, own = path.rpartition(".")
    experts = block.get_submodule(parent)._modules.get("experts")
    if experts is None:
        return False
    if GATE.search(kind):
        return True
    weight = module._parameters.get("weight")
    count = len(experts) if isinstance(experts, nn.ModuleList) else getattr(experts, "num_experts", None)
    return own in ("gate", "router") and weight is not None and weight.dim() == 2 and weight.shape[0] == count


def _matrices(module: nn.Module) -> list[str]:
    """Return the names of the matrices that `module` owns directly, tables of integers included."""
    found = [name for name, parameter in module.named_parameters(recurse=False) if _is_matrix(parameter)]
    return found + [
        name
        for name, buffer in module.named_buffers(recurse=False)
        if _is_matrix(buffer) and not buffer.is_floating_point() and buffer.dtype != torch.bool
    ]


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and tensor.numel() > max(tensor.shape)


def _refuse_quantised(view: LinearView) -> None:
    if view.parameter.dtype not in FLOATS:
        raise InputError(
            f"the weight of `{view.name}` is stored as {view.parameter.dtype}, which cannot be pruned",
            hint="give the model in bf16, fp16 or fp32",
        )


def _refuse_shared(model: nn.Module, views: Sequence[LinearView], together: Collection[str] = frozenset()) -> None:
    """Raise InputError if the parameter of a view is registered under a second name anywhere in `model`.

    Modules named in `together` may share theirs: they are meant to be pruned as one.
    """
    names: dict[object, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(_place(parameter), []).append(name)
    for view in views:
        owners = [owner.rpartition(".")[0] for owner in names[_place(view.parameter)]]
        if len(owners) > 1 and not set(owners).issubset(together):
            raise _shared(view.name, *owners)


def _shared(name: str, *owners: str) -> InputError:
    others = ", ".join(f"`{owner}`" for owner in owners if owner != name) or "itself"
    return InputError(
        f"`{name}` shares its weight with {others}: pruning one would prune the other",
        hint="leave it out with `ignore`, or, outside the blocks, name all of them in `include`",
    )


def _place(parameter: Tensor) -> object:
    """Return what two parameters have in common exactly if they are the same memory."""
    part = local(parameter)
    if part.is_meta or not part.numel():
        return id(parameter)
    return part.device, part.data_ptr()
