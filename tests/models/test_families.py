"""The one generic adapter, over tiny random models of many families."""

from __future__ import annotations

import copy

import pytest
import torch

from families import FAMILIES, prepared
from secateur.models.blocks import find_blocks
from secateur.models.experts import is_experts, pack_experts_, unpack_experts_
from secateur.models.linears import find_all_linears, find_linears
from secateur.models.skeleton import capture, check_replay, run_block

EXPERTS = ["mixtral", "qwen3_moe", "gpt_oss"]
COUNTS = {
    "phi3": 4,
    "gpt_neox": 4,
    "gpt2": 4,
    "bloom": 4,
    "opt": 6,
    "llama": 7,
    "qwen3_moe": 4 + 5 * 3,
    "mixtral": 4 + 4 * 3,
}
BATCH, TOKENS = 4, 12


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def token_ids(batch: int = BATCH) -> torch.Tensor:
    return torch.randint(3, 64, (batch, TOKENS), generator=torch.Generator().manual_seed(7))


def padding(side: str) -> torch.Tensor:
    keep = torch.ones(BATCH, TOKENS, dtype=torch.long)
    for row in range(1, BATCH):
        if side == "left":
            keep[row, :row] = 0
        else:
            keep[row, TOKENS - row :] = 0
    return keep


def real_states(model, blocks, ids, keep):
    """What enters every block and leaves the last one, from hooks on a real forward."""
    states = []

    def note(module, args, kwargs, output):
        states.append(args[0] if args else kwargs["hidden_states"])
        if module is blocks.modules[-1]:
            states.append(output if isinstance(output, torch.Tensor) else output[0])

    model.eval()
    hooks = [block.register_forward_hook(note, with_kwargs=True) for block in blocks.modules]
    with torch.no_grad():
        model(ids, attention_mask=keep, use_cache=False)
    for hook in hooks:
        hook.remove()
    model.train()
    return states


def close(actual, expected, keep=None):
    if keep is not None:
        actual, expected = actual[keep.bool()], expected[keep.bool()]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", [None, "eager"], ids=["default", "eager"])
@pytest.mark.parametrize("side", [None, "left", "right"], ids=["whole", "left", "right"])
@torch.no_grad()
def test_blocks_run_one_by_one_give_the_states_of_the_real_forward(family, attention, side):
    model = prepared(family, attention)
    blocks = find_blocks(model)
    ids, keep = token_ids(), None if side is None else padding(side)
    states = real_states(model, blocks, ids, keep)
    hidden, calls = capture(model, blocks, ids, keep)
    close(hidden, states[0])
    assert len(calls) == len(blocks) == len(states) - 1
    for index, (block, call) in enumerate(zip(blocks.modules, calls, strict=True)):
        output = run_block(block, hidden, call)
        close(output, states[index + 1], keep)
        part = slice(1, 3)
        some = run_block(block, hidden[part], call.rows(part, BATCH))
        close(some, states[index + 1][part], None if keep is None else keep[part])
        hidden = output


def test_blocks_cut_at_every_batch_size_even_where_sizes_coincide(family):
    # as many sequences as tokens, heads or kv heads: only a guess by size would cut the wrong dimension
    model = prepared(family)
    blocks = find_blocks(model)
    for batch in (4, TOKENS):
        ids = token_ids(batch)
        hidden, calls = capture(model, blocks, ids)
        with torch.no_grad():
            whole = run_block(blocks.modules[0], hidden, calls[0])
            last = run_block(blocks.modules[0], hidden[-1:], calls[0].rows(slice(batch - 1, batch), batch))
        close(last, whole[-1:])


def test_replay_is_checked_against_the_real_forward(family):
    model = prepared(family)
    assert check_replay(model, find_blocks(model), token_ids()[:2], padding("left")[:2]) < 1e-5


def test_every_matrix_of_the_blocks_is_found_exactly_once(family):
    model = prepared(family)
    blocks = find_blocks(model)
    linears = find_all_linears(model)
    assert len({linear.name for linear in linears}) == len(linears)
    found = sum(linear.read().numel() for linear in linears)
    expected = 0
    for block in blocks.modules:
        for module in block.modules():
            if type(module).__name__.endswith(("Router", "Norm")):
                continue
            for own, parameter in module.named_parameters(recurse=False):
                expected += parameter.numel() if parameter.dim() >= 2 and not own.endswith("bias") else 0
    assert found == expected
    if family in COUNTS:
        assert len(linears) == COUNTS[family] * len(blocks)
    # every weight of every linear, marked through its view, is marked in the model, and nothing else is
    marked = copy.deepcopy(model)
    for linear in find_all_linears(marked):
        assert not linear.read().isnan().any()
        linear.write(torch.full_like(linear.read(), float("nan")))
    assert sum(int(parameter.isnan().sum()) for parameter in marked.parameters()) == found


def test_linears_read_and_write_in_one_orientation(family):
    model = copy.deepcopy(prepared(family))
    for linear in find_all_linears(model):
        before = linear.parameter.detach().clone()
        weight = linear.read().clone()
        assert weight.shape == (linear.out_features, linear.in_features)
        linear.write(weight + 1)
        torch.testing.assert_close(linear.read(), weight + 1, rtol=0, atol=0)
        linear.write(weight)
        assert torch.equal(linear.parameter, before)
        if linear.module is not None:
            given = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(1))
            bias = 0 if linear.bias is None else linear.bias
            close(linear.module(given), given @ weight.T + bias)


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@torch.no_grad()
def test_unpacked_experts_give_what_packed_ones_give(family, experts):
    model = prepared(family).eval()
    model.set_experts_implementation(experts)
    blocks = find_blocks(model)
    hidden, calls = capture(model, blocks, token_ids())
    for index, (name, block, call) in enumerate(zip(blocks.names, blocks.modules, calls, strict=True)):
        work = copy.deepcopy(block)
        packed = [linear.name for linear in find_linears(work, name, index)]
        weights = [linear.read().clone() for linear in find_linears(work, name, index)]
        unpacked = unpack_experts_(work)
        assert len(unpacked) == 1
        linears = find_linears(work, name, index)
        assert [linear.name for linear in linears] == packed
        assert all(isinstance(linear.module, torch.nn.Linear) for linear in linears)
        assert all(torch.equal(linear.read(), weight) for linear, weight in zip(linears, weights, strict=True))
        output = run_block(block, hidden, call)
        close(run_block(work, hidden, call), output)
        pack_experts_(work, unpacked)
        assert any(is_experts(module) for module in work.modules())
        assert torch.equal(run_block(work, hidden, call), output)
        hidden = output
    model.train()
