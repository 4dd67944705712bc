"""How an output folder comes to be: whole, under its name, or not at all.

The work is done in a hidden sibling `.<name>.new`. When it is complete, every file is flushed to disk, `manifest.json`
(size and sha256 of each file) is written last, and the folder is renamed to its name. An earlier output is renamed to
`.<name>.old` first and removed afterwards. So at any instant the name is absent, the old complete output, or the new.

A process that dies leaves at most those two siblings; the next `publish` (or `recover`) of the same output tidies up:

| found | means died | done |
|---|---|---|
| `.new`, no `.old` | while working | `.new` is removed |
| `.old`, `.new`, no output | between the two renames | `.new` is complete and becomes the output, `.old` is removed |
| `.old`, no output, `.new` missing or damaged | (disk fault) | `.old` becomes the output again |
| `.old` beside the output | before the old one was removed | `.old` is removed |

The lock `.<name>.lock` keeps two processes from publishing to one name; it is held for the whole `with` block.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from secateur.core import faults
from secateur.core.errors import InputError, ResourceError, StateError
from secateur.core.fetch import file_sha256, locked, sync_folder, unwritable

MANIFEST = "manifest.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
FORMAT = "secateur output"

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # no space for what is written, one way or another
_DISK_ERRORS = FULL | {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


@contextmanager
def publish(output: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty temporary folder, and give it the name `output` when the `with` block ends without an error.

    On an error, or if the process dies, an earlier output stays as it was.

    Args:
        output: folder to make; missing parents are made too.
        overwrite: replace an earlier output of this library. Anything else is never replaced, an empty folder always.

    Raises:
        StateError: `output` exists and may not be replaced, or another process is publishing it.
        ResourceError: the disk is full or read-only; names the path and the bytes.
    """
    output = output.absolute()  # a later change of the working folder must not move the output
    _refuse(output, overwrite)  # before a lock is written anywhere
    with locked(output.with_name(f".{output.name}"), wait=False):
        recover_held(output)
        _refuse(output, overwrite)
        fresh = _fresh(output)
        try:
            faults.hit("publish.begin")
            fresh.mkdir(parents=True)
            yield fresh
            _seal(fresh)
            _swap(fresh, output)
        except (OSError, SafetensorError) as error:
            found = as_os_error(error)
            if found is None or found.errno not in _DISK_ERRORS:
                raise
            raise _disk_error(output, fresh, found) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            if output.exists():
                shutil.rmtree(_aside(output), ignore_errors=True)


def as_os_error(error: BaseException) -> OSError | None:
    """Return `error` if the system raised it, or the system's error that safetensors has put into words; else None."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return None if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


def recover(output: Path) -> None:
    """Tidy up after a process that died while publishing `output`; see the table above. Does nothing otherwise.

    Raises:
        StateError: another process is publishing it now.
    """
    output = output.absolute()
    if _fresh(output).exists() or _aside(output).exists():
        with locked(output.with_name(f".{output.name}"), wait=False):
            recover_held(output)


def recover_held(output: Path) -> None:
    """Do what `recover` does, for a caller that holds the lock."""
    fresh, aside = _fresh(output), _aside(output)
    if aside.exists():
        if not output.exists():
            (fresh if is_complete(fresh) else aside).replace(output)
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(fresh, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder that `publish` made, or None if it is not one."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("files"), dict):
        return None
    return found


def refuse_other_tokenizer(folder: Path) -> None:
    """Raise if the tokenizer in a published folder is not the one it was published with: ids would mean other words.

    Raises:
        InputError: naming the file that changed.
    """
    manifest = read_manifest(folder)
    for name in TOKENIZER_FILES if manifest is not None else ():
        line = manifest["files"].get(name) if manifest is not None else None
        if not isinstance(line, dict) or not (folder / name).is_file():
            continue
        if file_sha256(folder / name) != line.get("sha256"):
            raise InputError(
                f"`{name}` in `{folder}` is not the one that the model was published with",
                hint=f"put it back, or delete `{MANIFEST}` to accept the new one",
            )


def is_complete(folder: Path) -> bool:
    """Return whether `folder` has its manifest and every file of it in full size; contents are not read."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    try:
        return all((folder / name).stat().st_size == line["size"] for name, line in manifest["files"].items())
    except (OSError, TypeError, KeyError):
        return False


def _fresh(output: Path) -> Path:
    return output.with_name(f".{output.name}.new")


def _aside(output: Path) -> Path:
    return output.with_name(f".{output.name}.old")


def _refuse(output: Path, overwrite: bool) -> None:
    """Raise if `output` exists and may not be replaced."""
    if output.name in ("", ".."):
        raise StateError(f"the output `{output}` is not a folder that can be made", hint="choose another output")
    if not output.exists() and not output.is_symlink():
        return
    if output.is_symlink() or not output.is_dir():
        raise StateError(
            f"the output `{output}` exists and is not a folder", hint="choose another output; nothing was changed"
        )
    try:
        empty = next(output.iterdir(), None) is None
    except OSError as error:
        raise unwritable(output, error) from error
    if empty:
        return
    if not overwrite:
        raise StateError(f"the output `{output}` exists", hint="choose another output, or replace it with --overwrite")
    if read_manifest(output) is None:
        raise StateError(
            f"the output `{output}` holds files that are no earlier output (there is no `{MANIFEST}` of ours)",
            hint="choose another output, or move its files away yourself; --overwrite replaces only earlier outputs",
        )


def _seal(fresh: Path) -> None:
    """Flush every file of the folder and write the manifest last."""
    lines: dict[str, dict[str, Any]] = {}
    for file in sorted(path for path in fresh.rglob("*") if path.is_file()):
        faults.hit("publish.sync")
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        lines[file.relative_to(fresh).as_posix()] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    faults.hit("publish.manifest")
    with (fresh / MANIFEST).open("w", encoding="utf-8") as opened:
        json.dump({"format": FORMAT, "version": 1, "files": lines}, opened, indent=1)
        opened.write("\n")
        opened.flush()
        os.fsync(opened.fileno())
    for folder in [fresh, *(path for path in fresh.rglob("*") if path.is_dir())]:
        sync_folder(folder)


def _swap(fresh: Path, output: Path) -> None:
    """Rename the finished folder into place, an earlier output aside and away."""
    aside = _aside(output)
    if output.exists():
        faults.hit("publish.aside")
        output.replace(aside)
    try:
        faults.hit("publish.rename")
        fresh.replace(output)
    except BaseException:
        if aside.exists() and not output.exists():
            aside.replace(output)
        raise
    sync_folder(output.parent)
    faults.hit("publish.remove")
    shutil.rmtree(aside, ignore_errors=True)


def _disk_error(output: Path, fresh: Path, error: OSError) -> ResourceError:
    """Return the error for a write that failed, with the bytes that were written and that are left."""
    found = unwritable(output, error)
    written = sum(path.stat().st_size for path in fresh.rglob("*") if path.is_file()) if fresh.exists() else 0
    place = next((folder for folder in output.parents if folder.exists()), Path("/"))
    free = shutil.disk_usage(place).free
    return ResourceError(f"{found} ({written:,} bytes were written, {free:,} bytes are free)", hint=found.hint)
