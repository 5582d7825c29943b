"""Prints warnings about a running training, each once."""

from __future__ import annotations

from collections.abc import Iterable

from findrec.progress import warn


class OneTimeWarnings:
    """Remembers which warnings were printed."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def show(self, step: int, warnings: Iterable[tuple[str, str]]) -> None:
        """Print the message of each `(key, message)` whose key is new."""
        for key, message in warnings:
            if key not in self._warned:
                self._warned.add(key)
                warn(f"WARNING step {step}: {message}")
