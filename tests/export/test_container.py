"""The streaming writer: files the library reads, aligned, complete or refused."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from secateur.core.errors import StateError
from secateur.export.container import Slot, create
from secateur.models.safetensors_header import read_header

SLOTS = {
    "mask": Slot(torch.uint8, (3,)),
    "weight": Slot(torch.bfloat16, (2, 3)),
    "norm": Slot(torch.float32, (5,)),
    "none": Slot(torch.float32, (0, 4)),
    "count": Slot(torch.int64, ()),
}
VALUES = {
    name: (torch.arange(torch.Size(slot.shape).numel()) + 1).to(slot.dtype).reshape(slot.shape)
    for name, slot in SLOTS.items()
}


def test_the_library_reads_what_was_written_piece_by_piece_in_any_order(tmp_path):
    path = tmp_path / "file"
    with create(path, SLOTS, {"format": "test"}) as container:
        container.append("weight", VALUES["weight"][:1])
        for name in ("mask", "count", "none", "norm"):
            container.append(name, VALUES[name])
        container.append("weight", VALUES["weight"][1:])
    found = load_file(path)
    assert found.keys() == VALUES.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in VALUES.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "test"}


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path):
    path = tmp_path / "file"
    with create(path, SLOTS, {}) as container:
        for name, value in VALUES.items():
            container.append(name, value)
    header = read_header(path)
    assert header.data_start % 8 == 0
    assert all(stored.begin % SLOTS[name].dtype.itemsize == 0 for name, stored in header.tensors.items())


def test_a_tensor_longer_or_shorter_than_announced_is_refused(tmp_path):
    slots = {"weight": Slot(torch.float32, (4,))}
    with (
        pytest.raises(StateError, match=r"`weight` changed while it was written"),
        create(tmp_path / "long", slots, {}) as container,
    ):
        container.append("weight", torch.zeros(5))
    with (
        pytest.raises(StateError, match=r"`weight` changed.*4 bytes are missing"),
        create(tmp_path / "short", slots, {}) as container,
    ):
        container.append("weight", torch.zeros(3))
