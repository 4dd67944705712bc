"""The folders of a fine-tuning: where it must not write, what it keeps while it is not finished, what it publishes."""

from __future__ import annotations

import contextlib
import shutil

import pytest

import secateur
from conftest import TINY_TRAINED
from secateur.core.errors import StateError
from secateur.models.publish import publish
from secateur.recipe.finetune_folder import CHECKPOINTS, is_done, refuse_output, unfinished
from secateur.recipe.job import digest_of
from secateur.train.checkpoints import WHOLE

IDENTITY = {"stage": "finetune", "seed": 0}


def begin(target, main=True, resume=False, overwrite=False):
    return unfinished(target, IDENTITY, resume=resume, overwrite=overwrite, main=main)


def write_checkpoint(folder):
    (folder / CHECKPOINTS / "checkpoint-1").mkdir(parents=True)
    (folder / CHECKPOINTS / "checkpoint-1" / WHOLE).touch()


def test_an_output_that_would_take_the_place_of_the_model_is_refused_before_training(tmp_path):
    model = shutil.copytree(TINY_TRAINED, tmp_path / "a" / "model")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    for output in (model, model / "inside", tmp_path / "foreign", tmp_path / "foreign" / "file" / "below"):
        with pytest.raises(StateError, match="the output"):
            secateur.finetune(str(model), data="nowhere", output=output, overwrite=True)
    assert (model / "model.safetensors").is_file()
    assert not (model / "inside").exists()
    refuse_output(None, model)
    refuse_output(tmp_path / "new", model)


def test_a_finished_run_leaves_no_state(tmp_path):
    with begin(tmp_path / "out") as folder:
        write_checkpoint(folder)
    assert not folder.exists()
    with begin(None) as nothing:
        assert nothing is None


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_that_fails_leaves_its_state_if_it_can_be_gone_on_from(tmp_path, whole):
    with contextlib.suppress(KeyError), begin(tmp_path / "out") as folder:
        if whole:
            write_checkpoint(folder)
        raise KeyError
    assert folder.exists() == whole
    if whole:
        with pytest.raises(StateError), begin(tmp_path / "out"):
            pass
        with begin(tmp_path / "out", resume=True) as again:
            assert (again / CHECKPOINTS / "checkpoint-1").exists()


def test_a_process_that_is_not_the_first_touches_nothing(tmp_path):
    with begin(tmp_path / "out", main=False) as folder:
        assert list(tmp_path.iterdir()) == []
    with contextlib.suppress(KeyError), begin(tmp_path / "out") as first:
        write_checkpoint(first)
        raise KeyError
    with begin(tmp_path / "out", main=False, overwrite=True) as folder:
        assert folder == first
    assert folder.exists()


def test_an_output_is_done_if_the_very_same_run_made_it(tmp_path):
    assert not is_done(tmp_path / "out", IDENTITY)
    with publish(tmp_path / "out", overwrite=False) as folder:
        (folder / "secateur.json").write_text(f'{{"run": "{digest_of(IDENTITY)}"}}')
    assert is_done(tmp_path / "out", IDENTITY)
    assert not is_done(tmp_path / "out", {**IDENTITY, "seed": 1})
