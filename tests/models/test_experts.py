"""Experts: 3-D parameters to linears and back, nothing lost and nothing else touched."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.integrations import use_experts_implementation
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from secateur.core.errors import InputError
from secateur.models.blocks import Blocks
from secateur.models.experts import UnpackedExperts, expert_linears, is_experts, pack_experts_, unpack_experts_
from secateur.models.linears import check_prunable, find_linears

EXPERTS, HIDDEN, INNER, TOKENS = 4, 6, 5, 7


def holding(experts: nn.Module) -> nn.Module:
    """A block with one experts module at `moe.experts`, its weights random."""
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return nn.ModuleDict({"moe": nn.ModuleDict({"experts": experts})})


def mixtral() -> nn.Module:
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    config._experts_implementation = "eager"
    return holding(MixtralExperts(config))


def layout(**flags) -> nn.Module:
    """Experts in a layout of their own, computed by transformers' batched implementation."""
    transposed, bias, gate = (flags.get(name, False) for name in ("is_transposed", "has_bias", "has_gate"))

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = EXPERTS
            wide = INNER * (2 if gate else 1)
            first = "gate_up_proj" if gate else "up_proj"
            for name, rows, columns in ((first, wide, HIDDEN), ("down_proj", HIDDEN, INNER)):
                shape = (columns, rows) if transposed else (rows, columns)
                setattr(self, name, nn.Parameter(torch.empty(EXPERTS, *shape)))
                if bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.empty(EXPERTS, rows)))
            self.act_fn = nn.SiLU()
            if flags.get("has_post_expert_norm"):
                self.post_expert_norm = nn.LayerNorm(HIDDEN)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise NotImplementedError

        if not flags.get("is_concatenated", True):

            def _apply_gate(self, gate_up):
                return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]

    config = MixtralConfig()
    config._experts_implementation = "batched_mm"
    return holding(use_experts_implementation(Experts, **{"has_gate": False, **flags})(config))


LAYOUTS = {
    "mixtral": mixtral,
    "plain": lambda: layout(has_gate=False),
    "transposed": lambda: layout(has_gate=True, is_transposed=True),
    "interleaved": lambda: layout(has_gate=True, is_transposed=True, is_concatenated=False, has_bias=True),
    "interleaved-rows": lambda: layout(has_gate=True, is_concatenated=False),
    "bias": lambda: layout(has_gate=True, has_bias=True),
}
if "has_post_expert_norm" in inspect.signature(use_experts_implementation).parameters:  # newer transformers
    LAYOUTS["normed"] = lambda: layout(has_gate=True, has_post_expert_norm=True)


@pytest.fixture(params=LAYOUTS)
def block(request):
    return LAYOUTS[request.param]()


def routing(experts=EXPERTS, chosen=2):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(experts, generator=generator)[:chosen] for _ in range(TOKENS)])
    return hidden, index, torch.rand(TOKENS, chosen, generator=generator)


def run(block, *given):
    return block["moe"]["experts"](*given)


def test_unpacked_experts_give_what_packed_ones_give(block):
    expected = run(block, *routing())
    unpack_experts_(block)
    assert isinstance(block["moe"]["experts"], UnpackedExperts)
    torch.testing.assert_close(run(block, *routing()), expected, rtol=1e-5, atol=1e-5)
    hidden, index, weights = routing()
    torch.testing.assert_close(
        block["moe"]["experts"](hidden, top_k_weights=weights, top_k_index=index), expected, rtol=1e-5, atol=1e-5
    )


def test_packed_and_unpacked_linears_have_the_same_names_and_weights(block):
    packed = find_linears(block, "layers.0", 0)
    expected = [(linear.name, linear.read().clone(), linear.bias) for linear in packed]
    assert all(linear.module is None and linear.class_name == "Linear" for linear in packed)
    assert packed[-1].name == "layers.0.moe.experts.3.down_proj"
    unpack_experts_(block)
    for linear, (name, weight, bias) in zip(find_linears(block, "layers.0", 0), expected, strict=True):
        assert linear.name == name and torch.equal(linear.read(), weight)
        assert isinstance(linear.module, nn.Linear) and linear.parameter is linear.module.weight
        assert (linear.bias is None) == (bias is None) and (bias is None or torch.equal(linear.bias, bias))


def test_slices_cover_every_weight_exactly_once(block):
    experts = block["moe"]["experts"]
    for parameter in experts.parameters():
        nn.init.zeros_(parameter)
    for linear in find_linears(block, "", 0):
        linear.write(linear.read() + 1)
        if linear.bias is not None:
            linear.bias.add_(1)
    for name, parameter in experts.named_parameters(recurse=False):
        assert (parameter == 1).all(), name


def test_an_expert_slice_takes_its_part_of_a_parameter_mask(block):
    generator = torch.Generator().manual_seed(2)
    for linear in find_linears(block, "", 0):
        mask = torch.rand(linear.out_features, linear.in_features, generator=generator) > 0.5
        whole = torch.ones_like(linear.parameter, dtype=torch.bool)
        whole[linear.index] = linear.parameter_mask(mask)
        linear.parameter.data.mul_(whole)
        assert torch.equal(linear.read() == 0, ~mask)


def test_unpacking_and_packing_changes_nothing(block):
    before = {name: value.clone() for name, value in block.state_dict().items()}
    experts = block["moe"]["experts"]
    pack_experts_(block, unpack_experts_(block))
    assert block["moe"]["experts"] is experts
    assert list(block.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@pytest.mark.parametrize("how", ["in place", "new data", "new parameter"])
def test_packing_after_an_edit_changes_exactly_the_edited_slices(block, how):
    before = {linear.name: linear.read().clone() for linear in find_linears(block, "", 0)}
    unpacked = unpack_experts_(block)
    edited = {"moe.experts.1.down_proj", "moe.experts.2.up_proj"}
    for name in edited:
        linear = block.get_submodule(name)
        new = torch.full_like(linear.weight, 3.0).contiguous()
        if how == "in place":
            linear.weight.data.copy_(new)
        elif how == "new data":
            linear.weight.data = new
        else:
            linear.weight = nn.Parameter(new)
    pack_experts_(block, unpacked)
    for linear in find_linears(block, "", 0):
        expected = torch.full_like(before[linear.name], 3.0) if linear.name in edited else before[linear.name]
        assert torch.equal(linear.read(), expected)


def test_a_bias_edited_while_unpacked_is_packed():
    block = LAYOUTS["interleaved"]()
    unpacked = unpack_experts_(block)
    block.get_submodule("moe.experts.2.up_proj").bias = nn.Parameter(torch.full((INNER,), 9.0))
    pack_experts_(block, unpacked)
    bias = block["moe"]["experts"].gate_up_proj_bias
    assert (bias[2, 1::2] == 9).all() and int((bias == 9).sum()) == INNER


def test_every_linear_runs_exactly_once_without_tokens_if_none_is_routed():
    block = mixtral()
    unpack_experts_(block)
    order = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, given, out, name=name: order.append((name, given[0])))
    hidden, _, weights = routing()
    index = torch.tensor([[0, 2]]).expand(TOKENS, 2)
    assert run(block, hidden, index, weights).shape == (TOKENS, HIDDEN)
    assert [name for name, _ in order] == [linear.name for linear in find_linears(block, "", 0)]
    assert [len(given) for _, given in order] == [TOKENS] * 3 + [0] * 3 + [TOKENS] * 3 + [0] * 3
    for expert in range(EXPERTS):  # gate and up are given one tensor, so they share their statistics
        assert order[3 * expert][1] is order[3 * expert + 1][1]


def test_tokens_routed_nowhere_add_nothing():
    block = mixtral()
    hidden, index, weights = routing()
    unpack_experts_(block)
    nowhere = torch.full_like(index, EXPERTS)  # the number that means no expert
    assert (run(block, hidden, nowhere, weights) == 0).all()


def test_gradients_reach_hidden_states_and_routed_linears():
    block = mixtral()
    hidden, index, weights = routing()
    hidden.requires_grad_()
    weights.requires_grad_()
    run(block, hidden, index, weights).square().sum().backward()
    expected = [hidden.grad.clone(), weights.grad.clone(), block["moe"]["experts"].down_proj.grad.clone()]
    hidden.grad = weights.grad = None
    unpack_experts_(block)
    run(block, hidden, index, weights).square().sum().backward()
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(weights.grad, expected[1])
    grads = torch.stack([block.get_submodule(f"moe.experts.{e}.down_proj").weight.grad for e in range(EXPERTS)])
    torch.testing.assert_close(grads, expected[2])


def test_unpacking_takes_no_memory_and_no_randomness():
    block = mixtral()
    places = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    before = torch.get_rng_state()
    unpack_experts_(block)
    assert torch.equal(before, torch.get_rng_state())
    assert {parameter.untyped_storage().data_ptr() for parameter in block.parameters()} == places


def test_frozen_parameters_and_modes_stay_so():
    block = mixtral().eval()
    block.requires_grad_(False)
    unpacked = unpack_experts_(block)
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert not any(module.training for module in block.modules())
    block.train()
    pack_experts_(block, unpacked)
    assert block["moe"]["experts"].training and not block["moe"]["experts"].down_proj.requires_grad


def test_a_block_moved_while_unpacked_is_packed_where_it_is_now():
    block = mixtral()
    expected = [linear.read().double() for linear in find_linears(block, "", 0)]
    unpacked = unpack_experts_(block)
    block.double()
    pack_experts_(block, unpacked)
    assert {parameter.dtype for parameter in block.parameters()} == {torch.float64}
    assert all(torch.equal(one.read(), two) for one, two in zip(find_linears(block, "", 0), expected, strict=True))


def test_packing_twice_is_refused():
    block = mixtral()
    unpacked = unpack_experts_(block)
    pack_experts_(block, unpacked)
    with pytest.raises(InputError, match=r"`moe.experts` is packed already"):
        pack_experts_(block, unpacked)


def test_a_copy_made_before_unpacking_is_independent():
    block = mixtral()
    work = copy.deepcopy(block)
    unpacked = unpack_experts_(work)
    work.get_submodule("moe.experts.0.up_proj").weight.data.zero_()
    pack_experts_(work, unpacked)
    assert (work["moe"]["experts"].gate_up_proj[0, INNER:] == 0).all()
    assert not (block["moe"]["experts"].gate_up_proj[0, INNER:] == 0).any()


def test_blocks_without_experts_are_left_alone():
    block = nn.ModuleDict({"up": nn.Linear(3, 3)})
    assert unpack_experts_(block) == []
    pack_experts_(block, [])
    assert not is_experts(block["up"])


def spoil(experts, how):
    if how == "extra parameter":
        experts.scale = nn.Parameter(torch.ones(EXPERTS))
    elif how == "inner layer":
        experts.mix = nn.LayerNorm(HIDDEN)
    elif how == "missing flag":
        del experts.is_transposed
    elif how == "bias not stated":
        experts.gate_up_proj_bias = nn.Parameter(torch.zeros(EXPERTS, 2 * INNER))
    else:
        experts.forward = lambda hidden_states: hidden_states


@pytest.mark.parametrize("how", ["extra parameter", "inner layer", "missing flag", "bias not stated", "other forward"])
def test_experts_in_an_unknown_layout_are_refused_not_guessed(how):
    block = mixtral()
    spoil(block["moe"]["experts"], how)
    assert not is_experts(block["moe"]["experts"]) and unpack_experts_(block) == []
    with pytest.raises(InputError, match=r"unknown kind: `layers.0.moe.experts.gate_up_proj` of MixtralExperts"):
        check_prunable(nn.Identity(), (), Blocks(("layers.0",), [block]))


def test_linears_come_expert_after_expert_in_the_order_of_their_forward():
    names = [(linear.expert, linear.name) for linear in expert_linears(mixtral()["moe"]["experts"])]
    assert names == [(e, name) for e in range(EXPERTS) for name in ("gate_proj", "up_proj", "down_proj")]
