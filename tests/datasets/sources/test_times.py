"""Times with parts of seconds: order and cuts use all digits, data folders store the seconds rounded down."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest
from small_recipe import events_by_user, small_recipe

from findrec.datasets.folder.splits import Split
from findrec.datasets.prepare.pipeline import prepare
from findrec.datasets.sources.times import before_sql, fraction_sql, has_fraction, seconds_sql
from findrec.errors import FindRecError

SECOND = 1_600_000_000


def times(sql: str) -> tuple[int, int]:
    """Seconds and nanoseconds of the value of an SQL expression."""
    db = duckdb.connect()
    kind = db.execute(f"DESCRIBE SELECT {sql} AS t").fetchall()[0][1]
    row = db.execute(f"SELECT {seconds_sql('t', kind)}, {fraction_sql('t', kind)} FROM (SELECT {sql} AS t)")
    seconds, nanoseconds = row.fetchall()[0]
    assert has_fraction(kind) or nanoseconds == 0
    return seconds, nanoseconds


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("1600000000", (SECOND, 0)),
        ("CAST(7 AS UTINYINT)", (7, 0)),
        ("CAST(1600000000.7 AS DOUBLE)", (SECOND, 700_000_000)),
        ("CAST(1599999999.9999998 AS DOUBLE)", (SECOND - 1, 999_999_000)),
        ("CAST(-0.25 AS DOUBLE)", (-1, 750_000_000)),
        ("CAST(1600000000000 AS DOUBLE)", (1000 * SECOND, 0)),
        ("CAST('nan' AS DOUBLE)", (None, None)),
        ("1600000000.123456789", (SECOND, 123_456_789)),
        ("-0.5", (-1, 500_000_000)),
        ("'1600000000.6'", (SECOND, 600_000_000)),
        ("CAST('1600000000.6' AS JSON)", (SECOND, 600_000_000)),
        ("TIMESTAMP '2020-09-13 12:26:40.65'", (SECOND, 650_000_000)),
        ("TIMESTAMP '1969-12-31 23:59:59.25'", (-1, 250_000_000)),
        ("TIMESTAMP 'infinity'", (None, None)),
        ("CAST('2020-09-13 12:26:40.123456789' AS TIMESTAMP_NS)", (SECOND, 123_456_789)),
        ("CAST('2020-09-13 12:26:40.123' AS TIMESTAMP_MS)", (SECOND, 123_000_000)),
        ("DATE '2020-09-13'", (SECOND - 44_800, 0)),
    ],
)
def test_each_type(sql: str, expected: tuple[int, int]) -> None:
    assert times(sql) == expected


@pytest.mark.parametrize(
    ("time", "exact", "expected"),
    [(5, True, [True, True, False, False]), (Decimal("5.5"), True, [True, True, True, False])],
)
def test_conditions_of_a_cut(time: Any, exact: bool, expected: list[bool]) -> None:
    rows = "(VALUES (4, 999), (4, 0), (5, 499999999), (5, 500000000)) t(timestamp, fraction)"
    found = duckdb.sql(f"SELECT {before_sql(time, exact)} FROM {rows}").fetchall()
    assert [row[0] for row in found] == expected
    assert duckdb.sql(f"SELECT {before_sql(Decimal('4.5'), False)} FROM {rows}").fetchall()[0][0]


def write_log(folder: Path, kind: str, stamps: list[str]) -> dict[str, Any]:
    """A log of one user per letter with these times, newest first; returns the keys of its recipe."""
    rows = [f"u{n % 2}\ti{n}\t{stamp}" for n, stamp in reversed(list(enumerate(stamps)))]
    if kind == "recbole":
        text = "user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(rows)
        (folder / "log.inter").write_text(text)
        files = {"log": {"member": "log.inter", "format": "recbole"}}
        return {"files": files, "events": "SELECT user_id AS user, item_id AS item, timestamp FROM {log}"}
    (folder / "log.csv").write_text("user,item,timestamp\n" + "\n".join(rows).replace("\t", ","))
    files = {"log": {"member": "log.csv"} | ({"format": "csv"} if kind == "csv" else {})}
    return {"files": files, "events": "SELECT * FROM " + ("{log}" if kind == "csv" else "read_csv({log})")}


@pytest.mark.parametrize("kind", ["recbole", "csv", "read_csv"])
@pytest.mark.parametrize("ties", ["row", "shuffle"])
def test_events_within_a_second_keep_their_order(tmp_path: Path, kind: str, ties: str) -> None:
    keys = write_log(tmp_path, kind, [f"{SECOND}.{n}" for n in range(10)])
    folder = prepare(small_recipe(tmp_path, **keys, ties=ties), tmp_path / "data")
    expected = {f"u{u}": [(f"i{n}", SECOND) for n in range(u, 10, 2)] for u in (0, 1)}
    assert events_by_user(folder) == expected
    assert folder.manifest.tie_rate == 0


@pytest.mark.parametrize(
    ("cut", "trained"),
    [(SECOND, 2), ("2020-09-13T12:26:40", 2), (f"{SECOND}.5", 3), ("2020-09-13T12:26:40.500", 3)],
)
def test_an_event_just_before_a_cut_is_for_training(tmp_path: Path, cut: Any, trained: int) -> None:
    stamps = [f"{SECOND - 1}.7", f"{SECOND - 1}.9", f"{SECOND}.499", f"{SECOND}.5", f"{SECOND + 1}.5"]
    split = {"kind": "global_temporal", "valid_from": cut, "test_from": SECOND + 1}
    recipe = small_recipe(tmp_path, **write_log(tmp_path, "csv", stamps), split=split)
    folder = prepare(recipe, tmp_path / "data")
    assert int(folder.valid_start.sum()) == trained
    assert int(folder.test_start.sum()) == 4


def test_quantiles_within_a_second(tmp_path: Path) -> None:
    keys = write_log(tmp_path, "csv", [f"{SECOND}.{n}" for n in range(10)])
    split = {"kind": "global_temporal", "quantiles": [0.5, 0.8]}
    folder = prepare(small_recipe(tmp_path, **keys, split=split), tmp_path / "data")
    assert folder.valid_start.tolist() == [2, 2]
    assert folder.test_start.tolist() == [4, 3]
    assert folder.manifest.split["valid_from"] == SECOND + 0.4


def test_duplicates_are_events_of_the_same_time(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,timestamp\n1,5,7.1\n1,5,7.1\n1,5,7.2\n1,6,8.0\n")
    folder = prepare(small_recipe(tmp_path), tmp_path / "kept")
    assert folder.manifest.duplicates == 1
    folder = prepare(small_recipe(tmp_path, duplicates="drop"), tmp_path / "dropped")
    assert events_by_user(folder) == {"1": [("5", 7), ("5", 7), ("6", 8)]}


def test_the_core_is_counted_before_the_exact_cut(tmp_path: Path) -> None:
    keys = write_log(tmp_path, "csv", ["1.0", "2.0", "5.2", "5.3", "5.8", "9.0"])
    split = {"kind": "global_temporal", "valid_from": 5.25, "test_from": 6}
    folder = prepare(
        small_recipe(tmp_path, **keys, split=split, k_core={"users": 2, "items": 1}), tmp_path / "data"
    )
    assert events_by_user(folder) == {"u0": [("i0", 1), ("i2", 5), ("i4", 5)]}


def test_cut_times_keep_their_digits() -> None:
    tree = {"kind": "global_temporal", "valid_from": 1628643414.042, "test_from": "2022-07-16T20:18:49.837"}
    split = Split.model_validate(tree)
    assert (split.valid_from, split.test_from) == (Decimal("1628643414.042"), Decimal("1658002729.837"))
    assert split.model_dump(mode="json")["valid_from"] == 1628643414.042
    assert Split.model_validate(split.model_dump(mode="json")) == split
    whole = Split.model_validate(tree | {"valid_from": 5.0, "test_from": "1970-01-02"})
    assert [repr(t) for t in (whole.valid_from, whole.test_from)] == ["5", "86400"]


@pytest.mark.parametrize("missing", ["-9223372036854775808", "-9223372037", "nan", "1600000000000000000"])
def test_missing_and_absurd_times_are_refused(tmp_path: Path, missing: str) -> None:
    (tmp_path / "log.csv").write_text(f"user,item,timestamp\n1,5,7\n1,6,{missing}\n1,7,9\n")
    split = {"kind": "global_temporal", "quantiles": [0.6, 0.8]}
    with pytest.raises(FindRecError, match=r"1 events have (a timestamp such as|no user, item or timestamp)"):
        prepare(small_recipe(tmp_path, split=split), tmp_path / "data")
