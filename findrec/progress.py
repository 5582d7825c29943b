"""Reports the progress of long operations: a live bar on a terminal, occasional plain lines elsewhere.

Logs of Ray jobs, CI and redirected output are not terminals, and a bar would print thousands of lines there.
Instead the first line is printed at once, later ones at growing intervals, and the last one with the
duration. `FINDREC_QUIET=1` silences both, but no warning. Only one process should report; others
pass `show=False`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.segment import Segment

from findrec.text import printable

FIRST_GAP_S = 5.0
GAP_GROWTH = 1.5
LARGEST_GAP_S = 60.0

_lock = threading.RLock()
_live: Progress | None = None  # shared by nested bars, as a terminal can have only one live display
_live_users = 0


def quiet() -> bool:
    """Whether output is switched off (`FINDREC_QUIET` is set to anything but an empty string or 0)."""
    return os.environ.get("FINDREC_QUIET", "") not in ("", "0")


class Console(RichConsole):
    """A console on which text of foreign files cannot control the terminal or show credentials."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The parts of what is printed, made printable."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(printable(part.text), part.style)


def say(line: str) -> None:
    """Print one line unless quiet, above the live bar if there is one.

    The line is flushed, as logs are read live.
    """
    if not quiet():
        _print(line)


def warn(line: str) -> None:
    """Print a line like `say`, but to stderr when quiet: something is left out, slow or not as requested."""
    if quiet():
        print(printable(line), file=sys.stderr, flush=True)
    else:
        _print(line)


def _print(line: str) -> None:
    line = printable(line)
    with _lock:
        if _live is not None:
            _live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)


def format_seconds(seconds: float) -> str:
    """`3.2 s`, `1:07 min` or `2:05:00 h`, whichever reads best."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h"


def format_utc(seconds: float, pattern: str = "%Y-%m-%d %H:%M:%S") -> str:
    """Format a Unix time as UTC, or as a number if it is out of range (not every log uses Unix time)."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime(pattern)
    except (OverflowError, OSError, ValueError):
        return str(seconds)


def _format_value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _format_rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


class Bar:
    """Progress of one operation. `advance` and `note` may be called from any thread."""

    def __init__(self, what: str, total: int | None, unit: str, clock: Callable[[], float]) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.done = 0
        self._clock = clock
        self._start = clock()
        self._notes: dict[str, object] = {}
        self._shown = False
        self.after_s = 0.0  # nothing is shown before this many seconds have passed

    def advance(self, count: int = 1) -> None:
        """Add `count` finished units."""
        with _lock:
            self.done += count
            self._update()

    def note(self, **values: object) -> None:
        """Show named values beside the count (`loss=2.31`); `eta=` in seconds replaces the estimate."""
        with _lock:
            self._notes.update(values)
            self._update()

    def seconds(self) -> float:
        """Seconds since the bar began."""
        return self._clock() - self._start

    def _rate(self) -> float:
        return self.done / max(self.seconds(), 1e-9)

    def _eta(self) -> str | None:
        eta = self._notes.get("eta")
        if eta is not None:
            return format_seconds(float(eta)) if isinstance(eta, int | float) else str(eta)
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
        """Show the current status if it is due; the base class prints nothing."""

    def _begin(self) -> None:
        """Show that the operation has started."""

    def _end(self, failed: bool) -> None:
        """Show that the operation has ended, with its duration."""

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
    """Prints plain lines at growing intervals."""

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
    """Report the progress of an operation called `what`.

    Used as `with progress("encode", total=n) as bar: bar.advance(k)`. `total` is the expected number of
    units; if it is None, no percentage and no remaining time are shown. With `show=False` (ranks other
    than 0) or `FINDREC_QUIET` nothing is printed, and nothing before `after_s` seconds have passed, so
    that short operations print no line. `clock` returns seconds.
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
