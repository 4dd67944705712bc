"""Text from anywhere: one word names it, one object holds it.

| TEXT | what is read |
|---|---|
| `notes.txt` | the whole file as it is, one document |
| `pages.jsonl` | one document per line, from the field `text` or another |
| `pages.parquet` | one document per row, from the column `text` or another (extra `data`) |
| `builtin:wiki`, `builtin:tiny` | see `secateur.data.builtin` |
| `wikitext2`, `c4` | the field's usual data sets, from the hub (extra `data`) |
| `owner/name[:config][:split]` | any data set of the hub with a text column (extra `data`) |

A file that exists is always taken as a file and never causes a request. What had to be put right on the way in is
counted in `Text.notes`, for the report.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from secateur.core.errors import InputError, RecipeError, did_you_mean
from secateur.data.builtin import Role, builtin_documents, builtin_names
from secateur.data.dataset import DATA_SETS, read_data_set
from secateur.data.textfile import READERS, Read, read_file

LIMIT = 32 * 2**20  # characters; some eight million tokens, more than any calibration or evaluation here uses
_PIECE = 4 * 2**20  # characters given to a tokenizer at once; it takes some 170 bytes for each
_WORD_END = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")  # the space of "word word": no tokenizer's unit reaches across it
_OVERLAP_WORDS = 13  # the n of the contamination checks of GPT-3 (Brown et al. 2020, appendix C)


@dataclass(frozen=True)
class Text:
    """Documents with their origin.

    Args:
        documents: at least one; a `.txt` file is one document.
        source: the TEXT as it was asked for, with the part or split that was taken.
        notes: what was put right or left out while reading, one sentence each, for the report.
    """

    documents: tuple[str, ...]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Return the sha256 of the documents, 64 hexadecimal digits."""
        whole = hashlib.sha256()
        for document in self.documents:
            data = document.encode("utf-8")
            whole.update(len(data).to_bytes(8, "little") + data)
        return whole.hexdigest()

    def joined(self, *, lines: bool = False) -> str:
        """Return the documents joined by two newlines, as the published protocols do before they tokenise.

        Args:
            lines: take the non-empty lines as documents, which is how WikiText-2 kept one paragraph per line is
                evaluated.
        """
        return "\n\n".join((self.by_lines() if lines else self).documents)

    def by_lines(self) -> Text:
        """Return the same text with its non-empty lines as documents, their spaces untouched."""
        kept = (line for document in self.documents for line in document.split("\n") if line.strip())
        return replace(self, documents=tuple(kept))


def load_text(
    spec: str | Path,
    *,
    field: str = "text",
    split: str | None = None,
    skip_bad: int = 0,
    lines: bool = False,
    role: Role = "calibration",
    limit: int = LIMIT,
) -> Text:
    """Return the text that `spec` names.

    Args:
        spec: a file, `builtin:NAME` or a data set, see the table above.
        field: field of a `.jsonl` record or column of a table.
        split: split of a hub data set, when `spec` does not say it; `role` decides otherwise.
        skip_bad: how many malformed records may be left out before it is an error.
        lines: take the non-empty lines as documents, see `Text.joined`.
        role: what the text is for. It chooses the part of a builtin text and the split of a data set where neither is
            said: the published protocols calibrate on the training split and evaluate on another.
        limit: characters after which reading stops, with a note.

    Raises:
        InputError: the text is not there, not readable as asked, or empty.
        RecipeError: an argument is out of range.
        ResourceError: a builtin text cannot be fetched.
    """
    if skip_bad < 0:
        raise RecipeError(f"skip_bad is {skip_bad}, but must be 0 or more")
    if limit < 1:
        raise RecipeError(f"limit is {limit}, but must be 1 character or more")
    name = str(spec)
    if name.startswith("builtin:"):
        documents, full = builtin_documents(name.removeprefix("builtin:"), role)
        read = Read(documents, [])
        source = f"builtin:{full}"
    elif isinstance(spec, Path) or is_file(name):
        read = read_file(Path(name).expanduser(), field=field, skip_bad=skip_bad, limit=limit)
        source = name
    else:
        if name.partition(":")[0] not in DATA_SETS and not names_data_set(name):
            known = [f"builtin:{builtin}" for builtin in builtin_names()] + list(DATA_SETS)
            raise InputError(
                f"text `{name}` is no file and no known name{did_you_mean(name, known)}",
                hint=f"give a file ({', '.join(READERS)}), `builtin:wiki`, `wikitext2`, `c4` or `owner/name`",
            )
        read, source = read_data_set(name, field=field, split=split, skip_bad=skip_bad, limit=limit, role=role)
    if not any(document.strip() for document in read.documents):
        raise InputError(f"text `{name}` is empty", hint="give a text with at least one word")
    text = Text(tuple(read.documents), source, tuple(read.notes))
    return text.by_lines() if lines else text


def tokenise(text: Text | str, tokenizer: Any, *, special_tokens: bool = True) -> Tensor:
    """Return the token ids of a whole text, tokenised once.

    This is what `tokenizer(text)` gives: a tokenizer that opens every text with a special token (LLaMA, Gemma) puts it
    once in front of the whole, as in the published perplexity protocols; most others add nothing. The warning that the
    text is longer than the model's context is not given, because nobody feeds it to the model in one piece. Very long
    texts are given to the tokenizer in pieces cut between two words, to bound its memory: byte-level tokenizers give
    the same tokens as for the whole, others (SentencePiece) may differ by one token for each four million characters.

    Args:
        text: any length; the documents of a `Text` are joined.
        tokenizer: of transformers.
        special_tokens: whether the tokenizer may add its own special tokens around the text.

    Returns:
        int64 `(n,)`.
    """

    whole = text if isinstance(text, str) else text.joined()

    def ids(piece: str, special: bool) -> list[int]:
        found: list[int] = tokenizer(piece, add_special_tokens=special, verbose=False)["input_ids"]
        return found

    if len(whole) <= _PIECE:
        return torch.tensor(ids(whole, special_tokens), dtype=torch.int64)
    parts = [torch.tensor(ids(piece, False), dtype=torch.int64) for piece in _pieces(whole, _PIECE)]
    if special_tokens:
        bare, dressed = ids("a", False), ids("a", True)
        at = next((k for k in range(len(dressed)) if dressed[k : k + len(bare)] == bare), 0)
        parts = [torch.tensor(dressed[:at]), *parts, torch.tensor(dressed[at + len(bare) :])]
    return torch.cat([part.to(torch.int64) for part in parts])


def overlap(calibration: Text, evaluation: Text) -> float:
    """Return the fraction of the evaluation text that stands in the calibration text.

    Counted in runs of 13 words, upper and lower case alike, in texts shorter than that in runs of the shorter's
    length. Runs are compared by 64-bit hashes, so unrelated texts give exactly 0 in practice.

    Returns:
        0 (nothing in common) to 1 (all of the evaluation text).
    """
    number: dict[str, int] = {}
    first, second = (_words(text, number) for text in (calibration, evaluation))
    length = min(_OVERLAP_WORDS, len(first), len(second))
    if length == 0:
        return 0.0
    return float(numpy.isin(_runs(second, length), _runs(first, length)).mean())


def is_file(name: str) -> bool:
    """Say whether `name` means a file: it exists, or looks like nothing else."""
    path = Path(name).expanduser()
    return path.exists() or path.suffix.lower() in READERS or name.startswith((".", "/", "~")) or "\\" in name


def names_data_set(name: str) -> bool:
    """Say whether `name` looks like the `owner/name` of a data set."""
    owner, slash, rest = name.partition("/")
    return bool(owner and slash and rest) and "/" not in rest and not any(c.isspace() for c in name)


def _pieces(text: str, size: int) -> Iterator[str]:
    """Cut a text in front of spaces between two words, at most `size` characters apart."""
    start = 0
    while len(text) - start > size:
        end = start + size
        last = max(start, end - 4096)
        cuts = [match.start() for match in _WORD_END.finditer(text, last, end + 1)]
        end = cuts[-1] if cuts and cuts[-1] > start else end
        yield text[start:end]
        start = end
    yield text[start:]


def _words(text: Text, number: dict[str, int]) -> numpy.ndarray:
    """Return uint64 `(words,)`: the words of a text as well-mixed numbers, the same word always the same number."""
    indices = [number.setdefault(word, len(number)) for doc in text.documents for word in doc.lower().split()]
    mixed = numpy.array(indices, dtype=numpy.uint64) + numpy.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finaliser of splitmix64
        mixed = (mixed ^ (mixed >> numpy.uint64(shift))) * numpy.uint64(factor)
    return mixed ^ (mixed >> numpy.uint64(31))


def _runs(words: numpy.ndarray, length: int) -> numpy.ndarray:
    """Return uint64 `(words - length + 1,)`: one hash for every run of `length` words (a polynomial modulo 2^64)."""
    count = len(words) - length + 1
    total = numpy.zeros(count, dtype=numpy.uint64)
    for offset in range(length):
        total = total * numpy.uint64(0x5851F42D4C957F2D) + words[offset : offset + count]
    return total
