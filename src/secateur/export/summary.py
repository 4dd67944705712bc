"""What a model is like: sparsity and pattern of every linear, dtype, size, and what another format could save."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import InputError
from secateur.core.progress import Progress, Silent, step
from secateur.export.bitmask import stored_bytes
from secateur.models.linears import all_unknown_matrices, find_all_linears
from secateur.models.pages import Mappings

GROUPS = (2, 4, 8, 16, 32)  # the widths M of N:M that are looked for
DENSE = 0.01  # below this fraction of zeros they are rounding, not pruning
TYPICAL = 0.9  # of the groups (rows) hold exactly what the pattern allows; the rest lost more, say to rounding
KERNEL_ROWS, KERNEL_COLUMNS = 16, 16  # multiples that the 2:4 kernels of GPUs want for 16-bit weights (cuSPARSELt)


def inspect(model: nn.Module, source: str | None = None, *, progress: Progress | None = None) -> dict[str, Any]:
    """Return sparsity and pattern of every linear, dtype, size, and what each format would take; JSON throughout.

    The linears are looked at one at a time, so a memory-mapped model never is in memory as a whole.

    Args:
        model: a decoder-only language model; only read.
        source: what to call it; None leaves the name out.
        progress: told about every linear.

    Returns:
        `{"model", "sparsity", "dtype", "bytes", "formats", "linears", "unknown"}`: `sparsity` is the fraction of zeros over
        all linears, `dtype` that of most parameters, `bytes` the size of all parameters and stored buffers, tied ones once.
        `formats` holds `{"bytes", "ratio"}` of `checkpoint` and `bitmask` (without headers), and for `2:4`
        `{"possible", "linears", "of"}`: whether all linears, or how many of them, fit the 2:4 kernels of GPUs.
        `linears` lists `{"name", "block", "shape", "sparsity", "pattern"}`, see `pattern_of`; `unknown` names the
        matrices of the blocks that are of no kind which can be pruned, and that are not counted.

    Raises:
        InputError: if the model has no weights in memory, or is of an unknown architecture.
    """
    linears: list[dict[str, Any]] = []
    zeros = size = fitting = 0
    views = find_all_linears(model)
    progress, mappings = progress or Silent(), Mappings()
    with step(progress, "inspect", len(views)) as number:
        for view in views:
            weight = view.read()
            if weight.is_meta:
                raise InputError(f"the weight of `{view.name}` is not in memory", hint="load the model first")
            kept = weight != 0
            empty = kept.numel() - int(kept.count_nonzero())
            zeros, size = zeros + empty, size + kept.numel()
            fitting += fits_kernels(kept)
            linears.append(
                {
                    "name": view.name,
                    "block": view.block,
                    "shape": list(kept.shape),
                    "sparsity": empty / kept.numel(),
                    "pattern": pattern_of(kept),
                }
            )
            mappings.release([view.parameter.detach()])
            progress.advance(number, 1)
    dtype, dense, packed = _sizes(model, mappings)
    found: dict[str, Any] = {} if source is None else {"model": source}
    return found | {
        "sparsity": zeros / size if size else 0.0,
        "dtype": dtype,
        "bytes": dense,
        "formats": {
            "checkpoint": {"bytes": dense, "ratio": 1.0},
            "bitmask": {"bytes": packed, "ratio": packed / dense if dense else 1.0},
            "2:4": {"possible": bool(linears) and fitting == len(linears), "linears": fitting, "of": len(linears)},
        },
        "linears": linears,
        "unknown": [matrix.name for matrix in all_unknown_matrices(model)],
    }


def pattern_of(kept: Tensor) -> str:
    """Return the pattern that a mask has: `dense`, the tightest `N:M`, `row-uniform` or `unstructured`.

    N:M means that every group of M consecutive inputs keeps at most N and nearly all keep exactly N, so that a very
    sparse unstructured matrix is not taken for one; tightest is the smallest N / M, of equals the smallest M.
    Row-uniform means that nearly all rows have the same number of zeros and none has fewer.

    Args:
        kept: bool `(out_features, in_features)`, True = not zero.
    """
    sparsity = 1 - int(kept.count_nonzero()) / kept.numel()
    if sparsity < DENSE:
        return "dense"
    best: tuple[float, int, int] | None = None
    for width in GROUPS:
        most = _most_of_groups(kept, width)
        if most is not None and (best is None or (most / width, width) < best[:2]):
            best = (most / width, width, most)
    if best is not None:
        return f"{best[2]}:{best[1]}"
    counts = kept.sum(1)
    fullest = counts == counts.max()
    if len(counts) > 1 and float(fullest.float().mean()) >= TYPICAL:
        return "row-uniform"
    return "unstructured"


def fits_kernels(kept: Tensor) -> bool:
    """Return whether a mask `(out_features, in_features)` keeps at most 2 of every 4, in a shape that kernels take."""
    rows, columns = kept.shape
    if rows % KERNEL_ROWS or columns % KERNEL_COLUMNS:
        return False
    return int(_group_counts(kept, 4).max()) <= 2


def _most_of_groups(kept: Tensor, width: int) -> int | None:
    """Return N if `kept` is N:`width` in the sense of `pattern_of`, else None."""
    if kept.shape[1] % width:
        return None
    counts = _group_counts(kept, width)
    most = int(counts.max())
    if most in (0, width):
        return None
    return most if float((counts == most).float().mean()) >= TYPICAL else None


def _group_counts(kept: Tensor, width: int) -> Tensor:
    """Return uint8 `(rows * columns / width,)`, how many each group keeps."""
    return kept.reshape(-1, width).sum(1, dtype=torch.uint8)


def _sizes(model: nn.Module, mappings: Mappings) -> tuple[str, int, int]:
    """Return the dtype of most parameters, and the bytes of all tensors as they are and in the packed format."""
    elements: Counter[str] = Counter()
    dense = packed = 0
    seen: set[object] = set()
    for tensor in model.state_dict().values():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if place in seen and tensor.numel():
            continue
        seen.add(place)
        elements[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        dense += tensor.nbytes
        packed += stored_bytes(tensor)
        mappings.release([tensor])
    return elements.most_common(1)[0][0] if elements else "none", dense, packed
