"""The plain lines are throttled, carry rate and time left, and end with the duration."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from findrec.progress import format_seconds, progress, say, warn


class Clock:
    """A clock that is advanced by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_come_at_once_then_at_growing_gaps(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with progress("encode", total=1000, unit="texts", clock=clock) as bar:
        assert capsys.readouterr().out == "encode: 1,000 texts ...\n"
        clock.now += 4.9
        bar.advance(10)
        assert capsys.readouterr().out == ""
        clock.now += 0.1
        bar.advance(40)
        assert capsys.readouterr().out == "encode: 50/1,000 texts (5%), 10 texts/s, 1:35 min left\n"
        clock.now += 6  # the gap has grown to 7.5 s
        bar.advance(10)
        assert capsys.readouterr().out == ""
        clock.now += 1.5
        bar.note(loss=2.345678, eta=7)
        line = capsys.readouterr().out
        assert "60/1,000" in line
        assert "loss 2.346" in line
        assert line.endswith("7.0 s left\n")
        bar.advance(940)
    assert capsys.readouterr().out == "encode: 1,000 texts in 12.5 s (80 texts/s), loss 2.346\n"


def test_many_steps_print_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with progress("train", total=3600, unit="steps", clock=clock) as bar:
        for _ in range(3600):
            clock.now += 1
            bar.advance()
    lines = capsys.readouterr().out.splitlines()
    assert 60 <= len(lines) <= 75  # an hour: about one line a minute once the gaps have grown


def test_what_is_done_soon_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with progress("hash", total=10, unit="bytes", after_s=1, clock=clock) as bar:
        bar.advance(9)
        clock.now += 0.9
        bar.advance(1)
    assert capsys.readouterr().out == ""
    with progress("hash", total=10, unit="bytes", after_s=1, clock=clock) as bar:
        bar.advance(4)
        clock.now += 2
        bar.advance(1)
        assert capsys.readouterr().out == "hash: 10 bytes ...\n"
        bar.advance(5)
    assert capsys.readouterr().out == "hash: 10 bytes in 2.0 s (5 bytes/s)\n"


def test_a_failure_is_reported_and_raised(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with progress("read", total=8, unit="shards", clock=Clock()) as bar:
            bar.advance(3)
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert "read: stopped after 3 of 8 shards" in capsys.readouterr().out


def test_unknown_total_and_hidden_rank(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("scan", unit="rows", clock=Clock()) as bar:
        bar.advance(7)
    assert capsys.readouterr().out.startswith("scan: ...\nscan: 7 rows in")
    with progress("scan", show=False) as bar:
        bar.advance(7)
    assert bar.done == 7
    assert capsys.readouterr().out == ""


def test_quiet_silences_all_but_warnings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINDREC_QUIET", "1")
    say("hello")
    with progress("scan", total=2) as bar:
        bar.advance(2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    warn("3 rows are left out")
    warn("WARNING: the disk is full")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "3 rows are left out\nWARNING: the disk is full\n"
    monkeypatch.setenv("FINDREC_QUIET", "0")
    warn("3 rows are left out")
    assert capsys.readouterr().out == "3 rows are left out\n"
    say("hello")
    assert capsys.readouterr().out == "hello\n"


def test_threads_lose_no_count() -> None:
    with progress("count", total=8000, show=False) as bar:
        threads = [
            threading.Thread(target=lambda: [bar.advance() for _ in range(1000)])  # type: ignore[func-returns-value]
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert bar.done == 8000


def test_terminal_shows_nested_bars_and_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("outer", total=2) as outer:
        with progress("inner [x]", total=5, unit="rows") as inner:
            inner.advance(5)
            say("between [bold]")
        outer.advance(2)
    text = terminal.getvalue()
    assert "between [bold]" in text
    assert "inner [x]: 5 rows in" in text
    assert "outer: 2 items in" in text
    assert text.index("inner [x]: 5") < text.index("outer: 2 items in")
    say("after")
    assert terminal.getvalue().endswith("after\n")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (67, "1:07 min"), (7500, "2:05:00 h")]
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
