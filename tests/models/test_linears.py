"""Linears: one view for every way of storing a matrix; what is not understood is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.core.errors import InputError, RecipeError
from secateur.models.blocks import Blocks, find_blocks
from secateur.models.linears import (
    OUTSIDE,
    UnknownMatrix,
    all_unknown_matrices,
    check_prunable,
    find_all_linears,
    find_linears,
    find_outside_linears,
    match,
    unknown_matrices,
)


def random(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def block():
    return nn.ModuleDict({"up": nn.Linear(4, 6), "act": nn.GELU(), "down": nn.Linear(6, 4, bias=False)})


def test_names_blocks_and_shapes_are_those_of_the_model(tiny_llama):
    linears = find_all_linears(tiny_llama)
    assert [linear.name for linear in linears[:7]] == [
        f"model.layers.0.{part}"
        for part in (
            *(f"self_attn.{letter}_proj" for letter in "qkvo"),
            *(f"mlp.{word}_proj" for word in ("gate", "up", "down")),
        )
    ]
    assert [linear.block for linear in linears] == [0] * 7 + [1] * 7
    for linear in linears:
        assert linear.module is tiny_llama.get_submodule(linear.name)
        assert linear.parameter is linear.module.weight and linear.bias is None and linear.class_name == "Linear"
        assert (linear.out_features, linear.in_features) == tuple(linear.module.weight.shape)


def test_a_view_reads_without_copying_and_without_gradient(block):
    up = find_linears(block, "layers.3", 3)[0]
    assert up.name == "layers.3.up" and up.block == 3 and up.bias is block["up"].bias
    assert up.read().data_ptr() == block["up"].weight.data_ptr() and not up.read().requires_grad
    up.read()[0, 0] = 7
    assert block["up"].weight[0, 0].item() == 7


def test_a_view_follows_a_parameter_whose_data_is_replaced(block):
    up = find_linears(block, "", 0)[0]
    block["up"].weight.data = torch.ones(6, 4)
    assert torch.equal(up.read(), torch.ones(6, 4))


def test_writing_rounds_to_the_dtype_of_the_parameter(block):
    up = find_linears(block.to(torch.bfloat16), "", 0)[0]
    weight = random(6, 4)
    up.write(weight)
    assert torch.equal(block["up"].weight, weight.to(torch.bfloat16)) and block["up"].weight.requires_grad


def test_writing_another_shape_is_refused(block):
    with pytest.raises(InputError, match=r"weight of `layers.0.up` is \(6, 4\), got \(4, 6\)"):
        find_linears(block, "layers.0", 0)[0].write(torch.zeros(4, 6))


def test_conv1d_reads_and_writes_transposed_and_so_do_its_masks():
    module = Conv1D(6, 4)  # 4 inputs, 6 outputs, stored (4, 6)
    (linear,) = find_linears(nn.ModuleDict({"c_fc": module}), "h.0", 0)
    assert linear.class_name == "Conv1D" and (linear.out_features, linear.in_features) == (6, 4)
    given = random(3, 4)
    torch.testing.assert_close(given @ linear.read().T + linear.bias, module(given))
    weight, mask = random(6, 4), random(6, 4) > 0.5
    linear.write(weight)
    assert torch.equal(module.weight, weight.T)
    assert torch.equal(linear.parameter_mask(mask), mask.T) and linear.parameter_mask(mask).is_contiguous()


def test_an_ordinary_mask_is_its_own_parameter_mask(block):
    mask = random(6, 4) > 0.5
    assert find_linears(block, "", 0)[0].parameter_mask(mask) is mask


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("Linear", True),
        ("Conv1D", False),
        ("model.layers.0.mlp.down_proj", True),
        ("down_proj", False),
        ("*.down_proj", True),
        ("*.layers.[0-3].*", True),
        ("model.layers.?.mlp.up_proj", False),
        ("*.MLP.*", False),
        ("re:.*down_proj$", True),
        ("re:model", True),
        ("re:layers", False),
        ("re:.*down_pro$", False),
    ],
)
def test_patterns_are_class_names_exact_names_globs_or_regular_expressions(pattern, expected):
    assert match("model.layers.0.mlp.down_proj", "Linear", [pattern]) is expected
    assert match("model.layers.0.mlp.down_proj", "Linear", ["nothing", pattern]) is expected


def test_no_pattern_matches_nothing():
    assert match("lm_head", "Linear", []) is False


def test_a_malformed_regular_expression_is_refused():
    with pytest.raises(RecipeError, match=r"`re:\(` is not a regular expression"):
        match("lm_head", "Linear", ["re:("])


def test_ignored_linears_are_left_out(tiny_llama):
    names = {linear.name for linear in find_all_linears(tiny_llama, ["*.down_proj", "model.layers.1.mlp.up_proj"])}
    assert len(names) == 14 - 3
    assert not any("down_proj" in name for name in names) and "model.layers.1.mlp.up_proj" not in names
    assert find_all_linears(tiny_llama, ["Linear"]) == []


class Gate(nn.Module):
    """Chooses experts by itself: no linear, one row for each expert."""

    def __init__(self, experts):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, 4))


class TopRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, 8)
        self.scores = nn.Parameter(torch.zeros(3, 8))


class StateSpace(nn.Module):
    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.zeros(4, 3))
        self.conv = nn.Conv1d(4, 4, 2, groups=4)
        self.out = nn.Linear(4, 4)


@pytest.mark.parametrize(
    "router", [lambda: nn.Linear(4, 3), lambda: Gate(3), TopRouter], ids=["linear", "parameter", "class"]
)
def test_routers_are_never_pruned(router):
    experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    block = nn.ModuleDict({"moe": nn.ModuleDict({"gate": router(), "experts": experts})})
    assert [linear.name for linear in find_linears(block, "layers.0", 0)] == [
        f"layers.0.moe.experts.{e}" for e in range(3)
    ]
    assert unknown_matrices(block) == []


def test_a_gate_projection_beside_no_experts_is_a_linear():
    block = nn.ModuleDict({"gate": nn.Linear(4, 3), "up": nn.Linear(4, 3)})
    assert [linear.name for linear in find_linears(block, "", 0)] == ["gate", "up"]


def test_embeddings_norms_vectors_and_biases_are_passed_over():
    class HeadNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 4))

    block = nn.ModuleDict(
        {
            "positions": nn.Embedding(5, 4),
            "norm": nn.LayerNorm([3, 4]),
            "head_norm": HeadNorm(),
            "one_row": nn.Linear(4, 1),
            "scale": nn.ParameterList([nn.Parameter(torch.ones(1, 1, 4)), nn.Parameter(torch.ones(4))]),
            "up": nn.Linear(4, 4),
        }
    )
    assert [linear.name for linear in find_linears(block, "", 0)] == ["up"]


def blocks_of(*modules):
    """Blocks of a model, for functions that are told them."""
    return Blocks(tuple(f"layers.{index}" for index in range(len(modules))), list(modules))


def test_matrices_of_unknown_kinds_are_refused_by_name_unless_ignored():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"mixer": StateSpace()}) for _ in range(3))})
    blocks = blocks_of(*model["layers"])
    unknown = [f"layers.{index}.mixer.{own}" for index in range(3) for own in ("decay", "conv.weight")]
    assert [matrix.name for matrix in all_unknown_matrices(model, blocks)] == unknown
    assert unknown_matrices(blocks.modules[0])[0] == UnknownMatrix("mixer.decay", "StateSpace")
    with pytest.raises(
        InputError, match=r"unknown kind: `layers.0.mixer.decay` of StateSpace \(and 5 more\)"
    ) as caught:
        check_prunable(model, (), blocks)
    assert 'ignore: ["layers.*.mixer.decay", "layers.*.mixer.conv.weight"]' in str(caught.value.hint)
    for ignore in (["layers.*.mixer.decay", "re:.*conv"], unknown, ["StateSpace", "Conv1d"]):
        check_prunable(model, ignore, blocks)
    with pytest.raises(InputError, match=r"`layers.0.mixer.conv.weight` of Conv1d"):
        check_prunable(model, ["*.decay"], blocks)
    assert [linear.name for linear in find_linears(blocks.modules[2], "layers.2", 2)] == ["layers.2.mixer.out"]


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight"),
        (lambda: nn.Bilinear(2, 3, 4), "`layers.0.part.weight` of Bilinear"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "parametrizations.weight"),
    ],
    ids=["attention", "bilinear", "parametrized"],
)
def test_modules_that_only_look_like_linears_are_refused(build, what):
    block = nn.ModuleDict({"part": build()})
    with pytest.raises(InputError, match=what):
        check_prunable(nn.ModuleList([block]), (), blocks_of(block))


def test_quantised_weights_are_refused_by_name():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))

    with pytest.raises(InputError, match=r"`layers.0.up.qweight` of Packed"):
        check_prunable(nn.Identity(), (), blocks_of(nn.ModuleDict({"up": Packed()})))
    eight = nn.Linear(4, 4)
    eight.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(InputError, match=r"`layers.0.up` is stored as torch.float8"):
        find_linears(nn.ModuleDict({"up": eight}), "layers.0", 0)


def test_a_linear_that_two_modules_share_is_refused_inside_a_block(block):
    block["again"] = block["up"]
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    with pytest.raises(InputError, match=r"`layers.0.up` shares its weight with `layers.0.again`"):
        check_prunable(model, (), blocks_of(block))
    with pytest.raises(InputError, match=r"`layers.0.up` shares its weight with `layers.0.again`"):
        check_prunable(model, ["layers.0.again"], blocks_of(block))
    check_prunable(model, ["layers.0.again", "layers.0.up"], blocks_of(block))


@pytest.mark.parametrize("share", ["module", "parameter", "memory"])
def test_a_linear_that_two_blocks_share_is_refused(tiny_llama, share):
    one, two = (layer.mlp for layer in tiny_llama.model.layers)
    if share == "module":
        two.up_proj = one.up_proj
    elif share == "parameter":
        two.up_proj.weight = one.up_proj.weight
    else:
        two.up_proj.weight.data = one.up_proj.weight.data
    with pytest.raises(
        InputError, match=r"`model.layers.0.mlp.up_proj` shares its weight with `model.layers.1.mlp.up_proj`"
    ):
        check_prunable(tiny_llama)
    check_prunable(tiny_llama, ["*.up_proj"])


def test_linears_outside_the_blocks_come_only_when_asked_for(tiny_llama):
    assert find_outside_linears(tiny_llama, []) == []
    (head,) = find_outside_linears(tiny_llama, ["lm_head"])
    assert head.module is tiny_llama.lm_head and head.block == OUTSIDE and head.name == "lm_head"
    assert [linear.name for linear in find_outside_linears(tiny_llama, ["*"])] == ["lm_head"]


def test_a_tied_head_is_refused(make_llama):
    model = make_llama(tie_word_embeddings=True)
    assert len(find_all_linears(model)) == 14
    with pytest.raises(
        InputError, match=r"`lm_head` shares its weight with `model.embed_tokens`: pruning one would prune"
    ):
        find_outside_linears(model, ["lm_head"])


def test_models_without_data_are_read_too(tiny_llama):
    names = [linear.name for linear in find_all_linears(tiny_llama)]
    assert [linear.name for linear in find_all_linears(tiny_llama.to("meta"))] == names


def test_the_same_names_on_a_copy_of_a_block(tiny_llama):
    blocks = find_blocks(tiny_llama)
    expected = [linear.name for linear in find_all_linears(tiny_llama) if linear.block == 1]
    assert [linear.name for linear in find_linears(blocks.modules[1], blocks.names[1], 1)] == expected
