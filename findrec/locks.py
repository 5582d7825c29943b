"""Locks between processes that name who holds them."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from findrec.errors import FindRecError
from findrec.progress import say

_HELD: set[tuple[int, Path]] = set()  # thread and lock


@contextmanager
def holding(
    folder: Path, work: str, *, wait: bool, on_error: Callable[[OSError], FindRecError]
) -> Iterator[None]:
    """Hold the lock of a folder: the file `.NAME.lock` beside it, removed at the end.

    A thread may hold a lock several times; the lock of a killed process is released.

    Args:
        folder: The folder, which need not exist.
        work: What the lock is for, as in "writing data/ml-100k", for messages to others.
        wait: Wait with a message while another process or thread holds the lock, instead of raising.
        on_error: Makes the error to raise if the lock file cannot be written.

    Raises:
        FindRecError: If another process or thread holds the lock, with its name, or by `on_error`.
    """
    lock = folder.parent.resolve() / f".{folder.name}.lock"
    held = threading.get_ident(), lock
    if held in _HELD:
        yield
        return
    file = FileLock(lock, poll_interval=0.05)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            file.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise FindRecError(
                    f"{_holder(lock)} is {work}: wait until it ends, or use another name"
                ) from None
            say(f"waiting for {_holder(lock)}, which is {work}")
            file.acquire()
        lock.write_text(
            f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%H:%M:%S')})\n"
        )
    except OSError as error:
        file.release()
        raise on_error(error) from error
    _HELD.add(held)
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()  # while it is held: filelock notices if it has opened a deleted file
        _HELD.discard(held)
        file.release()


def remove_abandoned_lock(folder: Path) -> None:
    """Remove the lock file of a folder if the process that held it was killed."""
    lock = folder.parent.resolve() / f".{folder.name}.lock"
    with suppress(OSError, Timeout):
        if lock.exists():
            with FileLock(lock, timeout=0):
                lock.unlink()


def _holder(lock: Path) -> str:
    try:
        text = lock.read_text(encoding="utf-8", errors="replace")[:200]
    except OSError:
        text = ""
    return "".join(c for c in text if c.isprintable()).strip() or "another process"
