"""Block calls: cut into sequences, moved, shared between batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.core.errors import InputError
from secateur.models.blocks import find_blocks
from secateur.models.calls import BlockCall, cast, settle
from secateur.models.skeleton import capture


def test_rows_cut_only_where_the_sequences_lie():
    mask, positions = torch.rand(4, 1, 4, 4), torch.rand(1, 4, 8)
    heads = torch.arange(4 * 3).reshape(12, 1)  # three entries for each sequence
    call = BlockCall(
        (heads,),
        {"mask": mask, "rope": (positions, positions), "flag": True},
        {
            ("args", 0): (0, 3),
            ("kwargs", "mask"): (0, 1),
        },
    )
    some = call.rows(slice(1, 3), 4)
    assert torch.equal(some.args[0], heads[3:9])
    assert torch.equal(some.kwargs["mask"], mask[1:3])
    assert torch.equal(some.kwargs["rope"][0], positions) and some.kwargs["flag"] is True
    assert call.rows(None, 4) is call


@given(batch=st.integers(2, 5), each=st.integers(1, 4), dimension=st.integers(0, 2), data=st.data())
def test_parts_of_a_call_make_up_the_whole(batch, each, dimension, data):
    shape = [2, 3]
    shape.insert(dimension, batch * each)
    tensor = torch.arange(float(6 * batch * each)).reshape(shape)
    call = BlockCall((tensor,), {}, {("args", 0): (dimension, each)})
    at = data.draw(st.integers(1, batch - 1))
    parts = [call.rows(part, batch).args[0] for part in (slice(0, at), slice(at, batch))]
    assert torch.equal(torch.cat(parts, dimension), tensor)


def test_without_axes_a_first_dimension_of_the_batch_counts():
    call = BlockCall((torch.rand(3, 2), torch.rand(1, 3), torch.tensor(1.0)))
    some = call.rows(slice(0, 2), 3)
    assert [tuple(tensor.shape) for tensor in some.args] == [(2, 2), (1, 3), ()]


def test_only_floating_tensors_change_dtype():
    call = BlockCall((torch.ones(2, dtype=torch.long), torch.ones(2, dtype=torch.bool)), {"x": [torch.ones(2)], "n": 3})
    moved = call.to("cpu", torch.float64)
    assert [tensor.dtype for tensor in moved.args] == [torch.long, torch.bool]
    assert moved.kwargs["x"][0].dtype == torch.float64 and moved.kwargs["n"] == 3
    assert call.kwargs["x"][0].dtype == torch.float32


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_the_lowest_number_in_a_mask_stays_finite_in_a_narrower_dtype(narrow):
    mask = torch.tensor([0.0, torch.finfo(torch.float32).min, float("-inf")])
    assert cast(mask, None, narrow).tolist() == [0.0, torch.finfo(narrow).min, float("-inf")]


def test_casting_does_not_write_out_what_expand_repeats():
    mask = torch.zeros(1, 1, 8, 8).expand(16, 1, 8, 8)
    moved = cast(mask, "cpu", torch.bfloat16)
    assert moved.shape == mask.shape and moved.untyped_storage().nbytes() == 8 * 8 * 2


def test_fresh_containers_keep_writes_of_a_block_out():
    call = BlockCall(([torch.ones(1)],), {"store": {}, "inner": {"x": torch.ones(1)}})
    own = call.fresh()
    own.kwargs["store"]["keys"] = 1
    own.kwargs["inner"]["x"] = None
    own.args[0].append(2)
    assert call.kwargs["store"] == {} and call.kwargs["inner"]["x"] is not None and len(call.args[0]) == 1
    assert call.has_store() and not BlockCall((1, None), {"x": {"y": 1}}).has_store()


def test_objects_that_hide_tensors_are_refused():
    class Hidden:
        def __init__(self):
            self.rows = torch.ones(3)

    with pytest.raises(InputError, match="called with a `Hidden`, which cannot be cut") as caught:
        BlockCall((), {"mask": Hidden()}).fresh()
    assert "sdpa" in str(caught.value.hint)
    module = nn.Linear(1, 1)
    assert BlockCall((module,)).fresh().args[0] is module


def test_sequences_that_are_not_one_after_the_other_are_refused():
    calls = [BlockCall((torch.arange(6.0),))]
    probes = [BlockCall((torch.tensor([0.0, 1, 2, 0, 3, 4, 5, 3]),))]  # head after head, not sequence after sequence
    with pytest.raises(InputError, match=r"argument `0` of `layers.0`.*cannot be cut into 3 sequences") as caught:
        settle(["layers.0"], calls, probes, 3, None, None)
    assert "batch_size: 1" in str(caught.value.hint)
    odd = [BlockCall((torch.zeros(5),))]
    with pytest.raises(InputError, match="cannot be cut"):
        settle(["layers.0"], [BlockCall((torch.zeros(4),))], odd, 3, None, None)
    with pytest.raises(InputError, match="depend on the number of sequences"):
        settle(["layers.0"], calls, [BlockCall((None,))], 3, None, None)


def test_masks_without_padding_take_the_memory_of_one_sequence(make_llama, make_ids):
    model = make_llama(attn_implementation="eager")
    _, calls = capture(model, find_blocks(model), make_ids(4, 16))
    mask = calls[0].kwargs["attention_mask"]
    assert mask.shape == (4, 1, 16, 16)
    assert mask.untyped_storage().nbytes() == 16 * 16 * 4
    assert calls[0].to("cpu", torch.float64).kwargs["attention_mask"].untyped_storage().nbytes() == 16 * 16 * 8
    assert calls[0].rows(slice(1, 3), 4).kwargs["attention_mask"].shape == (2, 1, 16, 16)


def test_batches_share_what_is_equal(make_llama, make_ids):
    model = make_llama(attn_implementation="eager")
    blocks = find_blocks(model)
    keep = torch.ones(4, 16)
    keep[0, :2] = 0
    _, first = capture(model, blocks, make_ids(4, 16, seed=1))
    _, second = capture(model, blocks, make_ids(4, 16, seed=2), like=first)
    _, padded = capture(model, blocks, make_ids(4, 16, seed=3), keep, like=first)
    for index in range(2):
        one, two, three = (calls[index].tensors() for calls in (first, second, padded))
        assert one and all(two[path] is one[path] for path in one)
        assert three[("kwargs", "attention_mask")] is not one[("kwargs", "attention_mask")]
        assert all(three[path] is one[path] for path in one if "position_embeddings" in path)
