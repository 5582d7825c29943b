"""Summarises a data folder: its dates, the sizes of its split, and the users and items left out."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from findrec.datasets.folder.data_folder import DataFolder
from findrec.progress import format_utc


class PartSize(BaseModel):
    """Users and events of one part of the split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    users: int  # training: with training events; validation and test: that are evaluated
    events: int


class Overview(BaseModel):
    """Dates, split sizes, and users and items without a part in them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first_time: int  # seconds since 1970, of the first event
    last_time: int
    split: str  # the kind of the split
    parts: dict[str, PartSize]  # training, validation, test
    users: int
    not_trained: int  # users without an event before the split's first cut
    not_tested: dict[str, int]  # reason -> number of users
    items_without_events: int
    items: int

    def lines(self) -> list[str]:
        """The overview as text, one statement a line."""
        days = (self.last_time - self.first_time) / 86_400
        parts = (f"{name} {part.events:,} of {part.users:,} users" for name, part in self.parts.items())
        lines = [
            f"from {format_utc(self.first_time)} to {format_utc(self.last_time)} ({days:,.1f} days)",
            f"split {self.split}, events: {', '.join(parts)}",
        ]
        if self.not_trained:
            lines.append(f"not in the training: {self.not_trained:,} users with no event before it ends")
        lines += [
            f"not in the test: {count:,} of {self.users:,} users with {why}"
            for why, count in self.not_tested.items()
        ]
        if self.items_without_events:
            lines.append(f"{self.items_without_events:,} of {self.items:,} items have no event")
        return lines


def overview(folder: DataFolder) -> Overview:
    """Measure a data folder in one pass over its events."""
    first, last = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    occurs = np.zeros(folder.num_items + 1, dtype=bool)
    for block in folder.blocks():
        occurs[block.item] = True
        first = min(first, int(block.timestamp.min(initial=first)))
        last = max(last, int(block.timestamp.max(initial=last)))
    valid, test, length = folder.valid_start, folder.test_start, folder.length
    parts = {
        "training": PartSize(users=int((valid > 0).sum()), events=int(valid.sum())),
        "validation": _part((test > valid) & (valid > 0), test - valid),
        "test": _part((length > test) & (test > 0), length - test),
    }
    split = folder.manifest.split
    reasons = {
        _no_test_event(split): int((length == test).sum()),
        "no event before the test begins": int(((length > test) & (test == 0)).sum()),
    }
    return Overview(
        first_time=first,
        last_time=last,
        split=str(split.get("kind", "leave_one_out")),
        parts=parts,
        users=folder.num_users,
        not_trained=int((valid == 0).sum()),
        not_tested={why: count for why, count in reasons.items() if count},
        items_without_events=int((~occurs[1:]).sum()),
        items=folder.num_items,
    )


def _part(users: Any, events: Any) -> PartSize:
    return PartSize(users=int(users.sum()), events=int(events[users].sum()))


def _no_test_event(split: dict[str, Any]) -> str:
    """Why a user has no test event under this split."""
    if split.get("kind") == "global_temporal":
        return f"no event from {format_utc(int(split['test_from']))} on, where the test begins"
    unit = "timestamp" if split.get("unit") == "timestamp" else "event"
    return f"a single {unit}, which is for training"
