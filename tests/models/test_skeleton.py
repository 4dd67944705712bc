"""Blocks called without being run, run alone, and the model left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from plain_models import Decoder, Layer
from secateur.core.errors import InputError, NumericError
from secateur.models.blocks import find_blocks
from secateur.models.skeleton import capture, check_replay, run_block

IDS = torch.randint(64, (3, 10), generator=torch.Generator().manual_seed(0))


def state_of(model):
    """Everything about a model that a capture could have changed."""
    parts = {
        name: (
            module.training,
            sorted(vars(module)),
            vars(module).get("forward"),
            [len(value) for key, value in vars(module).items() if key.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    }
    config = model.config.to_dict() if hasattr(model, "config") else None
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    return parts, config, tensors


def same_state(one, other):
    return one[:2] == other[:2] and all(torch.equal(one[2][name], other[2][name]) for name in one[2])


@pytest.mark.parametrize("training", [True, False])
def test_capture_leaves_the_model_as_it_was(make_llama, training):
    model = make_llama(attention_dropout=0.5).train(training)
    model.model.layers[1].mlp.train(not training)  # modes that differ inside are kept too
    model.config.output_hidden_states = True
    before = state_of(model)
    random = torch.get_rng_state()
    hidden, calls = capture(model, find_blocks(model), IDS)
    assert same_state(before, state_of(model))
    assert model.config.use_cache and torch.equal(random, torch.get_rng_state())
    assert not hidden.requires_grad and torch.is_grad_enabled()
    assert not any(tensor.requires_grad for call in calls for tensor in call.tensors().values())


def test_capture_leaves_the_model_as_it_was_when_it_fails(tiny_llama, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("broken")

    blocks = find_blocks(tiny_llama)
    monkeypatch.setattr(type(tiny_llama.model.rotary_emb), "forward", broken)
    before = state_of(tiny_llama.train())
    with pytest.raises(RuntimeError, match="broken"):
        capture(tiny_llama, blocks, IDS)
    assert same_state(before, state_of(tiny_llama))


def test_an_own_forward_of_a_block_survives_capture(tiny_llama):
    # offloading libraries put their hooks there
    block = tiny_llama.model.layers[0]
    own = block.forward
    block.forward = own
    capture(tiny_llama, find_blocks(tiny_llama), IDS)
    assert vars(block)["forward"] is own


def test_capture_runs_neither_blocks_nor_norm_nor_head_after_the_first_time(tiny_llama):
    blocks = find_blocks(tiny_llama)
    capture(tiny_llama, blocks, IDS)
    ran = []
    for part in (tiny_llama.model.norm, tiny_llama.lm_head, *(layer.mlp for layer in tiny_llama.model.layers)):
        part.register_forward_hook(lambda *given: ran.append(given))
    capture(tiny_llama, blocks, IDS)
    assert ran == []


def test_caches_are_neither_kept_nor_asked_for(tiny_llama):
    _, calls = capture(tiny_llama, find_blocks(tiny_llama), IDS)
    for call in calls:
        assert call.kwargs["past_key_values"] is None
        assert call.kwargs.get("use_cache", False) is False


def test_a_model_of_unknown_make_works_through_the_generic_path():
    model = Decoder().train()
    blocks = find_blocks(model)
    assert blocks.names == ("stack.0", "stack.1", "stack.2")
    hidden, calls = capture(model, blocks, IDS)
    assert model.ended == 1  # the learning pass, which looks for blocks that are called again at the end
    with torch.no_grad():
        for block, call in zip(blocks.modules, calls, strict=True):
            hidden = run_block(block, hidden, call)
        expected = model.eval()(IDS)
    torch.testing.assert_close(model.head(model.norm(hidden)), expected)
    assert check_replay(model, blocks, IDS) == 0


def test_run_block_lets_gradients_through_without_dropout():
    block = Layer().train()
    hidden = torch.randn(2, 4, 16, requires_grad=True)
    _, calls = capture(model := Decoder(), find_blocks(model), IDS)
    one, two = run_block(block, hidden, calls[0]), run_block(block, hidden, calls[0])
    assert torch.equal(one, two) and block.training and block.dropout.training
    one.sum().backward()
    assert hidden.grad is not None and block.up.weight.grad is not None


def in_place(hidden):
    return hidden.mul_(2)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (lambda: Decoder(between=lambda hidden: hidden * 2), "changes the hidden states before `stack.1`"),
        (lambda: Decoder(between=in_place), "changes the hidden states before `stack.1`"),
        (lambda: Decoder(loops=2), "calls `stack.0` out of order or more than once"),
        (
            lambda: Decoder(nn.ModuleList([nn.Sequential(nn.Linear(16, 8)), Layer()])),
            "returns a tensor .* instead of hidden",
        ),
    ],
    ids=["between", "in-place", "looped", "other-shape"],
)
def test_a_model_that_does_more_than_call_its_blocks_in_order_is_refused(model, what):
    built = model()
    blocks = find_blocks(built)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(InputError, match=what):
            capture(built, blocks, IDS)


def test_shared_layers_of_albert_are_refused():
    config = transformers.AlbertConfig(
        hidden_size=16,
        embedding_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=64,
    )
    model = transformers.AlbertModel(config)
    with pytest.raises(InputError, match="more than once in a forward"):
        capture(model, find_blocks(model), IDS)


def test_blocks_that_share_keys_through_a_store_are_refused_and_the_same_family_without_sharing_works():
    settings = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "global_head_dim": 8,
        "vocab_size": 64,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    for sharing in (0, 2):
        config = transformers.Gemma4TextConfig(**settings, num_kv_shared_layers=sharing)
        model = transformers.Gemma4ForCausalLM(config)
        if sharing:
            with pytest.raises(InputError, match=r"`model.layers.2` of Gemma4ForCausalLM .* does not run alone"):
                capture(model, find_blocks(model), IDS)
        else:
            capture(model, find_blocks(model), IDS)
            assert check_replay(model, find_blocks(model), IDS) < 1e-5


class Whispering(Layer):
    """A layer that leaves something behind for the next one, outside all arguments."""

    said = 0.0

    def forward(self, hidden, **settings):
        answer = super().forward(hidden) + Whispering.said
        Whispering.said += 1.0
        return answer


def test_replay_finds_blocks_that_speak_to_each_other_in_other_ways():
    model = Decoder(nn.ModuleList([Whispering(), Whispering()]))
    with pytest.raises(InputError, match="run one by one, give other hidden states"):
        check_replay(model, find_blocks(model), IDS)


def test_replay_refuses_a_model_that_computes_nan(tiny_llama):
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericError, match="NaN or infinity"):
        check_replay(tiny_llama, find_blocks(tiny_llama), IDS)


@pytest.mark.parametrize(
    ("ids", "mask", "what"),
    [
        (IDS[0], None, r"integers \(batch, tokens\), got torch.int64 with shape \(10,\)"),
        (IDS.float(), None, "got torch.float32"),
        (IDS[:0], None, r"shape \(0, 10\)"),
        (IDS, torch.ones(3, 9), r"mask has shape \(3, 9\), the token ids have \(3, 10\)"),
        (IDS + 60, None, r"must lie in 0..63, got 6\d..1\d\d"),
        (IDS - 64, None, r"must lie in 0..63, got -6\d"),
    ],
)
def test_malformed_ids_are_refused(tiny_llama, ids, mask, what):
    with pytest.raises(InputError, match=what):
        capture(tiny_llama, find_blocks(tiny_llama), ids, mask)


def test_padding_is_refused_by_a_model_that_takes_no_mask():
    model = Decoder()
    with pytest.raises(InputError, match="takes no `attention_mask`"):
        capture(model, find_blocks(model), IDS, torch.ones_like(IDS))


def test_a_copy_of_a_block_runs_like_the_block(tiny_llama):
    blocks = find_blocks(tiny_llama)
    hidden, calls = capture(tiny_llama, blocks, IDS, torch.ones_like(IDS, dtype=torch.bool))
    work = copy.deepcopy(blocks.modules[0])
    torch.testing.assert_close(run_block(work, hidden, calls[0]), run_block(blocks.modules[0], hidden, calls[0]))


def test_half_precision_models_are_captured_in_the_compute_dtype_at_once(make_llama):
    model = make_llama().to(torch.bfloat16)
    blocks = find_blocks(model)
    keep = torch.ones_like(IDS)
    keep[0, :3] = 0
    hidden, calls = capture(model, blocks, IDS, keep, dtype=torch.float32)
    assert hidden.dtype == torch.bfloat16
    tensors = [call.tensors() for call in calls]
    assert {value.dtype for value in tensors[0].values() if value.is_floating_point()} == {torch.float32}
    assert all(tensors[0][path] is tensors[1][path] for path in tensors[0])  # shared by both blocks, cast once
    work = copy.deepcopy(blocks.modules[0]).float()
    assert run_block(work, hidden.float(), calls[0])[keep.bool()].isfinite().all()


def test_capture_under_inference_mode_works_too(tiny_llama):
    with torch.inference_mode():
        hidden, calls = capture(tiny_llama, find_blocks(tiny_llama), IDS)
    assert hidden.shape == (3, 10, 32) and len(calls) == 2
