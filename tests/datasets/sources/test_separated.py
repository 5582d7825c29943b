"""Quotes in separated files: rows lost to a quoted field are counted, and DuckDB's reason is passed on."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import duckdb
import pytest
from small_recipe import events_by_user, small_recipe

from findrec.datasets.prepare.pipeline import prepare
from findrec.datasets.sources import bad_rows, separated
from findrec.datasets.sources.duckdb_engine import Limits
from findrec.datasets.sources.formats import SourceTables
from findrec.datasets.sources.recipe import Recipe, SourceFile
from findrec.errors import FindRecError

EVENTS = 'SELECT "user", item, timestamp FROM {log}'


def titles(count: int, **odd: str) -> list[str]:
    """Titles of `count` rows; `odd` has those of rows `r7`."""
    return [odd.get(f"r{n}", "song") for n in range(count)]


def log_recipe(folder: Path, titles: list[str], kind: str = "csv", share: float = 0.0, **keys: Any) -> Recipe:
    """A log with the column `title` before the time."""
    delimiter = "," if kind == "csv" else "\t"
    rows = [["user", "item", "title", "timestamp"]]
    rows += [[f"u{n % 5}", f"i{n}", title, str(n)] for n, title in enumerate(titles)]
    (folder / "log.txt").write_text("\n".join(map(delimiter.join, rows)) + "\n")
    files = {"log": {"member": "log.txt", "format": kind, **keys}}
    return small_recipe(folder, files=files, events=EVENTS, max_bad_rows=share)


TWO_STRAY = {"r50": '"song', "r150": 'song"'}


@pytest.mark.parametrize("odd", [TWO_STRAY, {"r50": '"song'}, {"r50": '"so"ng'}])
def test_quotes_in_a_tsv_are_plain_characters(tmp_path: Path, odd: dict[str, str]) -> None:
    folder = prepare(log_recipe(tmp_path, titles(200, **odd), "tsv"), tmp_path / "data")
    assert folder.manifest.num_events == 200
    assert folder.manifest.filtered == {"read": 200}


@pytest.mark.parametrize(
    ("count", "odd", "lost", "message"),
    [
        (200, TWO_STRAY, 101, r"line 52: a quoted field goes on for 101 lines"),
        (30_000, {"r25000": '"song', "r25100": 'song"'}, 101, r"line 25,002: a quoted field goes on for 101"),
        (200, {"r50": '"song', "r51": 'song"'}, 2, r"line 52: a quoted field goes on for 2 lines"),
        (200, {"r50": '"song'}, 150, r"line 52: Value with unterminated quote"),
        (200, {"r50": '"song', "r150": '"song'}, 101, r"line 52: Value with unterminated quote"),
        (30_000, {"r25000": '"song'}, 5000, r"line 25,002: Value with unterminated quote"),
        (200, {"r50": '"so"ng'}, 1, r"line 52: Value with unterminated quote"),
        (200, {"r50": 'so"ng'}, 0, ""),
    ],
)
def test_rows_lost_to_a_quoted_field_are_bad_rows(
    tmp_path: Path, count: int, odd: dict[str, str], lost: int, message: str
) -> None:
    rows = titles(count, **odd)
    if lost:
        message = rf"{lost:,} of {count:,} rows of file 'log'.*log\.txt {message}.*set `quote: ''`"
        with pytest.raises(FindRecError, match=message):
            prepare(log_recipe(tmp_path, rows), tmp_path / "data")
    folder = prepare(log_recipe(tmp_path, rows, share=0.9), tmp_path / "lenient")
    assert folder.manifest.filtered == {"read": count - lost} | ({"bad_rows": lost} if lost else {})
    kept = {item for history in events_by_user(folder).values() for item, _ in history}
    first = next((int(name[1:]) for name in odd), 0)
    assert kept >= {f"i{n}" for n in range(first)}
    assert prepare(log_recipe(tmp_path, rows, quote=""), tmp_path / "plain").manifest.num_events == count


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize("options", ["", ", header=true"])
def test_rows_lost_where_the_sql_reads_the_file(tmp_path: Path, kind: str, options: str) -> None:
    log_recipe(tmp_path, titles(200, **TWO_STRAY), kind)
    files = {"log": {"member": "log.txt"}}
    events = EVENTS.replace("{log}", f"read_csv({{log}}{options})")
    with pytest.raises(FindRecError, match=r"101 of 200 rows of file 'log'.*line 52: a quoted field"):
        prepare(small_recipe(tmp_path, files=files, events=events), tmp_path / "data")
    events = EVENTS.replace("{log}", "read_csv({log}, quote='')")
    folder = prepare(small_recipe(tmp_path, files=files, events=events), tmp_path / "data")
    assert folder.manifest.num_events == 200


def test_lines_that_duckdb_does_not_report_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["store_rejects=true", "max_line_size=1024", "buffer_size=4096"]
    monkeypatch.setattr(separated, "_STORE", options)
    recipe = log_recipe(tmp_path, titles(600, r50='"song'), share=0.99)
    folder = prepare(recipe, tmp_path / "data")
    assert sum(folder.manifest.filtered.values()) == 600
    assert folder.manifest.filtered["bad_rows"] > 1


def test_texts_of_several_lines_are_no_lost_rows(tmp_path: Path) -> None:
    texts = [
        '"one\ntwo"',
        '"a, b, c\nd, e, f\ng"',
        '"1,2\n3,4\n5,6"',
        '"x\n\ny"',
        '"he said ""no""\n, twice"',
    ]
    folder = prepare(log_recipe(tmp_path, texts * 20), tmp_path / "data")
    assert folder.manifest.filtered == {"read": 100}


def test_quote_and_escape(tmp_path: Path) -> None:
    def rows(data: str, **keys: Any) -> list[tuple[Any, ...]]:
        (tmp_path / "log.txt").write_text(data)
        db = duckdb.connect()
        tables = SourceTables(db, tmp_path, "mine", 0.0)
        tables.declare("log", SourceFile.model_validate(keys), [tmp_path / "log.txt"])
        tables.load()
        return db.execute(tables.fill("SELECT * FROM {log}")).fetchall()

    expected = [(1, "a,\"b'"), (2, "c")]
    assert rows("u,i\n1,'a,\"b'''\n2,c\n", format="csv", quote="'") == expected
    assert rows("u,i\n1,'a,\"b\\''\n2,c\n", format="csv", quote="'", escape="\\") == expected
    assert rows('u\ti\n1\t"a,""b\'"\n2\tc\n', format="tsv", quote='"') == expected
    assert rows("u:token\ti:token\n1\t'a\tb'\n", format="recbole", quote="'") == [("1", "a\tb")]
    columns = {"u": "BIGINT", "i": "VARCHAR"}
    assert rows('1\t"a\n2\tc"\n', format="tsv", header=False, columns=columns) == [(1, '"a'), (2, 'c"')]


@pytest.mark.parametrize("keys", [{"quote": "'"}, {"format": "jsonl", "escape": "'"}])
def test_quote_needs_a_separated_format(tmp_path: Path, keys: dict[str, str]) -> None:
    with pytest.raises(FindRecError, match="quote"):
        small_recipe(tmp_path, files={"log": {"member": "log.csv", **keys}})


def test_a_row_with_two_extra_fields_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,timestamp\n1,2,3\n1,2,4,5,6\n1,2,3\n")
    recipe = small_recipe(tmp_path, files={"log": {"member": "log.csv", "format": "csv"}}, events=EVENTS)
    with pytest.raises(FindRecError, match=r"1 of 3 rows .*log\.csv line 3: Expected Number of Columns: 3"):
        prepare(recipe, tmp_path / "data")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("kind", "data", "user"),
    [
        ("recbole", b"user_id:token\titem:token\ttimestamp:float\n1\t2\t1\n", "user_id"),
        ("csv", b"user_id,item,timestamp\n1,2,1\n", "user_id"),
        ("tsv", b"user_id\titem\ttimestamp\n1\t2\t1\n", "user_id"),
        ("jsonl", b'{"user_id": 1, "item": 2, "timestamp": 1}\n', "user_id"),
        ("loose_json", b"{'user_id': 1, 'item': 2, 'timestamp': 1}\n", "user_id"),
        ("sequences", b"1 2\n", '"user"'),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_file(
    tmp_path: Path, mark: bytes, kind: str, data: bytes, user: str
) -> None:
    (tmp_path / "log.gz").write_bytes(gzip.compress(mark + data, mtime=0))
    files = {"log": {"member": "log.gz", "format": kind}}
    events = f'SELECT {user} AS "user", item, timestamp FROM {{log}}'
    folder = prepare(small_recipe(tmp_path, files=files, events=events), tmp_path / "data")
    assert events_by_user(folder) == {"1": [("2", 1)]}


@pytest.mark.parametrize("kind", ["csv", "tsv", "recbole", "jsonl", "sequences"])
def test_twenty_compressed_files_fit_into_two_gib(tmp_path: Path, kind: str) -> None:
    rows = {
        "csv": "user,item,timestamp\n1,{n},3\n",
        "tsv": "user\titem\ttimestamp\n1\t{n}\t3\n",
        "recbole": "user:token\titem:token\ttimestamp:float\n1\t{n}\t3\n",
        "jsonl": '{{"user": 1, "item": {n}, "timestamp": 3}}\n',
        "sequences": "u{n} {n}\n",
    }
    for n in range(20):
        (tmp_path / f"log-{n}.gz").write_bytes(gzip.compress(rows[kind].format(n=n).encode(), mtime=0))
    files = {"log": {"member": "log-*.gz", "format": kind}}
    recipe = small_recipe(tmp_path, files=files, events=EVENTS)
    for number, limits in enumerate([Limits(2, 4), Limits(0.25, 2)]):
        assert prepare(recipe, tmp_path / f"data{number}", limits=limits).manifest.num_events == 20


@pytest.mark.parametrize("kind", ["csv", "tsv", "recbole", "jsonl", "sequences", "own csv"])
@pytest.mark.parametrize("threads", [1, 2])
def test_no_row_is_lost_where_buffers_meet(tmp_path: Path, kind: str, threads: int) -> None:
    count, filling = 300_000, "x" * 110
    row, header = {
        "csv": ("{n},{filling},{n}\n", "user,item,timestamp\n"),
        "own csv": ("{n},{filling},{n}\n", "user,item,timestamp\n"),
        "tsv": ("{n}\t{filling}\t{n}\n", "user\titem\ttimestamp\n"),
        "recbole": ("{n}\t{filling}\t{n}\n", "user:token\titem:token\ttimestamp:float\n"),
        "jsonl": ('{{"user": {n}, "item": "{filling}", "timestamp": {n}}}\n', ""),
        "sequences": ("{n} {filling}\n", ""),
    }[kind]
    text = header + "".join(row.format(n=n, filling=filling) for n in range(count))
    assert len(text) > 2 * bad_rows.LONGEST_LINE
    (tmp_path / "log.txt").write_text(text)
    db = duckdb.connect()
    db.execute(f"SET threads = {threads}")
    tables = SourceTables(db, tmp_path, "mine", 0.0)
    file = SourceFile() if kind == "own csv" else SourceFile.model_validate({"format": kind})
    tables.declare("log", file, [tmp_path / "log.txt"])
    source = "read_csv({log})" if kind == "own csv" else "{log}"
    query = f'SELECT count(*), sum(CAST("user" AS BIGINT)) FROM {source}'
    tables.fill(query, ())
    tables.load()
    assert db.execute(tables.fill(query)).fetchall() == [(count, count * (count - 1) // 2)]


def test_a_line_of_eight_mib(tmp_path: Path) -> None:
    items = " ".join(str(n) for n in range(1_200_000))
    assert 8 << 20 < len(items) < bad_rows.LONGEST_LINE
    (tmp_path / "s.txt").write_text(f"u {items}\n")
    files = {"log": {"member": "s.txt", "format": "sequences"}}
    folder = prepare(
        small_recipe(tmp_path, files=files, events=EVENTS), tmp_path / "data", limits=Limits(1, 2)
    )
    assert folder.manifest.num_events == 1_200_000


def test_duckdbs_reason_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user,item,timestamp\n1,2,3\n")
    (tmp_path / "b.csv").write_text("user,thing\n1,2\n")
    files = {"log": {"member": "*.csv", "format": "csv"}}
    with pytest.raises(FindRecError, match=r"cannot be read as csv: .*b\.csv.*schema mismatch"):
        prepare(small_recipe(tmp_path, files=files, events=EVENTS), tmp_path / "data")
