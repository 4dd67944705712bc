"""The summary: patterns named as they are, sparsity counted exactly, sizes that the formats then have."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import InputError
from secateur.core.pattern import NM, parse_pattern
from secateur.export.bitmask import WEIGHTS, write
from secateur.export.summary import fits_kernels, inspect, pattern_of
from secateur.models.linears import find_all_linears


def score(rows=32, columns=96, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


def prune(model, pattern, scope="row"):
    for view in find_all_linears(model):
        weight = view.read()
        view.write(weight.masked_fill(~parse_pattern(pattern).mask(weight.abs(), scope), 0))


@pytest.mark.parametrize("pattern", ["1:2", "1:4", "2:4", "3:4", "1:8", "2:8", "4:8", "7:8", "8:16", "5:16", "16:32"])
def test_a_semi_structured_mask_is_named(pattern):
    assert pattern_of(parse_pattern(pattern).mask(score())) == pattern


@given(n=st.integers(1, 15), width=st.sampled_from([2, 4, 8, 16]), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_the_named_pattern_holds_and_is_at_least_as_tight_as_the_one_made(n, width, seed):
    if n >= width:
        n %= width
    if n == 0:
        return
    mask = NM(n, width).mask(score(16, 64, seed))
    found = parse_pattern(pattern_of(mask))
    assert isinstance(found, NM)
    assert int(mask.reshape(-1, found.m).sum(1).max()) == found.n
    assert found.n / found.m <= n / width


def test_a_few_more_zeros_do_not_hide_the_pattern():
    mask = NM(2, 4).mask(score())
    mask[:, 0] = False
    assert pattern_of(mask) == "2:4"


@pytest.mark.parametrize(
    ("pattern", "scope", "name"),
    [
        ("50%", "row", "row-uniform"),
        ("50%", "layer", "unstructured"),
        ("98%", "layer", "unstructured"),
        ("97%", "row", "row-uniform"),
        ("0%", "row", "dense"),
    ],
)
def test_an_unstructured_mask_is_told_by_its_rows(pattern, scope, name):
    assert pattern_of(parse_pattern(pattern).mask(score(), scope)) == name


def test_rounding_zeros_are_not_pruning_and_an_empty_matrix_is_no_pattern():
    mask = torch.ones(32, 96, dtype=torch.bool)
    mask[3, 5] = False
    assert pattern_of(mask) == "dense"
    assert pattern_of(torch.zeros_like(mask)) == "row-uniform"


@pytest.mark.parametrize(
    ("shape", "pattern", "fits"),
    [((16, 32), "2:4", True), ((16, 32), "1:4", True), ((16, 32), "3:4", False), ((8, 32), "2:4", False)],
)
def test_kernels_want_two_of_four_in_multiples_of_sixteen(shape, pattern, fits):
    assert fits_kernels(parse_pattern(pattern).mask(score(*shape))) is fits


def test_a_pruned_model_is_summed_up(tiny_llama):
    prune(tiny_llama, "2:4")
    found = inspect(tiny_llama, "tiny")
    assert json.loads(json.dumps(found)) == found
    assert found["model"] == "tiny"
    assert found["sparsity"] == 0.5
    assert found["dtype"] == "float32"
    assert found["formats"]["2:4"] == {"possible": True, "linears": 14, "of": 14}
    assert found["linears"][0] == {
        "name": "model.layers.0.self_attn.q_proj",
        "block": 0,
        "shape": [32, 32],
        "sparsity": 0.5,
        "pattern": "2:4",
    }
    assert {line["pattern"] for line in found["linears"]} == {"2:4"}


def test_a_dense_model_is_dense_and_packing_would_not_help(tiny_llama):
    found = inspect(tiny_llama)
    assert "model" not in found
    assert found["sparsity"] == 0
    assert {line["pattern"] for line in found["linears"]} == {"dense"}
    assert found["formats"]["bitmask"]["ratio"] == 1
    assert found["formats"]["2:4"]["possible"] is False


def test_sizes_are_those_of_the_files_and_tied_weights_count_once(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    prune(model, "50%")
    found = inspect(model)
    assert found["dtype"] == "bfloat16"
    assert found["bytes"] == sum(value.nbytes for value in model.parameters())
    write(model, None, tmp_path, None)
    header = int.from_bytes((tmp_path / WEIGHTS).read_bytes()[:8], "little") + 8
    assert found["formats"]["bitmask"]["bytes"] == (tmp_path / WEIGHTS).stat().st_size - header


def test_transposed_linears_are_read_along_their_inputs():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32))
    prune(model, "1:4")
    lines = inspect(model)["linears"]
    assert {line["pattern"] for line in lines} == {"1:4"}
    assert lines[0]["shape"] == [96, 32]


def test_nothing_is_changed(tiny_llama):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    inspect(tiny_llama)
    assert all(torch.equal(before[name], value) for name, value in tiny_llama.state_dict().items())


def test_a_model_without_weights_is_refused(tiny_llama):
    with pytest.raises(InputError, match="is not in memory"):
        inspect(tiny_llama.to("meta"))
