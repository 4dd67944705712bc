"""Fault points act when they are told to, and only then."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time

import pytest

from secateur.core import faults
from secateur.core.errors import RecipeError


@pytest.fixture(autouse=True)
def fresh():
    faults.forget()
    yield
    faults.forget()


def test_a_point_does_nothing_unless_asked(monkeypatch):
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    faults.hit("a.b")
    monkeypatch.setenv(faults.VARIABLE, "other:1:raise")
    faults.hit("a.b")


def test_the_kth_hit_of_the_named_point_acts_once(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "a.b:2:raise")
    faults.hit("a.b")
    faults.hit("c")
    with pytest.raises(faults.InjectedError, match=r"`a\.b`"):
        faults.hit("a.b")
    faults.hit("a.b")


def test_a_star_counts_every_point(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "*:3:enospc")
    faults.hit("a")
    faults.hit("b")
    with pytest.raises(OSError) as caught:
        faults.hit("c")
    assert caught.value.errno == errno.ENOSPC


def test_sleep_waits_and_goes_on(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "a:1:sleep=0.2")
    started = time.perf_counter()
    faults.hit("a")
    assert time.perf_counter() - started >= 0.2


def test_kill_leaves_no_time_for_anything(monkeypatch):
    monkeypatch.setenv(faults.VARIABLE, "a:1:kill")
    code = "import atexit\nfrom secateur.core import faults\natexit.register(print, 'late')\nfaults.hit('a')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == b""


@pytest.mark.parametrize("wanted", ["a", "a:1", "a:0:raise", "a:x:raise", "a:1:burn", "a:1:raise=3", "a:1:sleep=x"])
def test_a_malformed_wish_is_an_error(monkeypatch, wanted):
    monkeypatch.setenv(faults.VARIABLE, wanted)
    with pytest.raises(RecipeError, match="name:k:action"):
        faults.hit("a")
