"""The sweep over every family: exact budgets, nothing but the linears touched, the model whole afterwards."""

from __future__ import annotations

import copy

import pytest
import torch

from families import FAMILIES, prepared
from secateur.core.pattern import NM
from secateur.engine.budget import assign
from secateur.engine.sweep import Sweep
from secateur.methods.pruners.sparsegpt import SparseGPT
from secateur.models.linears import find_all_linears


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned_to_the_pattern_and_nothing_else_is_touched(family):
    model = copy.deepcopy(prepared(family)).eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    report = Sweep(patterns=assign(model, "2:4"), pruner=SparseGPT(damping=0.1), batch_tokens=24).run(model, ids)
    places = set()
    for linear in find_all_linears(model):
        NM(2, 4).check(report.masks[linear.name])
        assert not linear.read()[~report.masks[linear.name]].any(), linear.name
        assert linear.read().any(), linear.name
        places.add(id(linear.parameter))
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) == (id(parameter) not in places), name
    with torch.no_grad():
        assert torch.isfinite(model(ids, use_cache=False).logits).all()
    assert report.masks.sparsity() == pytest.approx(0.5)
    assert report.sparsity >= 0.5  # inputs that are never active lose their weights as well


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2"])
def test_error_correction_and_plain_statistics_work_or_are_refused_by_name(family):
    from secateur.core.errors import InputError

    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(prepared(family)).eval()
    Sweep(patterns=assign(plain, "2:4"), pruner=SparseGPT(damping=0.1), sequential=False).run(plain, ids)
    corrected = copy.deepcopy(prepared(family)).eval()
    sweep = Sweep(patterns=assign(corrected, "2:4"), pruner=SparseGPT(damping=0.1), error_correction=True)
    if family == "mixtral":
        with pytest.raises(InputError, match="experts"):
            sweep.run(corrected, ids)
    else:
        sweep.run(corrected, ids)
