from __future__ import annotations

import io

from rich.console import Console
from rich.progress import Progress as RichProgress

from secateur.core.progress import step
from secateur.terminal import Bars, Lines, progress


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_lines_tell_the_time_left_and_not_too_often():
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, clock)
    with step(lines, "pruning", 10) as number:
        for _ in range(10):
            clock.now += 6.0
            lines.advance(number, 1)
    assert stream.getvalue().splitlines() == [
        "pruning",
        "pruning: 30%, 18 s elapsed, 42 s left",
        "pruning: 60%, 36 s elapsed, 24 s left",
        "pruning: 90%, 54 s elapsed, 6.0 s left",
        "pruning: done in 1 min 00 s",
    ]


def test_inner_steps_are_shown_only_if_they_last():
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, clock)
    with step(lines, "outer", 2), step(lines, "inner", 2) as inner:
        lines.advance(inner, 1)
    assert "inner" not in stream.getvalue()
    with step(lines, "outer", 2), step(lines, "inner", 2) as inner:
        clock.now += 20
        lines.advance(inner, 1)
    assert "inner: 50%, 20 s elapsed, 20 s left" in stream.getvalue()


def test_an_empty_step_and_an_unknown_one_do_no_harm():
    lines = Lines(io.StringIO(), Clock())
    with step(lines, "nothing", 0) as number:
        lines.advance(number, 0)
    lines.advance(99, 1)
    lines.finish(99)


def test_a_stream_that_is_no_terminal_gets_lines():
    stream = io.StringIO()
    with progress(stream) as show:
        show.note("hello")
    assert isinstance(show, Lines)
    assert stream.getvalue() == "hello\n"


def test_inner_bars_leave_and_outer_ones_stay():
    bars = RichProgress(console=Console(file=io.StringIO(), force_terminal=True, width=80), auto_refresh=False)
    show = Bars(bars)
    with step(show, "outer", 2) as outer:
        with step(show, "inner", 4) as inner:
            show.advance(inner, 3)
            assert [task.description for task in bars.tasks] == ["outer", "  inner"]
            assert bars.tasks[1].completed == 3
        for _ in range(10):
            show.advance(outer, 0.19999)
        show.note("[bold]not markup[/bold]")
    assert [task.description for task in bars.tasks] == ["outer"]
    assert bars.tasks[0].finished
    with step(show, "broken off", 2) as number:
        show.advance(number, 1)
    assert not bars.tasks[1].finished
    assert "[bold]not markup[/bold]" in bars.console.file.getvalue()
