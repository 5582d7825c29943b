"""Filters of a recipe on small logs, compared with the same rules in plain Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from small_recipe import events_by_user, small_recipe

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.splits import Split
from findrec.datasets.prepare.pipeline import prepare
from findrec.datasets.sources import filters
from findrec.datasets.sources.recipe import Recipe
from findrec.errors import FindRecError

Event = tuple[int, int, int, int]  # user, item, timestamp, value
Make = Callable[..., DataFolder]


def log(events: int = 400, seed: int = 0) -> list[Event]:
    """Few users and items, so that a core removes several layers; times in file order but for ties."""
    rng = np.random.default_rng(seed)
    users = np.minimum(rng.geometric(0.05, events), 60)
    items = np.minimum(rng.geometric(0.06, events), 50)
    times = np.sort(rng.integers(0, 300, events))
    values = rng.integers(1, 6, events)
    return list(zip(*(column.tolist() for column in (users, items, times, values)), strict=True))


def recipe_of(folder: Path, rows: list[Event], **keys: Any) -> Recipe:
    folder.mkdir()
    lines = ["user,item,timestamp,value", *(",".join(map(str, event)) for event in rows)]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    return small_recipe(folder, **{"events": "SELECT * FROM read_csv({log}, header=true)"} | keys)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Prepare a log with the given recipe keys."""
    return lambda rows, **keys: prepare(recipe_of(tmp_path / "raw", rows, **keys), tmp_path / "data")


def read(folder: DataFolder) -> list[tuple[str, str, int]]:
    """(user, item, timestamp) by raw ids, sorted."""
    return sorted((user, *event) for user, events in events_by_user(folder).items() for event in events)


def raw(events: list[Event]) -> list[tuple[str, str, int]]:
    return sorted((str(u), str(i), t) for u, i, t, _ in events)


def core_of(events: list[Event], users: int, items: int) -> list[Event]:
    while True:
        by_user, by_item = Counter(e[0] for e in events), Counter(e[1] for e in events)
        kept = [e for e in events if by_user[e[0]] >= users and by_item[e[1]] >= items]
        if len(kept) == len(events):
            return kept
        events = kept


@pytest.mark.parametrize(("users", "items"), [(3, 3), (6, 4), (1, 8), (9, 1)])
def test_core_is_a_fixed_point(make: Make, users: int, items: int) -> None:
    folder = make(log(), k_core={"users": users, "items": items})
    expected = core_of(log(), users, items)
    assert 0 < len(expected) < len(log())
    assert read(folder) == raw(expected)
    assert folder.manifest.filtered == {"read": 400, "k_core": 400 - len(expected)}


def test_core_of_a_temporal_split_counts_only_training_events(make: Make) -> None:
    split = {"kind": "global_temporal", "valid_from": 180, "test_from": 240}
    folder = make(log(), k_core={"users": 4, "items": 3}, split=split)
    core = core_of([e for e in log() if e[2] < 180], 4, 3)
    users = {e[0] for e in core}
    later = [e for e in log() if e[2] >= 180 and e[0] in users]
    assert read(folder) == raw(core + later)
    cold = {str(e[1]) for e in later} - {str(e[1]) for e in core}
    assert cold  # kept, and known by their training count
    counts = dict(zip(folder.items["raw"].to_pylist(), folder.train_count[1:].tolist(), strict=True))
    assert {item for item, count in counts.items() if not count} == cold


def test_core_of_the_past_does_not_depend_on_the_future(tmp_path: Path) -> None:
    split = {"kind": "global_temporal", "valid_from": 180, "test_from": 240}
    changed = [(u, (i * 7) % 50, t, v) if t >= 180 else (u, i, t, v) for u, i, t, v in log()]
    pasts = []
    for name, events in (("one", log()), ("two", changed)):
        recipe = recipe_of(tmp_path / name, events, k_core={"users": 4, "items": 3}, split=split)
        folder = prepare(recipe, tmp_path / f"{name}-data")
        pasts.append([row for row in read(folder) if row[2] < 180])
    assert pasts[0] == pasts[1]


def test_quantiles_become_times_of_the_log(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(log(), split={"kind": "global_temporal", "quantiles": [0.5, 0.75]})
    split = folder.manifest.split
    times = np.array([t for _, _, t, _ in log()])
    for share, time in zip(split["quantiles"], (split["valid_from"], split["test_from"]), strict=True):
        assert (times < time).mean() <= share < (times <= time).mean() + 1e-9
    assert folder.valid_start.sum() == (times < split["valid_from"]).sum()
    untrained, not_evaluated = int((folder.valid_start == 0).sum()), int((folder.test_start == 0).sum())
    assert untrained > 0
    output = capsys.readouterr().out
    assert f"not in the training: {untrained} users with no event before it ends" in output
    assert (
        f"not in the test: {not_evaluated} of {folder.num_users} users with no event before the test"
        in output
    )


@pytest.mark.parametrize("bins", [1, 2, 7, 1 << 16])
@pytest.mark.parametrize("shares", [(0.1, 0.5), (0.8, 0.9), (0.001, 0.999)])
def test_quantiles_equal_those_of_duckdb(
    bins: int, shares: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filters, "TIME_BINS", bins)
    db = duckdb.connect()
    rng = np.random.default_rng(0)
    for count, span in ((1, 5), (2, 1), (10, 3), (1000, 50), (1000, 10**12)):
        times = rng.integers(-span, span, count)
        rows = ", ".join(f"({time})" for time in times.tolist())
        db.execute(f"CREATE OR REPLACE TABLE log AS SELECT * FROM (VALUES {rows}) t(timestamp)")
        split = filters.resolve_cuts(db, Split(kind="global_temporal", quantiles=shares))
        disc = [
            db.execute(f"SELECT quantile_disc(timestamp, {share!r}) FROM log").fetchall()[0][0]
            for share in shares
        ]
        assert [split.valid_from, split.test_from] == disc


def test_min_value_is_applied_before_duplicates(make: Make) -> None:
    events = [(1, 5, 10, 2), (1, 5, 10, 4), (1, 5, 10, 5), (1, 5, 11, 5), (2, 5, 10, 5), (2, 6, 10, 1)]
    folder = make(events, min_value=3, duplicates="drop")
    assert read(folder) == [("1", "5", 10), ("1", "5", 11), ("2", "5", 10)]
    assert folder.manifest.filtered == {"read": 6, "min_value": 2, "duplicates": 1}


def test_duplicates_are_kept_and_reported_by_default(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make([(1, 5, 10, 2), (1, 5, 10, 4), (1, 6, 11, 4)])
    assert folder.manifest.num_events == 3
    assert "1 of 3 events repeat" in capsys.readouterr().out


def test_another_event_type_is_not_a_duplicate(make: Make) -> None:
    rows = "VALUES (1, 7, 1, 'view'), (1, 7, 1, 'buy'), (1, 7, 1, 'buy')"
    events = f"SELECT * FROM ({rows}) t(user, item, timestamp, event)"
    assert make([], events=events, duplicates="drop").manifest.num_events == 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"min_value": 9}, "no events are left of 400 read.*400 removed by min_value.*lower.*min_value"),
        ({"k_core": {"users": 999}}, "removed by k_core"),
        ({"min_events": 999}, "min_events=999"),
        ({"min_value": 2, "events": "SELECT 1 AS user, 1 AS item, 1 AS timestamp"}, "needs a column `value`"),
        ({"split": {"kind": "global_temporal", "valid_from": 0, "test_from": 9}}, "no event is earlier"),
    ],
)
def test_no_events_left_is_reported(make: Make, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(FindRecError, match=message):
        make(log(), **keys)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_filters_change_the_hash_but_their_defaults_do_not(tmp_path: Path) -> None:
    plain = recipe_of(tmp_path / "a", [])
    assert plain.sha256() == plain.model_copy(update={"duplicates": "keep", "k_core": None}).sha256()
    hashes = {
        plain.model_copy(update=change).sha256()
        for change in ({}, {"duplicates": "drop"}, {"min_value": 0.0}, {"min_value": 1.0})
    }
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"7,7\n", r"user,item,timestamp,value.*A malformed row.*`format: csv`"),
        (b"7,caf\xe9,7,7\n", r"(?s)Line: 40\d.*log\.csv.*`encoding`"),
    ],
)
def test_bad_rows_read_by_the_sql_are_reported(tmp_path: Path, line: bytes, message: str) -> None:
    recipe = recipe_of(tmp_path / "raw", log())
    with (tmp_path / "raw/log.csv").open("ab") as out:
        out.write(line)
    with pytest.raises(FindRecError, match=message):
        prepare(recipe, tmp_path / "data")
