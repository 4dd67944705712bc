"""Exact selection of the largest scores: as many as asked, ties to the lower index, without a full sort.

On CPU the work is done by numpy: its partition and comparisons are 5 to 10 times faster than torch's there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Groups of these widths are ranked inside one machine word, a byte per entry.
WORDS: dict[int, str] = {2: "<u2", 4: "<u4", 8: "<u8"}
# Above this width the pairwise ranking of `top_of_lanes` (width^2 / 2 comparisons) loses to a partition of each group.
PAIRWISE_WIDTH = 16
# Entries whose ranks are worked out at once, so that all passes over them stay in the cache. A multiple of every width.
CHUNK = 1 << 16


def top_of_rows(score: Tensor, keep: int | Tensor) -> Tensor:
    """Return a mask of exactly `keep` largest entries in every row; among equals the lower index is kept.

    Cost: one partition of each row, O(rows * columns); a sort of each row where `keep` differs between rows.

    Args:
        score: `(rows, columns)`, any float dtype, no NaN (infinities are allowed).
        keep: entries to keep per row, `0 <= keep <= columns`; one number, or an integer `(rows,)`.

    Returns:
        bool `(rows, columns)` on the device of `score`, True = kept.
    """
    if isinstance(keep, Tensor):
        order = score.sort(dim=1, descending=True, stable=True).indices
        wanted = torch.arange(score.shape[1], device=score.device) < keep.unsqueeze(1)
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, wanted)
    rows, columns = score.shape
    if keep <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if keep >= columns:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = _kth_smallest(score, columns - keep)  # (rows, 1), the smallest kept value
    mask = _at_least(score, threshold)
    if _count(mask) == rows * keep:  # every row keeps `keep` or more, so none keeps more
        return mask
    tied = mask.sum(1) > keep
    candidates, floor = score[tied], threshold[tied]
    above, equal = candidates > floor, candidates == floor
    missing = keep - above.sum(1, keepdim=True)  # how many of the equal ones belong in
    mask[tied] = above | (equal & (equal.cumsum(1) <= missing))
    return mask


def top_of_groups(score: Tensor, keep: int, width: int) -> Tensor:
    """Return a mask of exactly `keep` largest entries in every `width` consecutive columns of a row.

    Args:
        score: `(rows, columns)` with `columns % width == 0`, no NaN.
        keep: entries to keep per group.
        width: columns of a group.

    Returns:
        bool `(rows, columns)`, True = kept; among equals the lower column is kept.
    """
    rows, columns = score.shape
    if score.numel() and _by_numpy(score) and width in WORDS:
        return torch.from_numpy(_rank_in_words(_array(score).reshape(-1), width) < keep).reshape(rows, columns)
    if width > PAIRWISE_WIDTH:
        return top_of_rows(score.reshape(-1, width), keep).reshape(rows, columns)
    lanes = score.reshape(-1, width).T.contiguous()  # (width, groups): every comparison runs over contiguous memory
    return top_of_lanes(lanes, keep).T.reshape(rows, columns)


def top_of_lanes(lanes: Tensor, keep: int) -> Tensor:
    """Return a mask of exactly `keep` largest entries in every column of a few long rows; equals keep the upper one.

    Args:
        lanes: `(width, groups)`, one group per column, no NaN.
        keep: entries to keep per group.

    Returns:
        bool `(width, groups)`.
    """
    width = lanes.shape[0]
    if _by_numpy(lanes):
        values = _array(lanes)
        ranks = np.empty(values.shape, np.uint8)  # how many entries of the group rank above
        ranks[:] = np.arange(width - 1, -1, -1, dtype=np.uint8)[:, None]
        for upper in range(width - 1):
            for lower in range(upper + 1, width):
                upper_wins = (values[upper] >= values[lower]).view(np.uint8)
                ranks[lower] += upper_wins
                ranks[upper] -= upper_wins
        return torch.from_numpy(ranks < keep)
    above = torch.zeros(lanes.shape, dtype=torch.uint8, device=lanes.device)
    for upper in range(width - 1):
        wins = (lanes[upper] >= lanes[upper + 1 :]).view(torch.uint8)
        above[upper + 1 :] += wins
        above[upper] += width - 1 - upper - wins.sum(0, dtype=torch.uint8)
    return above < keep


def top_of_matrix(score: Tensor, keep: int) -> Tensor:
    """Return a mask of exactly `keep` largest entries of the whole matrix; ties keep the lower flat index."""
    return top_of_rows(score.reshape(1, -1), keep).reshape(score.shape)


def cut_(values: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    """Write `values` where `mask` is True, and zeros elsewhere, into `out`, and return it.

    Args:
        values: `(rows, columns)`, finite.
        mask: bool `(rows, columns)`.
        out: `(rows, columns)` of the same dtype.
    """
    if _by_numpy(values) and values.dtype in (torch.float32, torch.float64):
        np.multiply(values.numpy(), mask.numpy(), out=out.numpy())
        return out
    return torch.mul(values, mask, out=out)


def _rank_in_words(values: NDArray[Any], width: int) -> NDArray[np.uint8]:
    """Return, for each entry, how many of its group of `width` rank above it; flat uint8.

    All entries are compared with their neighbour at distance 1, 2, ... in one pass each over contiguous memory. The
    outcomes, a byte each, are then read as one word per group: bytes that compare across a group's end are masked
    out, a shift moves each outcome to the entry that lost, and whole words are added up (no byte exceeds 7).
    """
    word = np.dtype(WORDS[width])
    rank = np.zeros(values.size // width, word)
    outcome = np.zeros(min(CHUNK, values.size), np.bool_)
    losers = np.empty(outcome.size // width, word)
    for start in range(0, values.size, CHUNK):
        part = values[start : start + CHUNK]
        wins, shifted = outcome[: part.size].view(word), losers[: part.size // width]
        total = rank[start // width : (start + part.size) // width]
        for distance in range(1, width):
            np.greater_equal(part[:-distance], part[distance:], out=outcome[: part.size - distance])
            inside = word.type(sum(1 << (8 * lane) for lane in range(width - distance)))
            np.bitwise_and(wins, inside, out=wins)
            np.left_shift(wins, word.type(8 * distance), out=shifted)
            total += shifted
            np.bitwise_xor(wins, inside, out=wins)
            total += wins
    return rank.view(np.uint8)


def _kth_smallest(score: Tensor, index: int) -> Tensor:
    """Return the value at 0-based `index` of each sorted row, `(rows, 1)`."""
    if _by_numpy(score):
        found = np.partition(_array(score), index, axis=1)[:, index : index + 1]
        return torch.from_numpy(np.ascontiguousarray(found)).to(score.dtype)
    return score.kthvalue(index + 1, dim=1, keepdim=True).values


def _at_least(score: Tensor, threshold: Tensor) -> Tensor:
    """Return `score >= threshold`."""
    if _by_numpy(score):
        return torch.from_numpy(np.greater_equal(_array(score), _array(threshold)))
    return score >= threshold


def _count(mask: Tensor) -> int:
    """Return the number of True entries."""
    return int(np.count_nonzero(mask.numpy())) if _by_numpy(mask) else int(mask.sum())


def _by_numpy(tensor: Tensor) -> bool:
    """Return whether numpy can work on the memory of `tensor`."""
    return tensor.device.type == "cpu"


def _array(score: Tensor) -> NDArray[Any]:
    """Return `score` as a contiguous numpy array; half precision, which numpy hardly orders, as float32."""
    wide = score if score.dtype in (torch.float32, torch.float64) else score.float()
    return np.ascontiguousarray(wide.detach().numpy())
