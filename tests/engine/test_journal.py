"""The journal: wherever a sweep stops, it goes on to the same bits."""

from __future__ import annotations

import json

import pytest
import torch

from secateur.core import faults
from secateur.core.errors import ResourceError, StateError
from secateur.core.mask import Masks
from secateur.engine.budget import assign
from secateur.engine.journal import Journal, generator_for
from secateur.engine.sweep import Sweep
from secateur.models.linears import find_all_linears


@pytest.fixture
def sweep_of(make_llama, ids, pruner):
    """A function that sweeps a fresh model with a journal in `folder` and returns its weights and report."""

    def run(folder, *, resume=False, error_correction=False, identity=None):
        model = make_llama(layers=3)
        journal = Journal(folder, identity or {"run": 1}, resume=resume) if folder is not None else None
        settings = Sweep(
            patterns=assign(model, "50%"), pruner=pruner, error_correction=error_correction, batch_tokens=48
        )
        try:
            report = settings.run(model, ids, journal=journal)
        finally:
            if journal is not None:
                journal.close(remove=False)
        return {linear.name: linear.read().clone() for linear in find_all_linears(model)}, report

    return run


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("error_correction", [False, True])
@pytest.mark.parametrize(
    "place",
    ["sweep.block:1", "sweep.block:3", "sweep.solve:9", "journal.write:4", "journal.rename:5", "journal.append:2"],
)
def test_a_sweep_that_failed_anywhere_goes_on_to_the_same_bits(
    sweep_of, tmp_path, monkeypatch, place, error_correction
):
    expected, whole = sweep_of(None, error_correction=error_correction)
    faults.forget()
    monkeypatch.setenv("SECATEUR_FAULT", f"{place}:raise")
    with pytest.raises(faults.InjectedError):
        sweep_of(tmp_path / "state", error_correction=error_correction)
    monkeypatch.delenv("SECATEUR_FAULT")
    resumed, report = sweep_of(tmp_path / "state", resume=True, error_correction=error_correction)
    assert same(expected, resumed)
    assert [layer.name for block in report.blocks for layer in block.layers] == [
        layer.name for block in whole.blocks for layer in block.layers
    ]
    assert all(torch.equal(whole.masks[name], report.masks[name]) for name in whole.masks)


def test_a_sweep_that_goes_on_counts_the_time_of_what_was_finished(sweep_of, tmp_path, monkeypatch):
    faults.forget()
    monkeypatch.setenv("SECATEUR_FAULT", "sweep.block:3:raise")
    with pytest.raises(faults.InjectedError):
        sweep_of(tmp_path / "state")
    monkeypatch.delenv("SECATEUR_FAULT")
    _, report = sweep_of(tmp_path / "state", resume=True)
    assert report.earlier_seconds == sum(block.seconds for block in report.blocks[:2])
    assert report.earlier_seconds > 0
    assert sweep_of(None)[1].earlier_seconds == 0


def test_a_full_disk_is_named_and_leaves_finished_blocks(sweep_of, tmp_path, monkeypatch):
    faults.forget()
    monkeypatch.setenv("SECATEUR_FAULT", "journal.write:5:enospc")
    with pytest.raises(ResourceError, match=r"bytes\) could not be written"):
        sweep_of(tmp_path / "state")
    monkeypatch.delenv("SECATEUR_FAULT")
    assert not list((tmp_path / "state").glob("*.tmp"))
    assert same(sweep_of(None)[0], sweep_of(tmp_path / "state", resume=True)[0])


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "hidden"])
def test_a_damaged_file_is_found_by_its_hash_and_its_block_done_again(sweep_of, tmp_path, monkeypatch, damage):
    state = tmp_path / "state"
    faults.forget()
    monkeypatch.setenv("SECATEUR_FAULT", "sweep.block:3:raise")
    with pytest.raises(faults.InjectedError):
        sweep_of(state)
    monkeypatch.delenv("SECATEUR_FAULT")
    victim = next(state.glob("hidden-*")) if damage == "hidden" else state / "block-0001.safetensors"
    content = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "delete":
        victim.unlink()
    else:
        content[-3] ^= 1
        victim.write_bytes(content)
    resumed, report = sweep_of(state, resume=True)
    assert same(sweep_of(None)[0], resumed)
    assert bool(report.warnings) == (damage != "hidden")


def test_a_torn_last_line_is_ignored(sweep_of, tmp_path):
    state = tmp_path / "state"
    expected, _ = sweep_of(state)
    lines = (state / "journal.jsonl").read_bytes()
    (state / "journal.jsonl").write_bytes(lines[:-40])
    assert same(expected, sweep_of(state, resume=True)[0])


def test_another_identity_is_refused_and_named(sweep_of, tmp_path):
    sweep_of(tmp_path / "state", identity={"pattern": "50%", "seed": 0})
    with pytest.raises(StateError, match=r"pattern: '50%' then, '60%' now") as error:
        sweep_of(tmp_path / "state", resume=True, identity={"pattern": "60%", "seed": 0})
    assert "--overwrite" in error.value.hint


def test_an_earlier_state_needs_resume(sweep_of, tmp_path):
    sweep_of(tmp_path / "state")
    with pytest.raises(StateError, match="unfinished run"):
        sweep_of(tmp_path / "state")


def test_two_runs_on_one_state_conflict_at_once(tmp_path):
    first = Journal(tmp_path / "state", {"run": 1}, resume=False)
    with pytest.raises(StateError, match="another process"):
        Journal(tmp_path / "state", {"run": 1}, resume=True)
    first.close(remove=True)
    assert not (tmp_path / "state").exists()


def test_only_the_last_hidden_states_are_kept(sweep_of, tmp_path):
    sweep_of(tmp_path / "state")
    assert [file.name for file in (tmp_path / "state").glob("hidden-*")] == ["hidden-0003.safetensors"]
    assert json.loads((tmp_path / "state" / "identity.json").read_text())["run"] == 1


def test_masks_come_back_from_the_journal(tmp_path):
    journal = Journal(tmp_path / "state", {}, resume=False)
    mask = torch.rand(5, 11, generator=torch.Generator().manual_seed(0)) > 0.5
    journal.add({"w": torch.ones(5, 11)}, Masks({"a.b": mask}), {"index": 0}, {"sparse": [torch.zeros(1, 2, 3)]})
    journal.close(remove=False)
    journal = Journal(tmp_path / "state", {}, resume=True)
    assert torch.equal(journal.read(0).masks["a.b"], mask)
    journal.close(remove=True)


def test_randomness_depends_on_seed_block_and_purpose_alone():
    draws = {
        torch.rand(1, generator=generator_for(*key)).item()
        for key in [(0, 0, "tune"), (0, 1, "tune"), (1, 0, "tune"), (0, 0, "x")]
    }
    assert len(draws) == 4
    assert torch.equal(
        torch.rand(3, generator=generator_for(0, 1, "a")), torch.rand(3, generator=generator_for(0, 1, "a"))
    )
