"""The processes of one run."""

from __future__ import annotations

import torch

from secateur.cli import main
from secateur.core.processes import is_first, leave, process_count


def open_group() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def test_without_a_launcher_there_is_one_process_and_it_is_the_first(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert is_first()
    assert process_count() == 1


def test_a_launcher_says_how_many_there_are_and_which_this_is(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_first()
    assert process_count() == 2


def test_leaving_ends_the_group_and_nothing_where_there_is_none():
    leave()
    open_group()
    leave()
    assert not torch.distributed.is_initialized()
    leave()


def test_a_command_leaves_no_group_behind(capsys):
    open_group()
    assert main(["methods", "--json"]) == 0
    assert not torch.distributed.is_initialized()
    assert capsys.readouterr().out
