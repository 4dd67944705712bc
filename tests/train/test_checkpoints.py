"""Checkpoints count once they are sealed, and a full disk is known by its number, not by somebody's words."""

from __future__ import annotations

import errno
import os
import shutil
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from secateur.train.checkpoints import WHOLE, Sealed, full_disk, last_whole

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
TORCH = "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"


def caused(error, cause=None, context=None):
    error.__cause__, error.__context__ = cause, context
    return error


def test_the_last_whole_checkpoint_is_the_sealed_one_with_the_most_steps(tmp_path):
    assert last_whole(tmp_path / "nowhere") is None
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}" / "shards").mkdir(parents=True)
        (tmp_path / f"checkpoint-{step}" / "shards" / "0").write_text("part")
    (tmp_path / "checkpoint-x").mkdir()
    assert last_whole(tmp_path) is None
    arguments = SimpleNamespace(output_dir=str(tmp_path))
    for step in (9, 10):
        Sealed().on_save(arguments, SimpleNamespace(global_step=step, is_world_process_zero=True), None)
    Sealed().on_save(arguments, SimpleNamespace(global_step=11, is_world_process_zero=False), None)
    assert last_whole(tmp_path).name == "checkpoint-10"
    assert not (tmp_path / "checkpoint-11" / WHOLE).exists()


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, "over the quota"),
        caused(ValueError("a library's own"), cause=FULL),
        caused(ValueError("a library's own"), context=caused(KeyError("x"), context=FULL)),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        SafetensorError("I/O error: File too large (os error 27)"),
        caused(ValueError("a library's own"), cause=SafetensorError("No space left on device")),
        RuntimeError("No space left on device"),
    ],
    ids=repr,
)
def test_a_full_disk_is_found_wherever_it_is_said(error, tmp_path):
    assert full_disk(error, tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("the text says: No space left on device"),
        OSError(errno.EACCES, "Permission denied"),
        RuntimeError(TORCH),  # the disk has space
        SafetensorError("header too large"),
        SafetensorError("I/O error: Permission denied (os error 13)"),
    ],
    ids=repr,
)
def test_other_errors_are_not_taken_for_a_full_disk(error, tmp_path):
    assert not full_disk(error, tmp_path)


def test_a_failed_write_of_torch_is_a_full_disk_if_the_disk_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=0 if place == tmp_path else 2**40))
    assert full_disk(RuntimeError(TORCH), tmp_path / "not" / "there")
    assert not full_disk(RuntimeError("CUDA out of memory"), tmp_path)


def test_errors_that_name_each_other_are_looked_at_once(tmp_path):
    one, other = ValueError("one"), ValueError("other")
    one.__context__, other.__context__ = other, one
    assert not full_disk(one, tmp_path)
