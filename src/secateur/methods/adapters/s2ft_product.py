"""The product of S2FT: a frozen linear with a trained slice, and the partial backward that keeps k columns.

Yang et al., NeurIPS 2024, arXiv 2412.06289, section 3.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Adding the slice to a copy of the weight costs two passes over the weight, adding its product to the output costs a
# thin product: for `tokens * k / width` above this the copy is cheaper (float32, CPU, measured between 20 and 100).
COPY_FROM = 25


class Sliced(torch.autograd.Function):
    """The output of a frozen linear with a trained slice; keeps k columns of the input, and no view of it.

    For columns `x W^T + x[:, I] S`, for rows `x W^T` with `x S^T` added at `[:, I]`; S is `(k, other side)`.
    Source: section 3.3, partial back-propagation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        part: Tensor,
        index: Tensor,
        columns: bool,
        zeros: Tensor | None = None,
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
            zeros: bool, like `part`: which of its entries count as zero and are not trained; None: none.
        """
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            width = weight.shape[1] if columns else weight.shape[0]
            copied = is_copied(x, index, width)
            wide, own = weight.detach().to(x.dtype), _masked(part, zeros).to(x.dtype)
            seen = flat.index_select(1, index) if columns else flat  # (tokens, k), a copy: a view would pin all of x
            offset = None if bias is None else bias.to(x.dtype)
            if copied:
                output = F.linear(flat, with_slice(wide, own, index, columns), offset)
            else:
                output = F.linear(flat, wide, offset)
                if columns:
                    output.addmm_(seen, own)
                else:
                    output.index_add_(1, index, flat @ own.T)
        ctx.columns, ctx.copied, ctx.shape = columns, copied, x.shape
        ctx.save_for_backward(seen if ctx.needs_input_grad[3] else None, weight, part, index, zeros)
        return output.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the slice; nothing else is trained."""
        seen, weight, part, index, zeros = ctx.saved_tensors
        of_x = of_part = None
        with torch.autocast(upstream.device.type, enabled=False):
            rows = upstream.reshape(-1, upstream.shape[-1])  # (tokens, out_features)
            heard = rows if ctx.columns else rows.index_select(1, index)
            if ctx.needs_input_grad[0]:
                wide, own = weight.detach().to(rows.dtype), _masked(part, zeros).to(rows.dtype)
                if ctx.copied:
                    of_x = rows @ with_slice(wide, own, index, ctx.columns)
                elif ctx.columns:
                    of_x = (rows @ wide).index_add_(1, index, rows @ own.T)
                else:
                    of_x = torch.addmm(heard @ own, rows, wide)
                of_x = of_x.reshape(ctx.shape)
            if seen is not None:
                of_part = (seen.T @ heard if ctx.columns else heard.T @ seen).to(part.dtype)
                if zeros is not None:
                    of_part.masked_fill_(zeros, 0.0)
        return of_x, None, None, of_part, None, None, None


def with_slice(matrix: Tensor, part: Tensor, index: Tensor, columns: bool) -> Tensor:
    """Return a copy of `matrix` `(out_features, in_features)` with `part` `(k, other side)` added at its lines."""
    return matrix.index_add(1, index, part.T) if columns else matrix.index_add(0, index, part)


def _masked(part: Tensor, zeros: Tensor | None) -> Tensor:
    return part.detach() if zeros is None else part.detach().masked_fill(zeros, 0.0)


def is_copied(x: Tensor, index: Tensor, width: int) -> bool:
    """Return whether a copy of the weight with the slice in it is cheaper for `x` than a product with the slice."""
    # in 16 bits the sum of weight and slice would round small steps away
    return x.dtype.itemsize >= 4 and x.numel() // x.shape[-1] * len(index) > COPY_FROM * width
