"""Calibration samples: token ids that are only looked at, all of one length."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import InputError, RecipeError
from secateur.data.text import Text, tokenise


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token ids, and which of them count.

    Args:
        ids: int64 `(samples, length)`.
        keep: bool `(samples, length)`, False for padding, which no statistic may see; None if every token counts.
        source: where the samples come from, for the report.
        notes: what is unusual about them, one sentence each, for the report.
    """

    ids: Tensor
    keep: Tensor | None
    source: str
    notes: tuple[str, ...] = ()

    @property
    def samples(self) -> int:
        """Return the number of samples."""
        return int(self.ids.shape[0])

    @property
    def length(self) -> int:
        """Return the number of tokens of a sample, padding included."""
        return int(self.ids.shape[1])

    @property
    def tokens(self) -> int:
        """Return the number of tokens that count, padding excluded."""
        return self.ids.numel() if self.keep is None else int(self.keep.sum())

    @property
    def digest(self) -> str:
        """Return the sha256 of ids, shape and padding, 64 hexadecimal digits."""
        whole = hashlib.sha256(f"{tuple(self.ids.shape)}".encode())
        whole.update(self.ids.contiguous().numpy().astype("<i8").tobytes())
        if self.keep is not None:
            whole.update(self.keep.contiguous().numpy().tobytes())
        return whole.hexdigest()

    def batches(self, sequences: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield `(ids, keep)` of up to `sequences` samples at a time, in order: `(b, length)` each, `keep` maybe None.

        Raises:
            RecipeError: `sequences` is less than 1.
        """
        if sequences < 1:
            raise RecipeError(f"a batch has {sequences} sequences, but must have 1 or more")
        for start in range(0, self.samples, sequences):
            rows = slice(start, start + sequences)
            yield self.ids[rows], None if self.keep is None else self.keep[rows]


def sample(
    text: Text | str,
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int,
    vocabulary: int | None = None,
    max_positions: int | None = None,
    truncate: bool = False,
) -> Calibration:
    """Return random crops of a text.

    The documents are joined by two newlines and tokenised once. With `random.Random(seed)` and n tokens, the start of
    each crop is `randint(0, n - length - 1)`. This is the protocol of the published one-shot pruners.

    Args:
        text: what to sample from.
        tokenizer: of transformers.
        samples: number of crops.
        length: tokens of a crop.
        seed: of the starts.
        vocabulary: rows of the model's embedding; every id must be less. Not checked if None.
        max_positions: longest input of the model, in tokens. Not checked if None.
        truncate: take crops of `max_positions` tokens, with a note, where `length` is more.

    Raises:
        InputError: the text has fewer tokens than asked, an id is outside the vocabulary, or `length` is more than the
            model takes.
        RecipeError: `samples` or `length` is less than 1.
    """
    length, notes = _fit(samples, length, max_positions, truncate)
    given = Text((text,), "text") if isinstance(text, str) else text
    ids = tokenise(given, tokenizer)
    found, asked = len(ids), max(samples * length, length + 1)
    if found < asked:
        most = found // length if found > length else 0
        raise InputError(
            f"text `{given.source}` has too few tokens: asked {asked} ({samples} samples of {length}), found {found}",
            hint=f"give more text, or lower `samples` to {most}" if most else "give more text, or lower `length`",
        )
    _check_vocabulary(ids, vocabulary, given.source)
    draw = random.Random(seed)
    starts = [draw.randint(0, found - length - 1) for _ in range(samples)]
    rows = torch.stack([ids[start : start + length] for start in starts])  # (samples, length)
    return _finished(Calibration(rows, None, given.source, (*given.notes, *notes)))


def from_texts(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    samples: int | None = None,
    length: int,
    seed: int = 0,
    vocabulary: int | None = None,
    max_positions: int | None = None,
    truncate: bool = False,
) -> Calibration:
    """Return one sample per text: cut at `length` tokens, shorter ones padded on the right and the padding excluded.

    Args:
        texts: the samples; empty ones are left out with a note.
        tokenizer: of transformers.
        samples: take so many, at random and in their order; all if None or, with a note, if there are fewer.
        length: most tokens of a sample. Rows are only as long as the longest sample needs.
        seed: of the choice, where there are more texts than `samples`.
        vocabulary: see `sample`.
        max_positions: see `sample`; what counts is the longest sample.
        truncate: see `sample`.

    Raises:
        InputError: a text is no string, there is no token at all, or as for `sample`.
        RecipeError: `samples` or `length` is less than 1.
    """
    wrong = next((k for k, text in enumerate(texts) if not isinstance(text, str)), None)
    if isinstance(texts, str) or wrong is not None:
        kind = "str" if isinstance(texts, str) else f"list with a {type(texts[wrong or 0]).__name__}"
        raise InputError(f"calibration texts are a {kind}, but must be a list of strings")
    _fit(len(texts) if samples is None else samples, length, None, False)
    notes = []
    rows = [tokenise(text, tokenizer)[:length] for text in texts if text.strip()]
    rows = [row for row in rows if len(row)]
    if len(rows) < len(texts):
        notes.append(f"calibration texts: {len(texts) - len(rows)} of {len(texts)} are empty and left out")
    if not rows:
        raise InputError("calibration texts hold no token", hint="give at least one text with a word")
    if samples is not None and len(rows) < samples:
        notes.append(f"calibration texts: {samples} samples asked, {len(rows)} found")
    if samples is not None and len(rows) > samples:
        rows = [rows[k] for k in sorted(random.Random(seed).sample(range(len(rows)), samples))]
    width, more = _fit(len(rows), max(map(len, rows)), max_positions, truncate)
    lengths = torch.tensor([min(len(row), width) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence([row[:width] for row in rows], batch_first=True)  # pads with id 0
    keep = torch.arange(width) < lengths[:, None]  # (samples, width)
    short = int((lengths < width).sum())
    if short:
        more.append(f"calibration texts: {short} of {len(rows)} are shorter than {width} tokens and padded")
    _check_vocabulary(ids, vocabulary, "texts")
    return _finished(Calibration(ids, None if keep.all() else keep, "texts", (*notes, *more)))


def from_ids(
    ids: Any,
    keep: Any = None,
    *,
    vocabulary: int | None = None,
    max_positions: int | None = None,
    truncate: bool = False,
    source: str = "token ids",
) -> Calibration:
    """Return samples that are token ids already.

    Args:
        ids: `(samples, length)` of any integer type: a tensor, an array or nested lists.
        keep: `(samples, length)` of bools or of 0 and 1 like an attention mask, 0 for padding; None if all count.
        vocabulary: see `sample`.
        max_positions: see `sample`.
        truncate: see `sample`.
        source: how the report calls them.

    Raises:
        InputError: wrong shape or type, an id outside the vocabulary, or a sample of nothing but padding.
    """
    rows = _integers(ids, source)
    length, notes = _fit(rows.shape[0], rows.shape[1], max_positions, truncate)
    rows = rows[:, :length].contiguous()
    kept = None
    if keep is not None:
        mask = torch.as_tensor(keep).detach().cpu()
        if tuple(mask.shape) != tuple(torch.as_tensor(ids).shape):
            raise InputError(f"keep has shape {tuple(mask.shape)}, but must have that of {source}: {(*rows.shape,)}")
        if mask.is_complex() or not ((mask == 0) | (mask == 1)).all():
            raise InputError("keep must hold only 0 (padding) and 1, or bools")
        kept = mask[:, :length].bool()
        empty = (~kept.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise InputError(f"keep leaves no token in sample {empty[0]} of {source}", hint="leave such samples out")
        rows = rows.masked_fill(~kept, 0)  # padding may be -100 or any other mark
    _check_vocabulary(rows, vocabulary, source)
    return _finished(Calibration(rows, None if kept is None or kept.all() else kept, source, tuple(notes)))


def _fit(samples: int, length: int, max_positions: int | None, truncate: bool) -> tuple[int, list[str]]:
    """Return the length to use, and a note if it is not the one asked."""
    for name, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise RecipeError(f"calibration {name} is {value}, but must be 1 or more")
    if max_positions is None or length <= max_positions:
        return length, []
    if not truncate:
        raise InputError(
            f"calibration length is {length} tokens, but the model takes at most {max_positions}",
            hint=f"lower `length` to {max_positions}",
        )
    return max_positions, [f"calibration samples are cut from {length} tokens to the {max_positions} the model takes"]


def _integers(ids: Any, source: str) -> Tensor:
    """Return int64 `(samples, length)` on the CPU."""
    try:
        rows = torch.as_tensor(ids).detach().cpu()
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{source} must be a rectangular table of integers: {error}") from error
    if rows.dim() != 2 or rows.numel() == 0:
        raise InputError(f"{source} have shape {tuple(rows.shape)}, but must be (samples, length), both 1 or more")
    if rows.is_floating_point() or rows.is_complex() or rows.dtype is torch.bool:
        raise InputError(f"{source} have type {rows.dtype}, but must be integers")
    return rows.to(torch.int64)


def _check_vocabulary(ids: Tensor, vocabulary: int | None, source: str) -> None:
    """Raise if an id has no row in the embedding: on a GPU this would end the process."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0:
        raise InputError(f"{source}: the smallest token id is {low}, but ids start at 0")
    if vocabulary is not None and high >= vocabulary:
        raise InputError(
            f"{source}: the largest token id is {high}, but the model's embedding has {vocabulary} rows",
            hint="use the tokenizer that belongs to the model",
        )


def _finished(calibration: Calibration) -> Calibration:
    """Return the same samples, with notes on what makes their statistics poor."""
    ids = calibration.ids
    keep = torch.ones_like(ids, dtype=torch.bool) if calibration.keep is None else calibration.keep
    visible = ids.masked_fill(~keep, -1)
    notes = list(calibration.notes)
    repeated = calibration.samples - len(torch.unique(visible, dim=0))
    if repeated:
        notes.append(f"calibration: {repeated} of {calibration.samples} samples repeat another sample")
    first = ids.gather(1, keep.int().argmax(dim=1, keepdim=True))
    constant = int(((visible == first) | ~keep).all(dim=1).sum()) if calibration.length > 1 else 0
    if constant:
        notes.append(
            f"calibration: {constant} of {calibration.samples} samples are one repeated token, their inputs have rank 1"
        )
    return replace(calibration, notes=tuple(notes))
