"""Data sets of the hub, by their name or by the short name the field uses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from secateur.core.errors import InputError, missing_extra
from secateur.core.fetch import downloads_are_off
from secateur.data.builtin import Role
from secateur.data.textfile import Faults, Read, limited, notes_on, put_right

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class DataSet:
    """Where a data set lies and which split serves what.

    Args:
        path: `owner/name` on the hub.
        config: the configuration, if it has several.
        splits: the split for each use.
        files: for a large data set, the one file per split that the published protocols read.
    """

    path: str
    config: str | None
    splits: dict[Role, str]
    files: dict[str, str] | None = None


DATA_SETS = {
    "wikitext2": DataSet("Salesforce/wikitext", "wikitext-2-raw-v1", {"calibration": "train", "evaluation": "test"}),
    "c4": DataSet(
        "allenai/c4",
        None,
        {"calibration": "train", "evaluation": "validation"},
        {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
    ),
}


def parse_data_set(spec: str, split: str | None, role: Role) -> tuple[DataSet, str]:
    """Return the data set and split that `spec` names.

    Args:
        spec: `owner/name[:config][:split]`, or a short name with an optional split. A single word after the colon is a
            split if it is called like one (train, validation, test), else a configuration.
        split: split to take if `spec` has none; must not contradict it.
        role: decides the split if nothing else does.

    Raises:
        InputError: too many parts, or two different splits.
    """
    name, *rest = re.split(r":(?![^\[]*\])", spec)  # not inside a slice such as `train[:10%]`
    known = DATA_SETS.get(name) or DataSet(name, None, {"calibration": "train", "evaluation": "test"})
    config = known.config
    said = None
    if rest and (len(rest) == 2 or name in DATA_SETS or rest[-1].partition("[")[0] in _SPLITS):
        said = rest.pop()
    if rest and name not in DATA_SETS:
        config = rest.pop()
    if rest or said == "" or config == "":
        raise InputError(f"text `{spec}` must be `owner/name`, `owner/name:config` or `owner/name:config:split`")
    if said and split and said != split:
        raise InputError(f"text `{spec}` says split `{said}`, but `split` says `{split}`", hint="say it once")
    chosen = said or split or known.splits[role]
    if known.files and chosen not in known.files:
        raise InputError(f"text `{spec}` has no split `{chosen}`, only {', '.join(known.files)}")
    return DataSet(known.path, config, known.splits, known.files), chosen


def read_data_set(
    spec: str, *, field: str, split: str | None, skip_bad: int, limit: int, role: Role
) -> tuple[Read, str]:
    """Return the rows of a hub data set as documents, exactly as they are there, and the full name of what was read.

    A data set whose shards the protocols sample (`c4`) is streamed until `limit`; others are loaded through the cache
    of the package `datasets`, so they can be used again without a network.

    Args:
        spec: see `parse_data_set`.
        field: column with the text.
        split: see `parse_data_set`.
        skip_bad: how many rows without a string may be left out.
        limit: characters after which reading stops.
        role: see `parse_data_set`.

    Raises:
        InputError: the package `datasets` is missing, the network is off and the data set not in its cache, or there
            is no such data set, configuration, split or column.
    """
    with _opened(spec, split, role) as (rows, source):
        return _read_rows(rows, source, field, skip_bad, limit), source


@contextmanager
def _opened(spec: str, split: str | None, role: Role) -> Iterator[tuple[Iterable[dict[str, Any]], str]]:
    """Yield the rows of a hub data set and its full name; what fails while they are read is told in one sentence."""
    chosen, part = parse_data_set(spec, split, role)
    source = ":".join(word for word in (chosen.path, chosen.config, part) if word)
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "data", f"load the text `{spec}`") from error
    offline = downloads_are_off()
    settings: dict[str, Any] = {"split": part, "streaming": chosen.files is not None}
    if chosen.files:
        settings["data_files"] = {part: chosen.files[part]}
    if offline:
        if chosen.files:
            raise InputError(
                f"text `{spec}` is streamed from the hub and HF_HUB_OFFLINE forbids that", hint=_instead(spec)
            )
        settings["download_config"] = datasets.DownloadConfig(local_files_only=True)
    try:
        yield datasets.load_dataset(chosen.path, chosen.config, **settings), source
    except (OSError, ValueError, RuntimeError) as error:  # what `datasets` and the hub's client derive theirs from
        if offline:
            raise InputError(
                f"text `{spec}` is not in the local cache of data sets and HF_HUB_OFFLINE forbids downloads",
                hint=_instead(spec),
            ) from error
        raise InputError(f"text `{spec}` cannot be loaded: {_first_line(error)}", hint=_instead(spec)) from error


def data_set_rows(spec: str, split: str | None, role: Role, limit: int) -> tuple[list[dict[str, Any]], str]:
    """Return at most `limit` whole rows of a hub data set, and its full name; see `read_data_set`."""
    with _opened(spec, split, role) as (rows, source):
        return list(islice(iter(rows), limit)), source


def _read_rows(rows: Iterable[dict[str, Any]], source: str, field: str, skip_bad: int, limit: int) -> Read:
    counts: Counter[str] = Counter()
    faults = Faults(source, "row", skip_bad)
    documents: list[str] = []
    found = 0
    notes: list[str] = []
    for number, row in enumerate(rows, start=1):
        if field not in row:
            columns = ", ".join(f"`{name}`" for name in row)
            raise InputError(f"text `{source}` has no column `{field}`, only {columns}", hint="choose one with `field`")
        if found >= limit:
            notes.append(limited(source, limit))
            break
        if isinstance(row[field], str):
            documents.append(put_right(row[field], counts))
            found += len(row[field])
        else:
            faults.add(number, f"column `{field}` holds a {type(row[field]).__name__}, but must hold a string")
    faults.check()
    return Read(documents, [*notes, *faults.notes(), *notes_on(source, counts)])


def _instead(spec: str) -> str:
    return f"check the name `{spec}` and the network, or use a file or `builtin:wiki`"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
