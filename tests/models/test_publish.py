"""Outputs appear whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from secateur.core import faults
from secateur.core.errors import ResourceError, StateError
from secateur.core.fetch import file_sha256, locked
from secateur.models import publish as module
from secateur.models.publish import is_complete, publish, read_manifest, recover

PLACES = ["publish.begin", "publish.sync", "publish.manifest", "publish.aside", "publish.rename", "publish.remove"]


@pytest.fixture(autouse=True)
def no_faults(monkeypatch):
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    faults.forget()
    yield
    faults.forget()


def make(output: Path, content: str = "new", overwrite: bool = False) -> None:
    with publish(output, overwrite) as folder:
        (folder / "model.safetensors").write_text(content)
        (folder / "deep").mkdir()
        (folder / "deep" / "masks.bin").write_text(content)


def read(output: Path) -> str:
    return (output / "model.safetensors").read_text()


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_an_output_appears_with_its_manifest(tmp_path):
    make(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["deep", "manifest.json", "model.safetensors"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["files"].keys() == {"model.safetensors", "deep/masks.bin"}
    line = manifest["files"]["model.safetensors"]
    assert line == {"size": 3, "sha256": file_sha256(tmp_path / "out" / "model.safetensors")}
    assert is_complete(tmp_path / "out")


def test_equal_runs_give_equal_bytes(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b")
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


def test_parents_are_made_and_an_empty_folder_is_taken(tmp_path):
    make(tmp_path / "a" / "b" / "out")
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    assert read(tmp_path / "a" / "b" / "out") == read(tmp_path / "empty") == "new"


def test_a_relative_output_stays_put_when_the_working_folder_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    with publish(Path("out"), False) as folder:
        monkeypatch.chdir(tmp_path / "other")
        (folder / "x").write_text("x")
    assert (tmp_path / "out" / "x").exists()


def test_an_existing_output_needs_overwrite(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(StateError, match="exists") as caught:
        make(tmp_path / "out")
    assert caught.value.hint is not None and "--overwrite" in caught.value.hint
    assert read(tmp_path / "out") == "old"
    make(tmp_path / "out", "new", overwrite=True)
    assert read(tmp_path / "out") == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("manifest", [None, "{}", "[]", '{"format": "another"}', "[" * 10_000])
def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path, manifest):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("ten years of work")
    if manifest is not None:
        (tmp_path / "home" / "manifest.json").write_text(manifest)
    with pytest.raises(StateError, match="holds files that are no earlier output"):
        make(tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "ten years of work"
    assert names(tmp_path) == ["home"]


def test_files_and_links_are_never_replaced(tmp_path):
    (tmp_path / "file").write_text("x")
    make(tmp_path / "out", "old")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "dangling", "out/.."):
        with pytest.raises(StateError):
            make(tmp_path / name, overwrite=True)
    assert read(tmp_path / "out") == "old"
    assert names(tmp_path) == ["dangling", "file", "link", "out"]


def test_an_error_in_the_work_changes_nothing(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(KeyError), publish(tmp_path / "out", True) as folder:
        (folder / "half").write_text("x")
        raise KeyError("bug")
    assert read(tmp_path / "out") == "old"
    assert names(tmp_path) == ["out"]


def test_an_error_that_is_not_of_the_disk_keeps_its_class(tmp_path):
    with pytest.raises(FileNotFoundError), publish(tmp_path / "out", False):
        (tmp_path / "none").read_text()
    assert names(tmp_path) == []


def test_two_runs_on_one_output_conflict_at_once(tmp_path):
    with publish(tmp_path / "out", False) as folder:
        (folder / "x").write_text("first")
        with pytest.raises(StateError, match="in use by another run"):
            make(tmp_path / "out")
        assert (folder / "x").read_text() == "first"
    assert (tmp_path / "out" / "x").read_text() == "first"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("action", ["raise", "enospc"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_fault_leaves_the_old_or_the_new_output_whole(tmp_path, monkeypatch, place, action, existing):
    if existing:
        make(tmp_path / "out", "old")
    monkeypatch.setenv(faults.VARIABLE, f"{place}:1:{action}")
    if place == "publish.aside" and not existing:
        make(tmp_path / "out")
    else:
        wanted = ResourceError if action == "enospc" else faults.InjectedError
        with pytest.raises(wanted):
            make(tmp_path / "out", overwrite=True)
    done = place == "publish.remove" or (place == "publish.aside" and not existing)
    assert names(tmp_path) == (["out"] if existing or done else [])
    if existing or done:
        assert read(tmp_path / "out") == ("new" if done else "old")
        assert is_complete(tmp_path / "out")


# the state after SIGKILL: what is under the name, and what the next run finds
@pytest.mark.parametrize(
    ("place", "left", "recovered"),
    [
        ("publish.begin", "old", "old"),
        ("publish.sync", "old", "old"),
        ("publish.manifest", "old", "old"),
        ("publish.aside", "old", "old"),
        ("publish.rename", None, "new"),
        ("publish.remove", "new", "new"),
    ],
)
def test_a_killed_process_leaves_a_state_that_the_next_call_tidies_up(tmp_path, place, left, recovered):
    make(tmp_path / "out", "old")
    code = f"""
from pathlib import Path
from secateur.models.publish import publish
with publish(Path({str(tmp_path / "out")!r}), True) as folder:
    (folder / "model.safetensors").write_text("new")
"""
    environment = {**os.environ, faults.VARIABLE: f"{place}:1:kill"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    if left is None:
        assert not (tmp_path / "out").exists()
    else:
        assert read(tmp_path / "out") == left and is_complete(tmp_path / "out")
    recover(tmp_path / "out")
    assert read(tmp_path / "out") == recovered and is_complete(tmp_path / "out")
    assert names(tmp_path) in (["out"], [".out.lock", "out"])  # a dead run's lock file is taken over by the next
    make(tmp_path / "out", "newest", overwrite=True)
    assert read(tmp_path / "out") == "newest"
    assert names(tmp_path) == ["out"]


def test_the_old_output_comes_back_when_the_new_one_is_damaged(tmp_path):
    make(tmp_path / "out", "old")
    make(tmp_path / "fresh", "new")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    (tmp_path / "fresh").rename(tmp_path / ".out.new")
    os.truncate(tmp_path / ".out.new" / "model.safetensors", 1)
    recover(tmp_path / "out")
    assert read(tmp_path / "out") == "old"
    assert names(tmp_path) == ["out"]


def test_recovering_nothing_does_nothing(tmp_path):
    make(tmp_path / "out", "old")
    recover(tmp_path / "out")
    recover(tmp_path / "none")
    assert names(tmp_path) == ["out"] and read(tmp_path / "out") == "old"


def test_recovering_waits_for_nobody(tmp_path):
    (tmp_path / ".out.new").mkdir()
    with locked(tmp_path / ".out"), pytest.raises(StateError, match="in use"):
        recover(tmp_path / "out")


def save_tensor(path, data):
    save_file({"x": torch.frombuffer(bytearray(data), dtype=torch.uint8)}, path)


@pytest.mark.parametrize(("write", "written"), [(Path.write_bytes, "1,500"), (save_tensor, "500")])
def test_a_file_size_limit_is_told_with_path_and_bytes(tmp_path, write, written):
    make(tmp_path / "out", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(ResourceError) as caught, publish(tmp_path / "out", True) as folder:
            (folder / "small").write_text("x" * 500)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
            write(folder / "big", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"`{tmp_path / 'out'}` cannot be written: File too large" in str(caught.value)
    assert f"({written} bytes were written" in str(caught.value)
    assert read(tmp_path / "out") == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_read_only_target_is_told(tmp_path, monkeypatch, number):
    def refuse(self, *args, **kwargs):
        raise OSError(number, os.strerror(number), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(ResourceError, match="cannot be written") as caught:
            make(tmp_path / "out")
    assert str(tmp_path) in str(caught.value) and caught.value.hint is not None
    assert names(tmp_path) == []


def test_a_target_below_a_file_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot be written"):
        make(tmp_path / "file" / "out")


@pytest.mark.parametrize("damage", ["size", "gone", "line"])
def test_an_incomplete_output_is_noticed(tmp_path, damage):
    make(tmp_path / "out")
    assert read_manifest(tmp_path) is None and not is_complete(tmp_path)
    if damage == "size":
        os.truncate(tmp_path / "out" / "model.safetensors", 0)
    elif damage == "gone":
        (tmp_path / "out" / "deep" / "masks.bin").unlink()
    else:
        (tmp_path / "out" / "manifest.json").write_text(
            json.dumps({"format": module.FORMAT, "files": {"model.safetensors": 3}})
        )
    assert not is_complete(tmp_path / "out")
