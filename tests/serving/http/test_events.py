"""Appended events are kept in order, once each, by every process that opens the file."""

from __future__ import annotations

import sqlite3
import stat
from pathlib import Path

import pytest

from findrec.errors import FindRecError
from findrec.serving.http.events import Append, Event, EventStore, SentEvent, StoreError


def test_events_are_kept_in_order_across_restarts(tmp_path: Path):
    store = EventStore(tmp_path / "new" / "events.sqlite")
    one, two = [Event("a", 5), Event("b", 5, "buy")], [Event("a", 9, None, "k")]
    assert store.append([Append("u", one, None), Append("v", two, 3)]) == [2, 1]
    assert store.append([Append("u", two, None)]) == [1]
    store.close()
    again = EventStore(tmp_path / "new" / "events.sqlite")
    assert again.of("u") == [*one, *two]
    assert (again.of("v"), again.of("w")) == (two, [])
    assert (again.has("v"), again.has("w")) == (True, False)
    assert again.users("", 10) == ["u", "v"]
    assert again.users("v", 10) == ["v"]
    assert again.users("%", 10) == []
    again.close()


def test_an_event_with_a_known_key_is_stored_once(tmp_path: Path):
    store = EventStore(tmp_path / "events.sqlite")
    sent = [Event("a", 1, None, "1"), Event("b", 2, None, "2"), Event("b", 2)]
    assert store.append([Append("u", sent, None)]) == [3]
    assert store.append([Append("u", sent, None)]) == [1]  # the one without a key
    twice = [Event("c", 7, None, "3"), Event("c", 7, None, "3")]
    assert store.append([Append("u", twice, None), Append("v", sent[:1], None)]) == [1, 1]
    assert [event.item for event in store.of("u")] == ["a", "b", "b", "b", "c"]


def test_events_out_of_order_are_refused_as_a_whole(tmp_path: Path):
    store = EventStore(tmp_path / "events.sqlite")
    good = Append("u", [Event("a", 10)], 10)
    bad = [
        Append("u", [Event("b", 11), Event("c", 9)], None),
        Append("u", [Event("b", 9)], None),  # the first of the batch is at 10
        Append("v", [Event("b", 9)], 10),  # earlier than the data
    ]
    done = store.append([good, *bad, good])
    assert done[0] == done[4] == 1
    for error in done[1:4]:
        assert isinstance(error, FindRecError)
        assert "is earlier than the last event of user" in str(error)
    assert [event.item for event in store.of("u")] == ["a", "a"]
    assert store.of("v") == []


def test_an_event_without_a_time_is_never_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As when an event of the next second is stored before one that arrived in this second."""
    store = EventStore(tmp_path / "events.sqlite")
    clock = iter([100.9, 99.5, 200.0])
    monkeypatch.setattr("findrec.serving.http.events.time.time", lambda: next(clock))
    for item in ("a", "b", "c"):
        assert store.append([Append("u", [SentEvent(item, None)], 50)]) == [1]
    assert [(one.item, one.time) for one in store.of("u")] == [("a", 100), ("b", 100), ("c", 200)]
    clock = iter([40.0])
    assert store.append([Append("v", [SentEvent("a", None), SentEvent("b", 60)], 50)]) == [2]
    assert [one.time for one in store.of("v")] == [50, 60]


def test_users_are_found_by_the_index(tmp_path: Path):
    store = EventStore(tmp_path / "events.sqlite")
    names = ["an", "anna", "ann\U0001f600", "ao", "b%", "Anna", "ängel"]
    store.append([Append(name, [Event("a", 1)], None) for name in names])
    for beginning in ("", "a", "an", "ann", "b%", "%", "ä", "ann\U0001f600"):
        assert store.users(beginning, 10) == sorted(name for name in names if name.startswith(beginning))
    asked: list[str] = []
    store._file.set_trace_callback(asked.append)
    store.users("an", 10)
    (plan,) = store._file.execute(f"EXPLAIN QUERY PLAN {asked[0]}").fetchall()
    assert "INDEX of_user (user>? AND user<?)" in plan[3]


def test_only_the_owner_reads_the_file(tmp_path: Path):
    store = EventStore(tmp_path / "events.sqlite")
    store.append([Append("u", [Event("a", 1)], None)])
    files = list(tmp_path.iterdir())
    assert len(files) == 3  # with the log and its index
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_files_that_cannot_be_used(tmp_path: Path):
    (tmp_path / "file").write_text("no database, but long enough to be taken for one" * 20)
    for path in (tmp_path / "file", tmp_path / "file" / "inside", tmp_path):
        with pytest.raises(FindRecError, match="the events of users cannot be kept in"):
            EventStore(path)
    newer = sqlite3.connect(tmp_path / "newer")
    newer.execute("PRAGMA user_version=2")
    newer.close()
    with pytest.raises(FindRecError, match="newer version"):
        EventStore(tmp_path / "newer")


def test_a_failing_disk_is_reported_and_nothing_is_half_stored(tmp_path: Path):
    store = EventStore(tmp_path / "events.sqlite")
    store._file.execute("PRAGMA max_page_count=8")
    many = Append("u", [Event("x" * 200, 1) for _ in range(500)], None)
    with pytest.raises(StoreError, match="full"):
        store.append([Append("v", [Event("a", 1)], None), many])
    assert (store.of("u"), store.of("v")) == ([], [])
    assert store.append([Append("v", [Event("a", 1)], None)]) == [1]
