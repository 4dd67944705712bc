"""A gated MLP keeps its gate and `up` alone: same bits, fewer bytes, and no effect on what is written otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from transformers.activations import ACT2FN

from secateur.train.gated_product import GatedProduct, keep_activations_, keep_gates_only_


class Mlp(nn.Module):
    """A gated MLP; `way` is how the product is written."""

    def __init__(self, activation="silu", way=lambda activated, up: activated * up):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)
        self.act = ACT2FN[activation]
        self.way = way

    def forward(self, x):
        return self.down(self.way(self.act(self.gate(x)), self.up(x)))


def run(mlp, dtype=torch.float32, autocast=False):
    """Return output and gradients, bytes kept for backward, and whether the product was one node."""
    mlp = mlp.to(dtype)
    x = torch.linspace(-2, 2, 24, dtype=dtype).reshape(4, 6).requires_grad_()
    kept, owned = {}, {parameter.untyped_storage().data_ptr() for parameter in mlp.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        output = mlp(x)
    gradients = torch.autograd.grad(output.square().sum(), [x, *mlp.parameters()], materialize_grads=True)
    return (output.detach(), *gradients), sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2"])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_outputs_and_gradients_have_the_same_bits(activation, dtype, autocast):
    plain = Mlp(activation)
    gated = copy.deepcopy(plain)
    assert keep_gates_only_([gated]) == 1
    expected, _ = run(plain, dtype, autocast)
    found, _ = run(gated, dtype, autocast)
    assert all(type(tensor) is torch.Tensor for tensor in found)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_the_activation_is_not_kept():
    plain = Mlp()
    gated = copy.deepcopy(plain)
    keep_gates_only_([gated])
    keep_gates_only_([gated])  # twice is once
    assert run(plain)[1] - run(gated)[1] == 4 * 10 * 4  # one tensor of tokens x channels in float32
    keep_activations_(gated)
    assert run(plain)[1] == run(gated)[1]


@pytest.mark.parametrize(
    "way",
    [
        lambda activated, up: up * activated,
        lambda activated, up: torch.mul(up, activated),
        lambda activated, up: activated.mul(up),
        lambda activated, up: activated + up,
        lambda activated, up: activated * up[..., :1],
        lambda activated, up: activated * 2.0,
        lambda activated, up: activated * activated,
        lambda activated, up: torch.cat([activated, up], -1).chunk(2, -1)[0] * up,
        lambda activated, up: activated.clone().add_(1.0) * up,
        lambda activated, up: activated.add_(1.0) * up,
    ],
)
def test_however_it_is_written_the_gradients_are_the_same(way):
    plain = Mlp("relu2", way)
    gated = copy.deepcopy(plain)
    keep_gates_only_([gated])
    expected, bytes_plain = run(plain)
    found, bytes_gated = run(gated)
    assert bytes_gated <= bytes_plain
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_a_gate_that_was_written_to_is_still_refused():
    mlp = Mlp()
    keep_gates_only_([mlp])
    x = torch.ones(2, 6)
    gate = mlp.gate(x)
    activated = mlp.act(gate)
    with torch.no_grad():
        gate.zero_()
    loss = (activated * mlp.up(x)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    gate = mlp.gate(x)
    product = mlp.act(gate) * mlp.up(x)
    with torch.no_grad():
        gate.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_without_gradients_nothing_happens():
    mlp = Mlp()
    keep_gates_only_([mlp])
    with torch.no_grad():
        assert type(mlp.act(torch.ones(3))) is torch.Tensor
    assert type(mlp.act(torch.ones(3))) is torch.Tensor
    in_place = nn.Module()
    in_place.act = nn.SiLU(inplace=True)
    assert keep_gates_only_([in_place]) == 1
    assert type(in_place.act(torch.ones(3, requires_grad=True) * 1.0)) is torch.Tensor


@pytest.mark.parametrize("where", ["before", "after", "everywhere"])
def test_an_output_that_a_hook_has_changed_has_its_own_gradient(where):
    plain = Mlp()
    gated = copy.deepcopy(plain)
    handles = []

    def tripled(module, inputs, output):
        return 3.0 * output if type(module) is type(plain.act) else output

    if where == "after":
        keep_gates_only_([gated])
    if where == "everywhere":
        handles.append(nn.modules.module.register_module_forward_hook(tripled))
    else:
        plain.act.register_forward_hook(tripled)
        gated.act.register_forward_hook(tripled)
    keep_gates_only_([gated])
    try:
        expected, found = run(plain)[0], run(gated)[0]
    finally:
        for handle in handles:
            handle.remove()
    assert not torch.equal(expected[0], run(Mlp())[0][0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_the_gradient_of_an_activation_is_there_for_who_asks():
    gradients = {}

    def by_retaining(activated, up):
        activated.retain_grad()
        gradients["retained"] = activated
        return activated * up

    def by_hook(activated, up):
        activated.register_hook(lambda gradient: gradients.update(heard=gradient))
        return activated * up

    for way in (by_retaining, by_hook):
        mlp = Mlp(way=way)
        keep_gates_only_([mlp])
        mlp(torch.ones(2, 6)).sum().backward()
    mlp = Mlp()
    keep_gates_only_([mlp])
    mlp.act.register_forward_hook(lambda module, inputs, output: gradients.update(listened=output))
    loss = mlp(torch.ones(2, 6)).sum()
    (asked,) = torch.autograd.grad(loss, gradients["listened"])
    assert torch.equal(gradients["retained"].grad, asked)
    assert torch.equal(gradients["heard"], asked)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own forward mode calls it
def test_transforms_of_functions_work_as_before():
    mlp = Mlp()
    keep_gates_only_([mlp])
    gate, up = torch.linspace(-2, 2, 6).reshape(2, 3).requires_grad_(), torch.ones(2, 3)
    (expected,) = torch.autograd.grad((nn.functional.silu(gate) * up).sum(), gate)

    def total(gate, up):
        return (mlp.act(gate) * up).sum()

    assert torch.allclose(torch.func.grad(total)(gate, up), expected)
    assert torch.allclose(torch.func.vmap(torch.func.grad(total))(gate, up), expected)
    assert torch.allclose(torch.func.jacfwd(total)(gate, up), expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(gate, torch.ones_like(gate))
        assert torch.allclose(forward_ad.unpack_dual(total(dual, up)).tangent, expected.sum())


def test_modules_that_are_no_activations_are_left_alone():
    mlp = nn.ModuleDict({"act": nn.PReLU(), "dropout": nn.Dropout(0.5), "random": nn.RReLU(), "norm": nn.LayerNorm(3)})
    assert keep_gates_only_([mlp]) == 0
    assert not any(module._forward_hooks for module in mlp.modules())


def test_only_what_needs_a_gradient_gets_one():
    gate, up = torch.randn(3, requires_grad=True), torch.randn(3)
    assert GatedProduct.apply(gate, up, nn.functional.silu(gate).detach(), nn.functional.silu).requires_grad
    gate, up = gate.detach().double().requires_grad_(), up.double().requires_grad_()
    silu = nn.functional.silu
    assert torch.autograd.gradcheck(
        lambda gate, up: GatedProduct.apply(gate, up, silu(gate).detach(), silu), (gate, up)
    )
