"""Histories of some users in flat arrays: what a data folder gives and every batch is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from findrec.datasets.splits import Int64Array


@dataclass(frozen=True)
class Histories:
    """Events of some users: row r owns `offset[r]:offset[r+1]`, oldest first.

    The first offset need not be 0: some rows of many share the arrays of all (`rows`).
    """

    item: Int64Array  # [N] 1-based ids
    timestamp: Int64Array  # [N] seconds
    offset: Int64Array  # [R+1]
    event: Int64Array | None = None  # [N] codes of `Manifest.event_types`, -1 unknown; None: no such column

    def rows(self, begin: int, end: int) -> Histories:
        """Rows `[begin, end)`; nothing is copied."""
        return Histories(self.item, self.timestamp, self.offset[begin : end + 1], self.event)

    def from_zero(self) -> Histories:
        """The same events with offsets that count from 0, and no others."""
        a, b = self.offset[0], self.offset[-1]
        event = None if self.event is None else self.event[a:b]
        return Histories(self.item[a:b], self.timestamp[a:b], self.offset - a, event)

    def take(self, place: NDArray[np.intp], offset: Int64Array) -> Histories:
        """The events at `place`, cut into users by `offset`."""
        event = None if self.event is None else self.event[place]
        return Histories(self.item[place], self.timestamp[place], offset, event)
