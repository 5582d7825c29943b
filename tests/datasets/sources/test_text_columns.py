"""Ids and texts stay as the files write them, whatever type DuckDB would guess."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import pytest
from small_recipe import events_by_user, small_recipe

from findrec.datasets.prepare.pipeline import prepare
from findrec.errors import FindRecError

EVENTS = 'SELECT "user", item, timestamp FROM '
ODD_IDS = [
    ["7.10", "7.1"],
    ["1e2", "100"],
    ["007", "7"],
    ["7.0", "7"],
    ["T", "F"],
    ["true", "True"],
    ["2020-1-2", "2020-01-02"],
    ["6F9619FF-8B86-D011-B42D-00CF4FC964FF", "6f9619ff-8b86-d011-b42d-00cf4fc964ff"],
    ["103563353519118155776", "103563353519118155777"],
    ["+7", "7"],
]


def write_csv(path: Path, ids: list[str]) -> None:
    rows = [f"{id_},{id_},{n}" for n, id_ in enumerate(ids)]
    path.write_text("\n".join(["user,item,timestamp", *rows]) + "\n")


@pytest.mark.parametrize(
    "kind", ["csv", "path", "own read_csv", "own read_csv with options", "jsonl", "typed jsonl"]
)
@pytest.mark.parametrize("ids", ODD_IDS, ids=lambda ids: ids[0])
def test_ids_are_text_as_written(tmp_path: Path, kind: str, ids: list[str]) -> None:
    file: dict[str, Any] = {"member": "log.csv"}
    if "jsonl" in kind:
        rows = [{"user": id_, "item": id_, "timestamp": n} for n, id_ in enumerate(ids)]
        (tmp_path / "log.csv").write_text("\n".join(map(json.dumps, rows)))
        types = {"user": "VARCHAR", "item": "VARCHAR", "timestamp": "BIGINT"}
        file |= {"format": "jsonl"} | ({"columns": types} if kind == "typed jsonl" else {})
        source = "{log}"
    else:
        write_csv(tmp_path / "log.csv", ids)
        file |= {"format": "csv"} if kind == "csv" else {}
        source = {"csv": "{log}", "path": "{log}", "own read_csv": "read_csv({log})"}.get(
            kind, "read_csv({log}, delim=',')"
        )
    recipe = small_recipe(tmp_path, files={"log": file}, events=EVENTS + source)
    assert events_by_user(prepare(recipe, tmp_path / "data")) == {
        id_: [(id_, n)] for n, id_ in enumerate(ids)
    }


def test_numbers_and_texts_of_json_are_the_same_ids(tmp_path: Path) -> None:
    big = 103563353519118155776
    rows = [
        {"user": 7, "item": big, "timestamp": 1},
        {"user": "7", "item": big + 1, "timestamp": 2},
        {"user": "7", "item": str(big), "timestamp": 3},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"log": {"member": "log.jsonl", "format": "jsonl"}}
    folder = prepare(small_recipe(tmp_path, files=files, events=EVENTS + "{log}"), tmp_path / "data")
    assert events_by_user(folder) == {"7": [(str(big), 1), (str(big + 1), 2), (str(big), 3)]}


@pytest.mark.parametrize("kind", ["jsonl", "loose_json"])
@pytest.mark.parametrize("columns", [None, {"user": "VARCHAR", "item": "VARCHAR", "timestamp": "BIGINT"}])
@pytest.mark.parametrize("odd", ["7.1", "7.0", "true", "[7]"])
def test_json_ids_that_are_no_text_or_integer_are_refused(
    tmp_path: Path, kind: str, columns: dict[str, str] | None, odd: str
) -> None:
    odd = "True" if (kind, odd) == ("loose_json", "true") else odd
    (tmp_path / "log.json").write_text(
        f'{{"user": "u", "item": {odd}, "timestamp": 1}}\n{{"user": "u", "item": 2, "timestamp": 2}}\n'
    )
    file = {"member": "log.json", "format": kind} | ({"columns": columns} if columns else {})
    with pytest.raises(FindRecError, match=r"'item' of log\.json holds .*: ids must be text or integers"):
        prepare(small_recipe(tmp_path, files={"log": file}, events=EVENTS + "{log}"), tmp_path / "data")


def test_other_fields_of_json_keep_their_guessed_types(tmp_path: Path) -> None:
    rows = [
        '{"user": 7.5, "t": "2020-09-13T12:26:40Z"}',
        "broken",
        '{"user": "x", "t": "1970-01-01T00:00:09Z"}',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(rows).replace("7.5", '"7.5"'))
    files = {"log": {"member": "log.jsonl", "format": "jsonl"}}
    events = "SELECT \"user\", 'i' AS item, t AS timestamp FROM {log}"
    folder = prepare(small_recipe(tmp_path, files=files, events=events, max_bad_rows=0.4), tmp_path / "data")
    assert events_by_user(folder) == {"7.5": [("i", 1_600_000_000)], "x": [("i", 9)]}


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("7.5::DOUBLE", "DOUBLE"),
        ("7.10::DECIMAL(4, 2)", r"DECIMAL\(4,2\)"),
        ("true", "BOOLEAN"),
        ("DATE '2020-01-02'", "DATE"),
        ("uuid()", "UUID"),
        ("'a'::BLOB", "BLOB"),
        ("[7]", r"INTEGER\[\]"),
    ],
)
@pytest.mark.parametrize("which", ["user", "item", "items"])
def test_other_types_are_refused(tmp_path: Path, value: str, kind: str, which: str) -> None:
    columns = {"user": "1", "item": "2", "about": "2"} | {"about" if which == "items" else which: value}
    duckdb.sql(
        f"SELECT {columns['user']} AS user, {columns['item']} AS item, 3 AS timestamp, "
        f"{columns['about']} AS about"
    ).write_parquet(str(tmp_path / "log.parquet"))
    recipe = small_recipe(
        tmp_path,
        files={"log": {"member": "log.parquet"}},
        events=EVENTS + "read_parquet({log})",
        items="SELECT about AS item, 't' AS title, 't' AS text FROM read_parquet({log})",
    )
    name = "user" if which == "user" else "item"
    with pytest.raises(FindRecError, match=rf"selects `{name}` of type {kind}.*must be text or integers"):
        prepare(recipe, tmp_path / "data")


def test_values_and_times_stay_numbers(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(
        "user,item,ms,stars,clicked\n07,1.50,7500,4.5,1\n07,1.5,9500,3,0\n7,1.5,3000,2,1\n"
    )
    recipe = small_recipe(
        tmp_path,
        files={"log": {"member": "log.csv", "format": "csv"}},
        events='SELECT "user", item, ms / 1000 AS timestamp, stars AS value FROM {log} WHERE clicked = 1',
        min_value=1,
    )
    assert events_by_user(prepare(recipe, tmp_path / "data")) == {"07": [("1.50", 7)], "7": [("1.5", 3)]}


def test_ids_of_a_union_and_a_join(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("uid,item,timestamp\n01,1.10,1\n")
    (tmp_path / "b.csv").write_text("who,item,timestamp\n1,1.1,2\n")
    (tmp_path / "names.csv").write_text("item,title\n1.10,007\n1.1,1e3\n")
    files = {name: {"member": f"{name}.csv", "format": "csv"} for name in ("a", "b", "names")}
    recipe = small_recipe(
        tmp_path,
        files=files,
        events='SELECT uid AS "user", item, timestamp FROM {a} JOIN {names} USING (item) UNION ALL '
        "SELECT who, item, timestamp FROM {b}",
        items="SELECT item, title, title || '.' AS text FROM {names}",
    )
    folder = prepare(recipe, tmp_path / "data")
    assert events_by_user(folder) == {"01": [("1.10", 1)], "1": [("1.1", 2)]}
    titles = dict(zip(folder.items["raw"].to_pylist(), folder.items["title"].to_pylist(), strict=True))
    assert titles == {"1.10": "007", "1.1": "1e3"}


def test_a_file_without_a_header_line(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("7.10,x,3\n7.1,y,4\n")
    events = 'SELECT column0 AS "user", column1 AS item, column2 AS timestamp FROM read_csv({log})'
    folder = prepare(small_recipe(tmp_path, events=events), tmp_path / "data")
    assert events_by_user(folder) == {"7.1": [("y", 4)], "7.10": [("x", 3)]}


def items_recipe(folder: Path, events: list[str], items: list[str], **keys: Any) -> Any:
    write_csv(folder / "log.csv", events)
    (folder / "about.csv").write_text("\n".join(["item,title", *(f"{item},T" for item in items)]) + "\n")
    files = {name: {"member": f"{name}.csv", "format": "csv"} for name in ("log", "about")}
    return small_recipe(
        folder,
        files=files,
        events=EVENTS + "{log}",
        items="SELECT item, title, title AS text FROM {about}",
        **keys,
    )


def test_items_without_a_row_and_rows_without_an_event_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(items_recipe(tmp_path, ["1", "2", "3"], ["3", "4", "5", "6"]), tmp_path / "data")
    assert "2 of 3 items of the events have no row in the items SQL, and 3 of its 4 rows no event" in (
        capsys.readouterr().out
    )
    prepare(items_recipe(tmp_path, ["1", "2"], ["1", "2"]), tmp_path / "data", force=True)
    assert "no row in the items SQL" not in capsys.readouterr().out


def test_items_that_match_no_event_are_an_error(tmp_path: Path) -> None:
    recipe = items_recipe(tmp_path, ["7.0", "8.0"], ["7", "8"])
    with pytest.raises(
        FindRecError, match=r"2 of 2 items .* written differently: '7.0', '8.0' in the events, '7'"
    ):
        prepare(recipe, tmp_path / "data")


@pytest.mark.parametrize("unmet", ["keep", "drop"])
def test_rows_without_an_item_are_an_error(tmp_path: Path, unmet: str) -> None:
    recipe = items_recipe(tmp_path, ["1", "2"], ["1", ""], unmet_items=unmet)
    with pytest.raises(FindRecError, match="1 rows of the items SQL have no item"):
        prepare(recipe, tmp_path / "data")


def test_values_as_text(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text('user,item,timestamp,value\n1,2,3,"4,5"\n1,3,4,"3,0"\n')
    with pytest.raises(FindRecError, match=r"the value '4,5', which is no number: .*replace"):
        prepare(small_recipe(tmp_path), tmp_path / "data")
    events = "SELECT * REPLACE (replace(value, ',', '.') AS value) FROM read_csv({log})"
    folder = prepare(small_recipe(tmp_path, events=events, min_value=4), tmp_path / "data")
    assert events_by_user(folder) == {"1": [("2", 3)]}
