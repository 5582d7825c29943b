"""Histories of users in flat arrays, as read from a data folder and used to build batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from findrec.datasets.folder.splits import Int64Array


@dataclass(frozen=True)
class Histories:
    """Events of R users: row r has `offset[r]:offset[r+1]`, oldest first.

    The first offset can be positive, as slices (`rows`) share the arrays of the original.
    """

    item: Int64Array  # [N] 1-based ids
    timestamp: Int64Array  # [N] seconds
    offset: Int64Array  # [R+1]
    event: Int64Array | None = None  # [N] codes of `Manifest.event_types`, -1 if unknown; None: no types

    def rows(self, begin: int, end: int) -> Histories:
        """Rows `[begin, end)`, as views."""
        return Histories(self.item, self.timestamp, self.offset[begin : end + 1], self.event)

    def from_zero(self) -> Histories:
        """The same rows with offsets from 0, without events outside the rows."""
        a, b = self.offset[0], self.offset[-1]
        event = None if self.event is None else self.event[a:b]
        return Histories(self.item[a:b], self.timestamp[a:b], self.offset - a, event)

    def take(self, index: NDArray[np.intp], offset: Int64Array) -> Histories:
        """The events at `index`, split into rows by `offset`."""
        event = None if self.event is None else self.event[index]
        return Histories(self.item[index], self.timestamp[index], offset, event)
