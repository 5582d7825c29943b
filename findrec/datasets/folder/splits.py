"""Split each history into training, validation and test events."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, model_validator

Int64Array = NDArray[np.int64]


def _seconds(value: Any) -> Any:
    """Convert a date or time (UTC by default) to seconds since 1970; other values are unchanged."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return value
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if isinstance(value, datetime):
        value = value if value.tzinfo else value.replace(tzinfo=UTC)
        value = Decimal((value - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)) / 10**6
    if isinstance(value, float) and math.isfinite(value):
        value = Decimal(repr(value))
    if isinstance(value, Decimal) and value == int(value):
        return int(value)
    return value


def _as_number(value: int | Decimal) -> int | float:
    return float(value) if isinstance(value, Decimal) else value


Seconds = Annotated[
    int | Decimal, BeforeValidator(_seconds), PlainSerializer(_as_number, return_type=int | float)
]


class Split(BaseModel):
    """Which events are used for training, validation and test.

    * `leave_one_out`: a user's last unit is for test, the one before it for validation, the rest for
      training.
    * `global_temporal`: the same two times for all users: training before `valid_from`, test from `test_from`
      on, validation in between. The times are given, or computed as `quantiles` of the times of all events.
      No training event is later than a target; a user may have no events in any of the parts.
    * `per_user_ratio`: each user's units are divided in order by `ratio` (rounded down, but at least one
      training unit; the rest is for test).
    * `tail`: a user's `last` units are for validation and then test, each predicted from all earlier events;
      at least one unit is for training, and the test has priority over the validation.

    A unit is one event, or all events of one timestamp (a basket), whose order is arbitrary: splitting a
    basket would leak part of the target. Global times never split a basket.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["leave_one_out", "global_temporal", "per_user_ratio", "tail"] = "leave_one_out"
    unit: Literal["event", "timestamp"] = "event"
    valid_from: Seconds | None = None
    test_from: Seconds | None = None
    quantiles: tuple[float, float] | None = None  # default: 0.8 and 0.9
    ratio: tuple[int, int, int] | None = None  # training, validation, test; default: 7, 2, 1
    last: tuple[int, int] | None = None  # units of validation and of test; default: 5, 10

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, tree: Any) -> Any:
        if isinstance(tree, dict):
            if tree.get("kind") == "global_temporal" and not {"valid_from", "test_from"} & set(tree):
                return {"quantiles": (0.8, 0.9), **tree}
            if tree.get("kind") == "per_user_ratio":
                return {"ratio": (7, 2, 1), **tree}
            if tree.get("kind") == "tail":
                return {"last": (5, 10), **tree}
        return tree

    @model_validator(mode="after")
    def _check(self) -> Split:
        times = (self.valid_from, self.test_from)
        if self.kind != "global_temporal" and (self.quantiles, *times) != (None, None, None):
            raise ValueError("valid_from, test_from and quantiles require kind global_temporal")
        if self.kind != "per_user_ratio" and self.ratio is not None:
            raise ValueError("ratio requires kind per_user_ratio")
        if self.kind != "tail" and self.last is not None:
            raise ValueError("last requires kind tail")
        if self.kind == "tail" and (self.last is None or self.last[0] < 0 or self.last[1] < 1):
            raise ValueError("last needs two whole numbers, validation 0 or more and test above 0")
        num_times = sum(time is not None for time in times)
        given = (num_times, self.quantiles is None)
        if self.kind == "global_temporal" and given not in ((2, True), (0, False)):
            raise ValueError("global_temporal needs both valid_from and test_from, or quantiles")
        if self.quantiles is not None and not 0 < self.quantiles[0] < self.quantiles[1] < 1:
            raise ValueError("quantiles must increase and lie between 0 and 1, such as [0.8, 0.9]")
        if times[0] is not None and times[1] is not None and times[0] > times[1]:
            raise ValueError("valid_from must not be later than test_from")
        if self.ratio is not None and (min(self.ratio) < 0 or self.ratio[0] < 1 or self.ratio[2] < 1):
            raise ValueError("ratio needs three whole numbers, training and test above 0")
        return self


def unit_starts(timestamp: Int64Array, offset: Int64Array, unit: str) -> NDArray[np.bool_]:
    """`[N]` True where a unit begins. `offset` is `[R+1]`: user r owns events `offset[r]:offset[r+1]`."""
    begins = np.ones(len(timestamp), dtype=bool)
    if unit == "timestamp":
        begins[1:] = timestamp[1:] != timestamp[:-1]
        begins[offset[:-1][np.diff(offset) > 0]] = True
    return begins


def cut(
    split: Split, timestamp: Int64Array, offset: Int64Array, fraction: NDArray[np.integer[Any]] | None = None
) -> tuple[Int64Array, Int64Array]:
    """Compute `valid_start` and `test_start` `[R]`, counted from each user's first event.

    `fraction` has the events' nanoseconds beyond `timestamp`, which global times are compared with too.
    A user with one unit has only training events; one with two has a test but no validation (`valid_start ==
    test_start`). With a global split, `valid_start` is 0 for users without a training event.
    """
    if split.kind == "global_temporal":
        valid_start = _events_before(split.valid_from, timestamp, offset, fraction)
        return valid_start, _events_before(split.test_from, timestamp, offset, fraction)
    length = np.diff(offset)
    starts = np.flatnonzero(unit_starts(timestamp, offset, split.unit))
    first_unit = np.searchsorted(starts, offset[:-1])
    units = np.diff(np.append(first_unit, len(starts)))
    if split.last is not None:
        valid, test = split.last
        test_unit = np.maximum(units - test, 1)
        valid_unit = np.maximum(test_unit - valid, 1)
    elif split.ratio is None:
        test_unit, valid_unit = np.maximum(units - 1, 1), np.maximum(units - 2, 1)
    else:
        train, valid, test = split.ratio
        valid_unit = np.maximum(units * train // (train + valid + test), 1)
        test_unit = np.maximum(units * (train + valid) // (train + valid + test), valid_unit)
    edges = np.append(starts, offset[-1])

    def event_index(unit: Int64Array) -> Int64Array:
        inside: Int64Array = edges[first_unit + np.minimum(unit, units)] - offset[:-1]
        return np.where(unit >= units, length, inside).astype(np.int64)

    return event_index(valid_unit), event_index(test_unit)


def _events_before(
    time: int | Decimal | None,
    timestamp: Int64Array,
    offset: Int64Array,
    fraction: NDArray[np.integer[Any]] | None,
) -> Int64Array:
    """`[R]` number of each user's events before `time`."""
    if time is None:
        raise ValueError("the quantiles of a global_temporal split must first be converted to times")
    whole = math.floor(time)
    is_before = timestamp < whole
    if time != whole:
        nanoseconds = int((time - whole) * 10**9)
        is_before |= (timestamp == whole) & (True if fraction is None else fraction < nanoseconds)
    before = np.concatenate([[0], np.cumsum(is_before)])
    count: Int64Array = (before[offset[1:]] - before[offset[:-1]]).astype(np.int64)
    return count
