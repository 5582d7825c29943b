"""Users of the data of a run, named by raw id or listed in a file, with their histories up to a time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from findrec.datasets.encoders.ready_vectors import read_ids
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.histories import Histories
from findrec.errors import FindRecError
from findrec.evaluation.scoring.users import IntArray, user_rows
from findrec.progress import warn
from findrec.serving.query_blocks import Asked
from findrec.serving.stored import open_stored


def users_of(
    run_folder: Path, named: Sequence[str], file: Path | None, column: str | None = None
) -> list[str]:
    """Raw ids of the users named and listed in a file, in their order and without duplicates.

    The file `all` stands for all users of the run's data.
    """
    if not named and file is None:
        raise FindRecError("no users: name them with --user ID, --users FILE or --users all")
    listed: list[str] = []
    if file is not None and str(file) == "all" and not file.is_file():
        listed = open_stored(run_folder).data.user_ids
    elif file is not None:
        ids = read_ids(file.expanduser().resolve(), column, default="user", report=True)
        listed = [stripped for one in ids if (stripped := one.strip())]
    return list(dict.fromkeys([*named, *listed]))


def read_users(folder: DataFolder, names: Sequence[str], time: int | None, *, lenient: bool = False) -> Asked:
    """Users of a data folder with all their events, or those up to `time` (s), which is then the query time.

    With `lenient`, unknown users and users without an event at `time` are left out with a warning; otherwise
    they raise `FindRecError`.
    """
    rows = user_rows(folder, _known(folder, names) if lenient else names)
    if lenient and time is not None:
        rows = _started(folder, rows, time)
    stop_B, time_B = _query_times(folder, rows, time)

    def histories(part: IntArray) -> Histories:
        return folder.histories(rows[part], np.zeros_like(part), stop_B[part])

    return Asked([folder.user_ids[row] for row in rows.tolist()], stop_B, time_B, histories, rows)


def parse_time(text: str) -> int:
    """Parse seconds since 1970, or an ISO 8601 date or time (UTC unless it has a time zone)."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        time = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        raise FindRecError(
            f"{text!r} is not a time: give seconds since 1970 or e.g. 2024-05-01 or 2024-05-01T12:00:00"
        ) from None
    return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())


def _known(folder: DataFolder, users: Sequence[str]) -> list[str]:
    known = set(folder.user_ids)
    found = [user for user in users if user in known]
    if found and len(found) < len(users):
        missing = next(user for user in users if user not in known)
        warn(f"{len(users) - len(found):,} of {len(users):,} users are not in the data, e.g. {missing!r}")
    return found or list(users)  # none known: an error


def _started(folder: DataFolder, rows: IntArray, time: int) -> IntArray:
    """The users with an event at the query time or before; all if there is none."""
    past = folder.histories(rows, np.zeros_like(rows), np.ones_like(rows))
    started = past.timestamp <= time
    if started.any() and not started.all():
        warn(f"{int((~started).sum()):,} of {len(rows):,} users have no event before the query time")
    return rows[started] if started.any() else rows


def _query_times(folder: DataFolder, users: IntArray, time: int | None) -> tuple[IntArray, IntArray]:
    """Number of known events and query time of each user, `[B]` each."""
    past = folder.histories(users)
    stop, query_time = [], []
    for row, begin, end in zip(users.tolist(), past.offset[:-1], past.offset[1:], strict=True):
        times = past.timestamp[begin:end]
        stop.append(len(times) if time is None else int(np.searchsorted(times, time, side="right")))
        query_time.append(int(times[-1]) if time is None else time)
        if not stop[-1]:
            raise FindRecError(
                f"user {folder.user_ids[row]!r} has no event before the query time ({query_time[-1]} s; the "
                f"first is at {int(times[0])} s). Give a later --at"
            )
    return np.array(stop, dtype=np.int64), np.array(query_time, dtype=np.int64)
