"""Signals in this process; what ends a process is tested through the command line in `test_cli.py`."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from secateur.stopping import SIGNALS, Stopped, stoppable


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_raises_once_and_says_which(number, code):
    with pytest.raises(Stopped) as caught, stoppable():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert caught.value.exit_code == code
    assert isinstance(caught.value, KeyboardInterrupt)


def test_handlers_and_wakeup_are_left_as_they_were():
    before = [signal.getsignal(number) for number in SIGNALS]
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    threads = threading.active_count()
    with stoppable():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(wakeup) == wakeup
    assert threading.active_count() == threads


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_nothing_is_changed():
    seen = []

    def work():
        with stoppable():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
