"""Events that users add while a service runs, in an SQLite file.

`append` returns once the events are committed to disk, so a process that is killed afterwards loses none of
them, and the next one that opens the file has them. Items and users are stored by raw id, so that the file
outlives the model: events of items that a later model does not know are left out of its histories.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


class StoreError(OSError):
    """The events cannot be read or stored now, e.g. because the disk is full."""


@dataclass(frozen=True)
class SentEvent:
    """One event that a client sends."""

    item: str  # raw id
    time: int | None  # seconds; None: the time at which it is stored
    event: str | None = None  # its type
    key: str | None = None  # chosen by the client: a second event of the user with it is not stored


@dataclass(frozen=True)
class Event(SentEvent):
    """One event of a user."""

    time: int


@dataclass(frozen=True)
class Append:
    """Events to add to a user, oldest first.

    `latest` is the time of the user's last event in the data of the run; None for a user who has none there.
    """

    user: str
    events: Sequence[SentEvent]
    latest: int | None


class EventStore:
    """The events of one SQLite file; its methods may be called from several threads."""

    def __init__(self, path: Path) -> None:
        """Open or create the file; raises `FindRecError` if it cannot be used."""
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)  # personal data; SQLite gives its other files the same rights
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
        user, not at all. An event without a time gets the time now, or that of the last event if it is later.

        Raises `StoreError`, as all methods do, if the file cannot be used.
        """
        with self._opened() as file:
            file.execute("BEGIN IMMEDIATE")
            try:
                done = [self._add(one) for one in batch]
                file.execute("COMMIT")
            except BaseException:
                if file.in_transaction:  # SQLite may have rolled it back, e.g. on a full disk
                    file.execute("ROLLBACK")
                raise
        return done

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """The file for one caller at a time; its errors become `StoreError`."""
        with self._lock:
            try:
                yield self._file
            except sqlite3.Error as error:
                raise StoreError(f"{self.path}: {error}") from error

    def _add(self, one: Append) -> int | FindRecError:
        keys = [event.key for event in one.events if event.key is not None]
        marks = ",".join("?" * len(keys))
        query = f"SELECT key FROM events WHERE user = ? AND key IN ({marks})"
        known = {row[0] for row in self._file.execute(query, (one.user, *keys))}
        sent, seen = [], set(known)
        for event in one.events:
            if event.key is None or event.key not in seen:
                sent.append(event)
                seen.add(event.key)
        row = self._file.execute("SELECT max(time) FROM events WHERE user = ?", (one.user,)).fetchone()
        last = max((time for time in (one.latest, row[0]) if time is not None), default=None)
        # Chosen here, not when the request came: another one of the user may have been stored since.
        now, rows = int(time.time()), []
        for event in sent:
            at = event.time if event.time is not None else now if last is None else max(now, last)
            if last is not None and at < last:
                return FindRecError(
                    f"the event of item {event.item!r} at {at} s is earlier than the last event of user "
                    f"{one.user!r}, at {last} s: events are appended in the order of their times"
                )
            rows.append((one.user, event.item, at, event.event, event.key))
            last = at
        self._file.executemany(
            "INSERT INTO events (user, item, time, event, key) VALUES (?, ?, ?, ?, ?)",
            rows,
        )
        return len(rows)

    def of(self, user: str) -> list[Event]:
        """The events of a user, oldest first."""
        with self._opened() as file:
            rows = file.execute(
                "SELECT item, time, event, key FROM events WHERE user = ? ORDER BY number", (user,)
            ).fetchall()
        return [Event(*row) for row in rows]

    def has(self, user: str) -> bool:
        """Whether the user has events."""
        with self._opened() as file:
            row = file.execute("SELECT 1 FROM events WHERE user = ? LIMIT 1", (user,)).fetchone()
        return row is not None

    def users(self, beginning: str, limit: int) -> list[str]:
        """The first users with events whose ids begin with `beginning`."""
        # A range, for which the index is used; 1114111 is the last code point.
        query = (
            "SELECT DISTINCT user FROM events WHERE user >= ?1 AND user < ?1 || char(1114111) "
            "ORDER BY user LIMIT ?2"
        )
        with self._opened() as file:
            rows = file.execute(query, (beginning, limit)).fetchall()
        return [row[0] for row in rows]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()
