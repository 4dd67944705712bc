"""The folder of a comparison: its identity, and every row as soon as it is finished.

compare.json    what all rows have in common: model, texts, settings, versions; the rows that are asked for
rows.jsonl      one finished row on each line, in the order they were finished
state/          blocks of the rows under way, and what kept models took to make; gone at the end
models/         the pruned models, where they are kept
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from secateur.core.errors import ResourceError, StateError
from secateur.core.faults import hit
from secateur.recipe.comparison import Row
from secateur.recipe.job import digest_of
from secateur.recipe.report import finite, write_text
from secateur.recipe.run import differing, locked

FORMAT = 1
IDENTITY, ROWS = "compare.json", "rows.jsonl"


class CompareFolder:
    """The folder of one comparison, locked.

    Attributes:
        path: the folder.
        finished: `{key: row}` of the rows that are done; rows that failed are not among them.
    """

    def __init__(self, path: Path, common: Mapping[str, Any]) -> None:
        self.path = path
        self.common: dict[str, Any] = json.loads(json.dumps(common))
        self.finished: dict[str, dict[str, Any]] = {}

    @classmethod
    @contextmanager
    def opened(
        cls, path: Path, common: Mapping[str, Any], rows: Sequence[Row], *, resume: bool, overwrite: bool
    ) -> Iterator[Self]:
        """Yield the folder with its lock held.

        Args:
            path: made if it is not there.
            common: plain data that decides every row.
            rows: what is asked for now; more than before is allowed, less is not.
            resume: go on with an earlier comparison of the same settings; simply starts if there is none.
            overwrite: delete an earlier comparison first.

        Raises:
            StateError: if the folder holds something else, or a comparison of other settings.
            ResourceError: if it cannot be written.
        """
        refuse_foreign(path, resume=resume, overwrite=overwrite)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"the folder `{path}` cannot be made: {error.strerror}") from error
        with locked(path):
            folder = cls(path, common)
            folder._begin(rows, resume=resume)
            yield folder

    def key(self, settings: Mapping[str, Any]) -> str:
        """Return what tells a row, or a part of one, from any other: a digest of all that decides it."""
        return digest_of({"common": self.common, "row": settings})

    def state(self, settings: Mapping[str, Any]) -> Path:
        """Return where work on a row keeps its finished blocks."""
        return self.path / "state" / self.key(settings)[:24]

    @property
    def plans(self) -> Path:
        """Where plans are kept until the last row is finished."""
        return self.path / "state" / "plans"

    def model(self, row: Row) -> Path:
        """Return where the model of a row is kept."""
        words = re.sub(r"[^\w.=-]+", "-", row.label.replace(":", "of").replace("%", "pc")).strip("-.")
        return self.path / "models" / f"{words[:80]}-{self.key(row.settings())[:8]}"

    def made(self, row: Row) -> dict[str, Any] | None:
        """Return what the kept model of a row took to make, None if it is not known; such a model is deleted."""
        found = _read(self._note(row))
        if found is None:  # not there yet, or published just before a kill
            shutil.rmtree(self.model(row), ignore_errors=True)
        return found

    def note(self, row: Row, made: Mapping[str, Any]) -> None:
        """Remember what the kept model of a row took to make, while it is measured."""
        path = self._note(row)
        path.parent.mkdir(exist_ok=True)
        _write(path, json.dumps(finite(made)) + "\n")

    def _note(self, row: Row) -> Path:
        return self.path / "state" / f"{self.key(row.settings())[:24]}.json"

    def add(self, row: Row, record: Mapping[str, Any]) -> None:
        """Store a finished row."""
        plain = finite({**record, "key": self.key(row.settings())})
        hit("compare.row")
        try:
            with (self.path / ROWS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(plain) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ResourceError(f"`{self.path / ROWS}` could not be written: {error.strerror}") from error
        self.finished[plain["key"]] = plain

    def end(self) -> None:
        """Delete the state of finished work."""
        shutil.rmtree(self.path / "state", ignore_errors=True)

    def _begin(self, rows: Sequence[Row], *, resume: bool) -> None:
        known = _read(self.path / IDENTITY)
        identity = {"format": FORMAT, "common": self.common}
        if known is not None and resume:
            places = differing(known.get("common"), self.common)
            if places or known.get("format") != FORMAT:
                shown = "; ".join(
                    f"{place}: {_at(known.get('common'), place)!r} then, {_at(self.common, place)!r} now"
                    for place in places[:4]
                )
                raise StateError(
                    f"`{self.path}` holds a comparison of other settings: {shown or 'another format'}",
                    hint="repeat its settings, choose another --output, or start again with --overwrite",
                )
            asked = {self.key(row.settings()): row for row in rows}
            stored = _lines(self.path / ROWS)
            for line in stored:
                if line.get("key") not in asked:
                    self._refuse_other_row(line, rows)
            self.finished = {line["key"]: line for line in stored if line.get("error") is None}
        else:
            shutil.rmtree(self.path / "state", ignore_errors=True)
            shutil.rmtree(self.path / "models", ignore_errors=True)
        _write(self.path / ROWS, "".join(json.dumps(line) + "\n" for line in self.finished.values()))
        _write(self.path / IDENTITY, json.dumps(identity, indent=1) + "\n")

    def _refuse_other_row(self, line: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """Say how a row that is there differs from the rows that are asked for."""
        here = {name: line.get(name) for name in ("method", "plan", "tuner", "pattern")}
        words = ", ".join(str(value) for value in here.values() if value is not None)
        for row in rows:
            if (*row.names, row.pattern) == tuple(here.values()) and isinstance(line.get("settings"), dict):
                wanted, found = json.loads(json.dumps(row.settings())), line["settings"]
                places = differing(found, wanted)[:4]
                shown = "; ".join(f"{p}: {_at(found, p)!r} then, {_at(wanted, p)!r} now" for p in places)
                raise StateError(
                    f"`{self.path}` holds the row `{words}` with other settings: {shown}",
                    hint="repeat its settings, choose another --output, or start again with --overwrite",
                )
        raise StateError(
            f"`{self.path}` holds the row `{words}`, which is not asked for now",
            hint="ask for all rows that are there (more are welcome), or choose another --output",
        )


def refuse_foreign(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that is not ours to write in, before any work is done.

    Raises:
        StateError: if it holds something else, or an earlier comparison and neither `resume` nor `overwrite` is given.
    """
    if path.exists() and not path.is_dir():
        raise StateError(f"`{path}` is a file", hint="choose another --output")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / IDENTITY).is_file() and {entry.name for entry in path.iterdir()} - {"lock"}:
        raise StateError(f"`{path}` exists and holds no comparison", hint="choose another --output")
    if (path / IDENTITY).is_file() and not resume and not overwrite:
        raise StateError(
            f"`{path}` holds an earlier comparison", hint="go on with --resume, or replace it with --overwrite"
        )


def _at(data: Any, place: str) -> Any:
    """Return the value at a dotted place, or None."""
    for part in place.split("."):
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and part.isdigit() and int(part) < len(data):
            data = data[int(part)]
        else:
            return None
    return data


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows up to the first line that is torn."""
    found: list[dict[str, Any]] = []
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return found
    for raw in text.splitlines():
        try:
            line = json.loads(raw)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        found.append(line)
    return found


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise ResourceError(f"`{path}` could not be written: {error.strerror}") from error
