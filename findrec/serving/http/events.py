"""Events that users add while a service runs, in an SQLite file.

`append` returns once the events are committed to disk, so a process that is killed afterwards loses none of
them, and the next one that opens the file has them. Items and users are stored by raw id, so that the file
outlives the model: events of items that a later model does not know are left out of its histories.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from findrec.errors import FindRecError

VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    user TEXT NOT NULL,
    item TEXT NOT NULL,
    time INTEGER NOT NULL,
    event TEXT,
    key TEXT,
    UNIQUE (user, key)
);
CREATE INDEX IF NOT EXISTS of_user ON events (user, number);
"""


@dataclass(frozen=True)
class Event:
    """One event of a user."""

    item: str  # raw id
    time: int  # seconds
    event: str | None = None  # its type
    key: str | None = None  # chosen by the client: a second event of the user with it is not stored


@dataclass(frozen=True)
class Append:
    """Events to add to a user, oldest first.

    `latest` is the time of the user's last event in the data of the run; None for a user who has none there.
    """

    user: str
    events: Sequence[Event]
    latest: int | None


class EventStore:
    """The events of one SQLite file; its methods may be called from several threads."""

    def __init__(self, path: Path) -> None:
        """Open or create the file; raises `FindRecError` if it cannot be used."""
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=FULL")  # a commit returns when it is on disk
            version = int(self._file.execute("PRAGMA user_version").fetchone()[0])
            if version > VERSION:
                raise FindRecError(f"{path} was written by a newer version of FindRec: update it")
            self._file.executescript(_SCHEMA)
            self._file.execute(f"PRAGMA user_version={VERSION}")
        except (sqlite3.Error, OSError) as error:
            raise FindRecError(f"the events of users cannot be kept in {path}: {error}") from None

    def append(self, batch: Sequence[Append]) -> list[int | FindRecError]:
        """Add events, all in one commit; returns how many of each request were new.

        The events of a request are stored together or, if one of them is earlier than the last event of the
        user, not at all.
        """
        with self._lock:
            try:
                self._file.execute("BEGIN IMMEDIATE")
                try:
                    done = [self._add(one) for one in batch]
                    self._file.execute("COMMIT")
                except BaseException:
                    if self._file.in_transaction:  # SQLite may have rolled it back, e.g. on a full disk
                        self._file.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise OSError(f"{self.path}: {error}") from error
        return done

    def _add(self, one: Append) -> int | FindRecError:
        keys = [event.key for event in one.events if event.key is not None]
        marks = ",".join("?" * len(keys))
        query = f"SELECT key FROM events WHERE user = ? AND key IN ({marks})"
        known = {row[0] for row in self._file.execute(query, (one.user, *keys))}
        fresh, seen = [], set(known)
        for event in one.events:
            if event.key is None or event.key not in seen:
                fresh.append(event)
                seen.add(event.key)
        row = self._file.execute("SELECT max(time) FROM events WHERE user = ?", (one.user,)).fetchone()
        last = max((time for time in (one.latest, row[0]) if time is not None), default=None)
        for event in fresh:
            if last is not None and event.time < last:
                return FindRecError(
                    f"the event of item {event.item!r} at {event.time} s is earlier than the last event of "
                    "user "
                    f"{one.user!r}, at {last} s: events are appended in the order of their times"
                )
            last = event.time
        self._file.executemany(
            "INSERT INTO events (user, item, time, event, key) VALUES (?, ?, ?, ?, ?)",
            [(one.user, event.item, event.time, event.event, event.key) for event in fresh],
        )
        return len(fresh)

    def of(self, user: str) -> list[Event]:
        """The events of a user, oldest first."""
        with self._lock:
            rows = self._file.execute(
                "SELECT item, time, event, key FROM events WHERE user = ? ORDER BY number", (user,)
            ).fetchall()
        return [Event(*row) for row in rows]

    def has(self, user: str) -> bool:
        """Whether the user has events."""
        with self._lock:
            row = self._file.execute("SELECT 1 FROM events WHERE user = ? LIMIT 1", (user,)).fetchone()
        return row is not None

    def users(self, beginning: str, limit: int) -> list[str]:
        """The first users with events whose ids begin with `beginning`."""
        with self._lock:
            rows = self._file.execute(
                "SELECT DISTINCT user FROM events WHERE substr(user, 1, ?) = ? ORDER BY user LIMIT ?",
                (len(beginning), beginning, limit),
            ).fetchall()
        return [row[0] for row in rows]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()
