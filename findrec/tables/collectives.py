"""Records the collective calls of this process, so that a watcher can tell which worker did not join one.

On a CPU a worker waits inside the collective call. On a GPU the call returns at once, and the worker waits
later, wherever it first needs a result; the line it executes then does not show that it waits for others. But
all workers make the same calls in the same order, so the workers that have entered the fewest are those that
the others wait for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CollectiveRecord:
    """The collective calls that the training thread has entered and left."""

    def __init__(self) -> None:
        self.entered = 0  # number of calls entered, including those made inside of others
        self.last = ""  # the last call entered, after those it is inside of
        self._open: list[str] = []

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Record that the body makes the collective call `name`, which may consist of others."""
        self.entered += 1
        self._open.append(name)
        self.last = " > ".join(self._open)
        try:
            yield
        finally:
            self._open.pop()


COLLECTIVES = CollectiveRecord()  # of this process
