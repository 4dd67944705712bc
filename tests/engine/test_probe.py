"""Costs measured on a few blocks: everything that was asked for has one, and the model is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from conftest import random_ids, random_llama
from secateur.core.contracts import Plan
from secateur.core.errors import PatternError
from secateur.core.pattern import Unstructured
from secateur.engine.probe import Costs, PlanCost, probe
from secateur.methods.block_tuners.ebft import EBFT
from secateur.methods.planners.loss_curves import LossCurves
from secateur.methods.planners.owl import OWL
from secateur.methods.pruners.magnitude import Magnitude
from secateur.methods.pruners.wanda import Wanda
from secateur.models.blocks import find_blocks, shortened
from secateur.models.linears import find_all_linears

CPU = torch.device("cpu")


class Refusing:
    """A planner that finds no room."""

    backward = False
    copies = 0

    def plan(self, task) -> Plan:
        raise PatternError("no room")


def measured(model, most_seconds=100.0, **planners) -> Costs:
    patterns = {linear.name: Unstructured(0.5) for linear in find_all_linears(model)}
    return probe(
        model,
        random_ids(samples=2, length=16),
        patterns,
        {"magnitude": (Magnitude(), False), "wanda": (Wanda(), True)},
        {"ebft": EBFT(epochs=1)},
        {name: (planner, Wanda()) for name, planner in planners.items()},
        device=CPU,
        most_seconds=most_seconds,
    )


def test_everything_is_measured_and_the_model_stays_as_it_was():
    model = random_llama().train()
    before, modules = copy.deepcopy(model.state_dict()), [*model.modules()]
    found = measured(model, curves=LossCurves(), owl=OWL())
    assert found.forward > 0
    assert found.solvers.keys() == {"magnitude", "wanda"}
    assert found.tuners["ebft"] > 0
    assert found.planners.keys() == {"curves", "owl"}
    assert found.failed == {}
    assert found.blocks == len(find_blocks(model))
    assert model.training
    assert [*model.modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    for cost in found.planners.values():
        assert min(cost.outside, cost.token, cost.block) >= 0


@pytest.mark.parametrize("layers", [1, 2])
def test_short_models_are_measured_too(layers):
    assert measured(random_llama(layers), curves=LossCurves()).planning("curves", 1000) > 0


def test_what_cannot_be_measured_is_told():
    model = random_llama()
    assert measured(model, refusing=Refusing()).failed == {"refusing": "no room"}
    assert len(find_blocks(model)) > 1
    late = measured(model, most_seconds=0.0, curves=LossCurves()).failed
    assert late.keys() == {"magnitude", "wanda", "ebft", "curves"}
    assert set(late.values()) == {"there was no time left to measure it"}


def test_a_plan_costs_what_its_parts_add_up_to():
    costs = Costs(4, 100, planners={"owl": PlanCost(outside=0.5, token=0.25, block=3.0)})
    assert costs.planning("owl", 10) == 10 * (0.5 + 4 * 0.25) + 4 * 3.0


def test_a_shortened_model_ends_after_its_first_blocks():
    model, ids = random_llama().eval(), random_ids(samples=1, length=8)
    blocks = find_blocks(model)
    with torch.no_grad():
        whole = model(ids).logits
        with shortened(model, blocks, 1):
            assert len(find_blocks(model)) == 1
            short = model(ids).logits
        first = model.model(ids, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(short, model.lm_head(model.model.norm(first)))
        assert torch.equal(model(ids).logits, whole)
    with pytest.raises(ValueError, match="within"), shortened(model, blocks, 1):
        raise ValueError("within")
    assert find_blocks(model).names == blocks.names
