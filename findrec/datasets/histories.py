"""Histories of some users in flat arrays: what a data folder gives and every batch is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from findrec.datasets.splits import Int64Array


@dataclass(frozen=True)
class Histories:
    """Events of some users: row r owns `offset[r]:offset[r+1]`, oldest first."""

    item: Int64Array  # [N] 1-based ids
    timestamp: Int64Array  # [N] seconds
    offset: Int64Array  # [R+1]
    event: Int64Array | None = None  # [N] codes of `Manifest.event_types`, -1 unknown; None: no such column

    def take(self, place: NDArray[np.intp], offset: Int64Array) -> Histories:
        """The events at `place`, cut into users by `offset`."""
        event = None if self.event is None else self.event[place]
        return Histories(self.item[place], self.timestamp[place], offset, event)
