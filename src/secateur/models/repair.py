"""Explicit repair of damaged weights: only on request, and never without telling."""

from __future__ import annotations

import torch
from torch import nn

from secateur.models.pages import Mappings


@torch.no_grad()
def zero_nonfinite_(model: nn.Module) -> list[str]:
    """Set every NaN and infinity among the parameters of `model` to zero, in place.

    Parameters without one are left untouched, so that memory-mapped files stay mapped.

    Returns:
        One sentence for each parameter that was changed, with its name and how many values were.
    """
    told: list[str] = []
    mappings = Mappings()
    for name, parameter in model.named_parameters():
        finite = torch.isfinite(parameter)
        bad = finite.numel() - int(finite.count_nonzero())
        if bad:
            parameter.data = torch.where(finite, parameter, torch.zeros((), dtype=parameter.dtype))
            told.append(f"{bad} values of `{name}` were NaN or infinite and were set to zero")
        mappings.release([parameter.detach()])
    return told
