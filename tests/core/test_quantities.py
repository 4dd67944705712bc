from __future__ import annotations

import pytest

from secateur.core.quantities import duration, number, percent, size


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (11_520, "3 h 12 min"),
    ],
)
def test_durations_have_their_unit(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1 kB"), (999_600, "1 MB"), (1.5e9, "1.5 GB"), (3.2e12, "3.2 TB")],
)
def test_sizes_have_their_unit(count, words):
    assert size(count) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "-"),
        (3, "3"),
        (0.0, "0"),
        (17.312, "17.31"),
        (12345.6, "12,346"),
        (0.01234567, "0.01235"),
        (1e-7, "1e-07"),
        (-2.5, "-2.500"),
    ],
)
def test_numbers_keep_four_digits(value, words):
    assert number(value) == words


def test_fractions_are_percent():
    assert (percent(0.7), percent(None)) == ("70.0 %", "-")
