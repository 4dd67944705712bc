"""Heads and channels of every family: the units that the layout names are the ones the forward has."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from families import FAMILIES, prepared
from secateur.core.errors import InputError
from secateur.models.layout import find_layout, oriented

WORKING = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "gpt2")
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def lines(model, place, unit):
    """Return the rows or columns of one unit of a model, as a view that may be written to."""
    module = model.get_submodule(place.module)
    return place.lines(oriented(module, module.weight.detach()))[unit * place.size : (unit + 1) * place.size]


def without_unit(model, layout, kinds, unit, values):
    """Return the logits after the lines of one unit of the first block were set to random values."""
    changed = copy.deepcopy(model)
    for kind in kinds:
        part = lines(changed, layout.blocks[0].places[kind], unit)
        part.copy_(values * torch.randn(part.shape, generator=torch.Generator().manual_seed(1)))
    return changed(IDS).logits


@pytest.mark.parametrize("family", WORKING)
def test_rows_of_a_unit_do_not_matter_once_its_columns_are_zero(family):
    model = copy.deepcopy(prepared(family)).eval()
    layout = find_layout(model)
    block = layout.blocks[0]
    with torch.no_grad():
        head = block.places["o"].count - 1
        group = head // block.queries_per_group
        lines(model, block.places["o"], head).zero_()
        lines(model, block.places["down"], 5).zero_()
        before = model(IDS).logits
        assert torch.equal(without_unit(model, layout, ["q"], head, 1.0), before)
        assert torch.equal(
            without_unit(model, layout, [k for k in ("up", "gate") if k in block.places], 5, 1.0), before
        )
        assert not torch.allclose(without_unit(model, layout, ["q"], 0, 1.0), before)
        if block.queries_per_group > 1:
            assert not torch.allclose(without_unit(model, layout, ["v"], group, 1.0), before)  # others read it too
        for other in range(group * block.queries_per_group, head):
            lines(model, block.places["o"], other).zero_()
        before = model(IDS).logits
        assert torch.equal(without_unit(model, layout, ["k", "v"], group, 1.0), before)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(WORKING)))
def test_other_families_are_refused_by_name(family):
    model = prepared(family)
    with pytest.raises(InputError, match=type(model).__name__) as caught:
        find_layout(model)
    assert (
        "model.layers.0" in str(caught.value) or ".h.0" in str(caught.value) or "gpt_neox.layers.0" in str(caught.value)
    )


def test_sizes_are_read_block_by_block():
    model = copy.deepcopy(prepared("llama"))
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(32, 20), nn.Linear(32, 20), nn.Linear(20, 32)
    layout = find_layout(model)
    assert [block.places["down"].count for block in layout.blocks] == [48, 20, 48]


@pytest.mark.parametrize(("name", "message"), [("up_proj", "channels"), ("q_proj", "heads"), ("v_proj", "heads")])
def test_sizes_that_do_not_fit_together_are_refused(name, message):
    model = copy.deepcopy(prepared("llama"))
    block = model.model.layers[1]
    owner = block.mlp if name == "up_proj" else block.self_attn
    setattr(owner, name, nn.Linear(32, 40))
    with pytest.raises(
        InputError, match=rf"{message} of LlamaForCausalLM.*do not fit together in block `model.layers.1`"
    ):
        find_layout(model)


def test_an_index_lists_the_lines_of_its_units():
    place = find_layout(prepared("phi3")).blocks[1].places["v"]
    assert place.index(torch.tensor([1])).tolist() == list(range(32 + 16 + 8, 64))
