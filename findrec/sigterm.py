"""Replaces the handler of SIGTERM, which schedulers send before they take a machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def handles_sigterm(handler: Callable[..., Any]) -> Iterator[None]:
    """Call `handler` on SIGTERM inside the context. Does nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
