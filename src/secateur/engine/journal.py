"""What a sweep leaves behind so that it can go on after being killed: one file per finished block, one line per file.

Order of writing, which is what makes every instant recoverable: the block's weights, then the hidden states that enter
the next block, then the line that says both are whole. A block without its line is done again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.core.errors import ResourceError, StateError
from secateur.core.faults import hit
from secateur.core.mask import Masks

FORMAT = 1


@dataclass(frozen=True)
class Finished:
    """A block that is done.

    Attributes:
        weights: `{parameter name inside the block: tensor}`, memory-mapped; only parameters that changed.
        masks: masks of its linears.
        report: the block's part of the sweep's report, as plain JSON values.
    """

    weights: dict[str, Tensor]
    masks: Masks
    report: dict[str, Any]


class Journal:
    """The state folder of one sweep.

    Args:
        folder: created if missing; holds nothing but this state.
        identity: plain JSON values that decide the result (model, method, pattern, calibration, seed, versions).
        resume: go on with an earlier state of the same identity; without it an earlier state is an error.

    Raises:
        StateError: if another process works here, or the earlier state has another identity.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self.warnings: list[str] = []
        self._lines: list[dict[str, Any]] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("w")
        except OSError as error:
            raise ResourceError(f"the state folder `{folder}` cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise StateError(
                f"another process is working on `{folder}`", hint="wait for it, or choose another --output"
            ) from error
        try:
            self._open(resume)
        except BaseException:
            self._lock.close()
            raise

    @property
    def finished(self) -> int:
        """Number of blocks that are done, counted from the first without a gap."""
        return len(self._lines)

    def add(
        self,
        weights: Mapping[str, Tensor],
        masks: Masks,
        report: Mapping[str, Any],
        hidden: Mapping[str, Sequence[Tensor]],
    ) -> Finished:
        """Store the next block and the hidden states that leave it.

        Args:
            weights: parameters of the block that changed, by name inside the block.
            masks: masks of its linears.
            report: plain JSON values.
            hidden: `{path name: one tensor per batch}`.

        Returns:
            The block as read back, its weights memory-mapped.
        """
        number = self.finished
        block, states = self._block_file(number), self._hidden_file(number + 1)
        tensors = {f"weight.{name}": tensor.contiguous() for name, tensor in weights.items()}
        tensors |= {f"mask.{name}": packed for name, packed in masks.packed().items()}
        digest = self._write(block, tensors, {"widths": json.dumps(masks.widths())})
        flat = {f"{path}.{batch:06d}": tensor for path, store in hidden.items() for batch, tensor in enumerate(store)}
        line = {"block": number, "sha256": digest, "hidden": self._write(states, flat, {}), "report": report}
        self._append(line)
        self._lines.append(json.loads(json.dumps(line)))
        self._hidden_file(number).unlink(missing_ok=True)
        return self.read(number)

    def read(self, number: int) -> Finished:
        """Return finished block `number`."""
        weights: dict[str, Tensor] = {}
        packed: dict[str, Tensor] = {}
        with safe_open(self._block_file(number), "pt") as file:
            widths = json.loads(file.metadata()["widths"])
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                kind, _, name = key.partition(".")
                (weights if kind == "weight" else packed)[name] = file.get_tensor(key)
        return Finished(weights, Masks.from_packed(packed, widths), self._lines[number]["report"])

    def hidden(self, path: str, batches: int) -> list[Tensor] | None:
        """Return the states of `path` that enter the first unfinished block, or None if they are not whole."""
        if not self.finished:
            return None
        file = self._hidden_file(self.finished)
        if _digest(file) != self._lines[-1]["hidden"]:
            return None
        with safe_open(file, "pt") as stored:
            keys = set(stored.keys())
            wanted = [f"{path}.{batch:06d}" for batch in range(batches)]
            return [stored.get_tensor(key).clone() for key in wanted] if keys.issuperset(wanted) else None

    def close(self, *, remove: bool) -> None:
        """Release the lock; with `remove` delete the state, which the published output has replaced."""
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _open(self, resume: bool) -> None:
        identity = self.folder / "identity.json"
        known = _read_json(identity)
        if known is not None and not resume:
            raise StateError(
                f"`{self.folder}` holds the state of an earlier, unfinished run",
                hint="go on with --resume, or start again with --overwrite",
            )
        if known is None:
            for leftover in [
                *self.folder.glob("block-*"),
                *self.folder.glob("hidden-*"),
                *self.folder.glob("journal*"),
                *self.folder.glob("plan.*"),
            ]:
                leftover.unlink()
            _write_atomically(
                identity, json.dumps({"format": FORMAT, **self.identity}, indent=1, sort_keys=True).encode()
            )
            return
        wanted = {"format": FORMAT, **self.identity}
        differing = sorted(key for key in {*known, *wanted} if known.get(key) != wanted.get(key))
        if differing:
            shown = "; ".join(f"{key}: {known.get(key)!r} then, {wanted.get(key)!r} now" for key in differing[:4])
            raise StateError(
                f"`{self.folder}` belongs to another run: {shown}",
                hint="repeat that run's settings, or start again with --overwrite",
            )
        for temporary in self.folder.glob("*.tmp"):
            temporary.unlink()
        for number, line in enumerate(_read_lines(self.folder / "journal.jsonl")):
            if line.get("block") != number or _digest(self._block_file(number)) != line.get("sha256"):
                self.warnings.append(
                    f"the stored block {number} is damaged or missing; it and all later blocks are done again"
                )
                break
            self._lines.append(line)
        self._rewrite_lines()

    def _rewrite_lines(self) -> None:
        """Drop a torn last line and lines of blocks that will be done again."""
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        _write_atomically(self.folder / "journal.jsonl", text.encode())

    def _append(self, line: Mapping[str, Any]) -> None:
        hit("journal.append")
        try:
            with (self.folder / "journal.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ResourceError(f"`{self.folder / 'journal.jsonl'}` could not be written: {error.strerror}") from error

    def _write(self, path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> str:
        temporary = path.with_name(path.name + ".tmp")
        size = sum(tensor.nbytes for tensor in tensors.values())
        try:
            hit("journal.write")
            save_file(dict(tensors), temporary, metadata=metadata)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            digest = _digest(temporary)
            hit("journal.rename")
            temporary.rename(path)
            _sync_folder(path.parent)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise ResourceError(
                f"`{path}` ({size} bytes) could not be written: {error}",
                hint="free disk space; then go on with --resume",
            ) from error
        return digest

    def _block_file(self, number: int) -> Path:
        return self.folder / f"block-{number:04d}.safetensors"

    def _hidden_file(self, number: int) -> Path:
        return self.folder / f"hidden-{number:04d}.safetensors"


def generator_for(seed: int, block: int, purpose: str) -> torch.Generator:
    """Return a CPU generator that depends on nothing but its arguments, so a resumed run draws the same numbers."""
    words = hashlib.sha256(f"{seed}:{block}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(words[:8], "little") >> 1)


def _digest(path: Path) -> str:
    """Return the sha256 of a file, or an empty text if there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the journal's lines up to the first that is torn."""
    lines: list[dict[str, Any]] = []
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return lines
    for raw in text.split(b"\n"):
        try:
            line = json.loads(raw)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        hit("journal.write")
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        hit("journal.rename")
        temporary.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(f"`{path}` could not be written: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
