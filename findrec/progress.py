"""What the user sees while something takes long: a live bar on a terminal, throttled plain lines elsewhere.

Logs of Ray jobs, CI and redirected output are no terminals; there a bar would print thousands of lines, so
the first line comes at once, later ones at growing distances, and the last one says how long it took.
`FINDREC_QUIET=1` silences both. Only one process should report: others pass `show=False`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

FIRST_GAP_S = 5.0
GAP_GROWTH = 1.5
LARGEST_GAP_S = 60.0

_lock = threading.RLock()
_live: Progress | None = None  # one live display is shared by nested bars: a terminal can hold only one
_live_users = 0


def quiet() -> bool:
    """Whether the user asked for silence (`FINDREC_QUIET` set to anything but empty or 0)."""
    return os.environ.get("FINDREC_QUIET", "") not in ("", "0")


def say(line: str) -> None:
    """Print one line of commentary, above a live bar if there is one; flushed, as logs are read live."""
    if quiet():
        return
    with _lock:
        if _live is not None:
            _live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)


def format_seconds(seconds: float) -> str:
    """`3.2 s`, `1:07 min` or `2:05:00 h`, whichever reads best."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h"


def _format_value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _format_rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


class Bar:
    """One thing being counted. `advance` and `note` may be called from any thread."""

    def __init__(self, what: str, total: int | None, unit: str, clock: Callable[[], float]) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.done = 0
        self._clock = clock
        self._start = clock()
        self._notes: dict[str, object] = {}
        self._shown = False
        self.after_s = 0.0  # nothing is shown before so many seconds have passed

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        with _lock:
            self.done += count
            self._update()

    def note(self, **values: object) -> None:
        """Show named values beside the count (`loss=2.31`); `eta=` in seconds replaces our own estimate."""
        with _lock:
            self._notes.update(values)
            self._update()

    def seconds(self) -> float:
        """Seconds since the bar began."""
        return self._clock() - self._start

    def _rate(self) -> float:
        return self.done / max(self.seconds(), 1e-9)

    def _eta(self) -> str | None:
        given = self._notes.get("eta")
        if given is not None:
            return format_seconds(float(given)) if isinstance(given, int | float) else str(given)
        if not self.total or not self.done or self.done >= self.total:
            return None
        return format_seconds((self.total - self.done) / self._rate())

    def _status(self) -> str:
        count = f"{self.done:,}"
        if self.total:
            count = f"{self.done:,}/{self.total:,} {self.unit} ({self.done / self.total:.0%})"
        else:
            count = f"{count} {self.unit}"
        parts = [count]
        if self.done:
            parts.append(f"{_format_rate(self._rate())} {self.unit}/s")
        parts += [f"{key} {_format_value(value)}" for key, value in self._notes.items() if key != "eta"]
        eta = self._eta()
        if eta is not None:
            parts.append(f"{eta} left")
        return ", ".join(parts)

    def _update(self) -> None:
        if not self._shown and self.seconds() >= self.after_s:
            self._shown = True
            self._begin()
        if self._shown:
            self._show()

    def _finish(self, failed: bool) -> None:
        if self._shown:
            self._end(failed)

    def _show(self) -> None:
        """Tell the user, if it is time to; the base class is silent."""

    def _begin(self) -> None:
        """Announce the start."""

    def _end(self, failed: bool) -> None:
        """Announce the end, with the duration."""

    def _summary(self, failed: bool) -> str:
        took = format_seconds(self.seconds())
        notes = [f"{k} {_format_value(v)}" for k, v in self._notes.items() if k != "eta"]
        tail = f", {', '.join(notes)}" if notes else ""
        if failed:
            of = f" of {self.total:,}" if self.total else ""
            return f"{self.what}: stopped after {self.done:,}{of} {self.unit}, {took}{tail}"
        rate = f" ({_format_rate(self._rate())} {self.unit}/s)" if self.done else ""
        return f"{self.what}: {self.done:,} {self.unit} in {took}{rate}{tail}"


class _PlainBar(Bar):
    """Whole lines at growing distances."""

    _gap = FIRST_GAP_S
    _last = 0.0

    def _begin(self) -> None:
        size = f" {self.total:,} {self.unit}" if self.total else ""
        say(f"{self.what}:{size} ...")
        self._last = self._clock()

    def _show(self) -> None:
        now = self._clock()
        if now - self._last >= self._gap:
            self._last = now
            self._gap = min(self._gap * GAP_GROWTH, LARGEST_GAP_S)
            say(f"{self.what}: {self._status()}")

    def _end(self, failed: bool) -> None:
        say(self._summary(failed))


class _LiveBar(Bar):
    """A row of the shared rich display."""

    _task: TaskID | None = None

    def _begin(self) -> None:
        global _live, _live_users
        if _live is None:
            _live = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}", markup=False),
                console=Console(),
                transient=True,
            )
            _live.start()
        _live_users += 1
        self._task = _live.add_task(self.what, total=self.total, status="")

    def _show(self) -> None:
        if _live is not None and self._task is not None:
            _live.update(self._task, completed=self.done, status=self._status())

    def _end(self, failed: bool) -> None:
        global _live, _live_users
        if _live is not None and self._task is not None:
            _live.remove_task(self._task)
            _live_users -= 1
            if _live_users == 0:
                _live.stop()
                _live = None
        say(self._summary(failed))


@contextmanager
def progress(
    what: str,
    total: int | None = None,
    unit: str = "items",
    *,
    show: bool = True,
    after_s: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Bar]:
    """Report how far `what` has come: `with progress("encode", total=n) as bar: bar.advance(k)`.

    `total` is the number of units expected (None when unknown: no share and no time left are shown).
    With `show=False` (ranks other than 0) or `FINDREC_QUIET` nothing is printed, and nothing before `after_s`
    seconds have passed: what is done by then is not worth a line. `clock` gives seconds.
    """
    kind = Bar if quiet() or not show else _LiveBar if sys.stdout.isatty() else _PlainBar
    with _lock:
        bar = kind(what, total, unit, clock)
        bar.after_s = after_s
        if not after_s:
            bar._shown = True
            bar._begin()
    failed = True
    try:
        yield bar
        failed = False
    finally:
        with _lock:
            bar._finish(failed)
