"""Where each history is cut into training, validation and test events."""

from __future__ import annotations

from datetime import date, datetime, timezone
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

Int64Array = NDArray[np.int64]


def _seconds(given: Any) -> Any:
    """A date or time of YAML (UTC where it names no zone) as seconds since 1970."""
    if isinstance(given, str):
        try:
            given = datetime.fromisoformat(given)
        except ValueError:
            return given
    if isinstance(given, date) and not isinstance(given, datetime):
        given = datetime(given.year, given.month, given.day)
    if isinstance(given, datetime):
        given = given if given.tzinfo else given.replace(tzinfo=timezone.utc)
        return int(given.timestamp())
    return given


Seconds = Annotated[int, BeforeValidator(_seconds)]


class Split(BaseModel):
    """What is trained on, chosen by and tested on.

    * `leave_one_out`: a user's last unit is the test, the one before it the validation, the rest training.
    * `global_temporal`: training before `valid_from`, test from `test_from` on, validation between them: two
      times for everyone, given, or found as `quantiles` of all events' times. Nothing learnt is later than
      what is asked for; a user may have no event in a part.
    * `per_user_ratio`: the first of each user's units are training, then validation, then test, as `ratio`
      says (rounded down, at least one training unit; the rest is the test's).
    * `tail`: a user's `last` units are validation and, after them, test, each of them asked for with all that
      came before it as history; one unit at least is training, and the test takes its share first.

    A unit is one event, or all events of one timestamp (a basket): inside a basket the order says nothing,
    and a basket cut in two would show half of the answer. A time never cuts a basket.
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
            raise ValueError("valid_from, test_from and quantiles belong to kind global_temporal")
        if self.kind != "per_user_ratio" and self.ratio is not None:
            raise ValueError("ratio belongs to kind per_user_ratio")
        if self.kind != "tail" and self.last is not None:
            raise ValueError("last belongs to kind tail")
        if self.kind == "tail" and (self.last is None or self.last[0] < 0 or self.last[1] < 1):
            raise ValueError("last needs two whole numbers, validation 0 or more and test above 0")
        given = sum(time is not None for time in times)
        if self.kind == "global_temporal" and (given, self.quantiles is None) not in ((2, True), (0, False)):
            raise ValueError("global_temporal needs both valid_from and test_from, or quantiles")
        if self.quantiles is not None and not 0 < self.quantiles[0] < self.quantiles[1] < 1:
            raise ValueError("quantiles must rise between 0 and 1, such as [0.8, 0.9]")
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


def cut(split: Split, timestamp: Int64Array, offset: Int64Array) -> tuple[Int64Array, Int64Array]:
    """`(valid_start, test_start)`, each `[R]`, counted from the user's first event.

    A user without events has no part. Units are cut so: with one unit everything is training, with two there
    is a test but no validation (`valid_start == test_start`). A global split needs its two times, and gives
    `valid_start == 0` for users without a training event.
    """
    if split.kind == "global_temporal":
        return _events_before(split.valid_from, timestamp, offset), _events_before(
            split.test_from, timestamp, offset
        )
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

    def place(unit: Int64Array) -> Int64Array:
        inside: Int64Array = edges[first_unit + np.minimum(unit, units)] - offset[:-1]
        return np.where(unit >= units, length, inside).astype(np.int64)

    return place(valid_unit), place(test_unit)


def _events_before(time: int | None, timestamp: Int64Array, offset: Int64Array) -> Int64Array:
    """`[R]` how many of each user's events are earlier than `time`."""
    if time is None:
        raise ValueError("a global_temporal split by quantiles is resolved to times before it cuts")
    before = np.concatenate([[0], np.cumsum(timestamp < time)])
    count: Int64Array = (before[offset[1:]] - before[offset[:-1]]).astype(np.int64)
    return count
