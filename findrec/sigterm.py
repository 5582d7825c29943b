"""Replaces the handlers of SIGTERM, which schedulers send before they take a machine away, and of SIGHUP."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def handles_sigterm(handler: Callable[..., Any]) -> Iterator[None]:
    """Call `handler` inside the context on SIGTERM, and on SIGHUP, which the end of a terminal sends.

    SIGHUP stays ignored if it is, as with `nohup`. Does nothing outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGHUP]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
