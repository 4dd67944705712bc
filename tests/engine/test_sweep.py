"""The sweep: one traversal, equal to the five-pass walk, exact on its budgets."""

from __future__ import annotations

import copy

import pytest
import torch

from secateur.core.pattern import NM, Unstructured
from secateur.core.problem import LayerProblem
from secateur.engine.budget import assign
from secateur.engine.sweep import Sweep
from secateur.models.linears import find_all_linears


def five_passes(model, ids, pattern, pruner):
    """Return the model pruned the slow way: the block is run again before every group of linears."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        groups = [
            [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
            [layer.self_attn.o_proj],
            [layer.mlp.gate_proj, layer.mlp.up_proj],
            [layer.mlp.down_proj],
        ]
        for group in groups:
            seen = []
            hook = group[0].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach()))
            with torch.no_grad():
                model(ids, use_cache=False)
            hook.remove()
            x = torch.cat(seen).reshape(-1, seen[0].shape[-1])
            gram = x.T @ x / len(x)
            for linear in group:
                problem = LayerProblem(linear.weight.detach(), pattern, gram, gram.diagonal(), x.mean(0))
                linear.weight.data = pruner.prune(problem).weight
    return model


@pytest.mark.parametrize("batch_tokens", [24, 48, 1000])
def test_one_traversal_equals_five_passes(tiny_llama, ids, batch_tokens, pruner):
    pattern = Unstructured(0.5, "row")
    expected = five_passes(tiny_llama, ids, pattern, pruner)
    Sweep(patterns=assign(tiny_llama, pattern), pruner=pruner, guard=False, batch_tokens=batch_tokens).run(
        tiny_llama, ids
    )
    for mine, slow in zip(find_all_linears(tiny_llama), find_all_linears(expected), strict=True):
        assert torch.equal(mine.read() != 0, slow.read() != 0)
        torch.testing.assert_close(mine.read(), slow.read(), rtol=1e-5, atol=1e-6)


def test_every_linear_runs_once_per_batch(make_llama, make_ids, monkeypatch, pruner):
    tiny_llama, ids = make_llama(vocabulary=50), make_ids(vocabulary=50)
    calls: dict[tuple[int, int], int] = {}
    real = torch.nn.functional.linear

    def counted(x, weight, bias=None):
        if x.numel() // x.shape[-1] == 24:  # a whole batch, not the few tokens that tell what a block returns
            calls[tuple(weight.shape)] = calls.get(tuple(weight.shape), 0) + 1
        return real(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    Sweep(patterns=assign(tiny_llama, "50%"), pruner=pruner, batch_tokens=24).run(tiny_llama, ids)
    blocks, batches = 2, 4
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)]
    for shape in set(shapes):
        assert calls[shape] == shapes.count(shape) * blocks * batches


def test_budgets_are_exact_per_row_layer_and_group(make_llama, ids, pruner):
    for pattern in (Unstructured(0.3, "row"), Unstructured(0.37, "layer"), NM(2, 4), NM(3, 8)):
        model = make_llama()
        report = Sweep(patterns=assign(model, pattern), pruner=pruner, seed=1).run(model, ids)
        for linear in find_all_linears(model):
            pattern.check(report.masks[linear.name])
            assert not (linear.read() != 0)[~report.masks[linear.name]].any()


def test_plain_mode_takes_the_dense_blocks_statistics(tiny_llama, ids, pruner):
    pattern = Unstructured(0.5, "row")
    reference = copy.deepcopy(tiny_llama)
    for layer in reference.model.layers:
        linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        seen: dict[torch.nn.Module, torch.Tensor] = {}
        hooks = [
            linear.register_forward_pre_hook(lambda module, args, seen=seen: seen.__setitem__(module, args[0].detach()))
            for linear in linears
        ]
        with torch.no_grad():
            reference(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        for linear in linears:
            x = seen[linear].reshape(-1, linear.in_features)
            gram = x.T @ x / len(x)
            problem = LayerProblem(linear.weight.detach(), pattern, gram, gram.diagonal(), x.mean(0))
            linear.weight.data = pruner.prune(problem).weight
    Sweep(patterns=assign(tiny_llama, pattern), pruner=pruner, guard=False, sequential=False, batch_tokens=48).run(
        tiny_llama, ids
    )
    for mine, slow in zip(find_all_linears(tiny_llama), find_all_linears(reference), strict=True):
        torch.testing.assert_close(mine.read(), slow.read(), rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing(make_llama, ids, pruner):
    bare, padded = make_llama(), make_llama()
    pattern = Unstructured(0.5, "row")
    Sweep(patterns=assign(bare, pattern), pruner=pruner).run(bare, ids)
    filler = torch.cat([ids, ids[:, :5]], 1)
    keep = torch.ones_like(filler, dtype=torch.bool)
    keep[:, ids.shape[1] :] = False
    Sweep(patterns=assign(padded, pattern), pruner=pruner).run(padded, filler, keep)
    for mine, other in zip(find_all_linears(bare), find_all_linears(padded), strict=True):
        torch.testing.assert_close(mine.read(), other.read(), rtol=1e-4, atol=1e-5)


def test_disk_offload_gives_the_same_bits(make_llama, ids, pruner):
    in_memory, on_disk = make_llama(), make_llama()
    for model, offload in ((in_memory, "ram"), (on_disk, "disk")):
        Sweep(patterns=assign(model, "2:4"), pruner=pruner, offload=offload, batch_tokens=48).run(model, ids)
    for mine, other in zip(find_all_linears(in_memory), find_all_linears(on_disk), strict=True):
        assert torch.equal(mine.read(), other.read())


def test_error_correction_lowers_the_error_of_the_last_block(make_llama, make_ids, pruner):
    ids = make_ids(samples=16, length=48)
    dense = make_llama(layers=3)

    def last_hidden(model):
        with torch.no_grad():
            return model.model(ids, use_cache=False).last_hidden_state

    errors = {}
    for corrected in (False, True):
        model = copy.deepcopy(dense)
        Sweep(
            patterns=assign(model, "60%"), pruner=pruner, refit=True, error_correction=corrected, batch_tokens=96
        ).run(model, ids)
        errors[corrected] = float((last_hidden(model) - last_hidden(dense)).square().mean())
    assert errors[True] < errors[False]


def test_half_precision_is_solved_in_float32_and_stored_in_its_own_dtype(make_llama, ids, pruner):
    model = make_llama().to(torch.bfloat16)
    report = Sweep(patterns=assign(model, "2:4"), pruner=pruner).run(model, ids)
    for linear in find_all_linears(model):
        assert linear.read().dtype == torch.bfloat16
        NM(2, 4).check(report.masks[linear.name])


def test_ignored_linears_stay_as_they_were(tiny_llama, ids, pruner):
    before = copy.deepcopy(tiny_llama)
    chosen = assign(tiny_llama, "50%", {"re:.*layers.1.mlp.*": None}, ignore=["*.q_proj"])
    Sweep(patterns=chosen, pruner=pruner).run(tiny_llama, ids)
    for mine, old in zip(find_all_linears(tiny_llama), find_all_linears(before), strict=True):
        touched = mine.name in chosen
        assert touched == (not torch.equal(mine.read(), old.read()))
        assert touched == (".q_proj" not in mine.name and "layers.1.mlp" not in mine.name)


def test_mixture_experts_are_pruned_one_by_one(ids, pruner):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MixtralForCausalLM(config).eval()
    report = Sweep(patterns=assign(model, "2:4"), pruner=pruner, batch_tokens=24).run(model, ids)
    names = [linear.name for linear in find_all_linears(model)]
    assert sum("experts" in name for name in names) == 2 * 4 * 3
    for linear in find_all_linears(model):
        NM(2, 4).check(linear.read() != 0)
        assert torch.equal(linear.read() != 0, report.masks[linear.name])


@pytest.mark.parametrize("batch_tokens", [24, 1000])
def test_error_correction_follows_the_dense_path_through_blocks_left_alone(make_llama, ids, pruner, batch_tokens):
    seen: dict[str, torch.Tensor] = {}

    class Watching(type(pruner)):
        """Remembers the target it is given for the first linear of the last block."""

        def prune(self, problem):
            seen.setdefault("target", problem.weight.clone())
            seen.setdefault("dense", (problem.weight if problem.dense is None else problem.dense).clone())
            return super().prune(problem)

    model = make_llama(layers=3)
    chosen = assign(model, "50%", {"re:.*layers.[01].*": None})
    Sweep(patterns=chosen, pruner=Watching(), error_correction=True, batch_tokens=batch_tokens).run(model, ids)
    # nothing before the last block was pruned, so both paths agree and there is nothing to correct
    torch.testing.assert_close(seen["target"], seen["dense"], rtol=1e-3, atol=1e-4)
