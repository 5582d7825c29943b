"""Where each history is cut into training, validation and test events."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

Int64Array = NDArray[np.int64]


class Split(BaseModel):
    """Leave-one-out: a user's last unit is the test, the one before it the validation, the rest training.

    A unit is one event, or all events of one timestamp (a basket): inside a basket the order says nothing,
    and a basket cut in two would show half of the answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["leave_one_out"] = "leave_one_out"
    unit: Literal["event", "timestamp"] = "event"


def unit_starts(timestamp: Int64Array, offset: Int64Array, unit: str) -> NDArray[np.bool_]:
    """`[N]` True where a unit begins. `offset` is `[R+1]`: user r owns events `offset[r]:offset[r+1]`."""
    begins = np.ones(len(timestamp), dtype=bool)
    if unit == "timestamp":
        begins[1:] = timestamp[1:] != timestamp[:-1]
        begins[offset[:-1]] = True
    return begins


def cut(split: Split, timestamp: Int64Array, offset: Int64Array) -> tuple[Int64Array, Int64Array]:
    """`(valid_start, test_start)`, each `[R]`, counted from the user's first event.

    Every user has at least one event. With one unit everything is training, with two there is a test but
    no validation (`valid_start == test_start`).
    """
    length = np.diff(offset)
    starts = np.flatnonzero(unit_starts(timestamp, offset, split.unit))
    first_unit = np.searchsorted(starts, offset[:-1])
    units = np.diff(np.append(first_unit, len(starts)))
    last = first_unit + units - 1
    before = np.maximum(last - 1, 0)
    test_start = np.where(units >= 2, starts[last] - offset[:-1], length)
    valid_start = np.where(units >= 3, starts[before] - offset[:-1], test_start)
    return valid_start.astype(np.int64), test_start.astype(np.int64)
