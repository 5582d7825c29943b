"""Each format on small files: the rows that are read, and the report of bad rows."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from small_recipe import compress

from findrec.datasets.sources.formats import SourceTables
from findrec.datasets.sources.recipe import SourceFile
from findrec.errors import FindRecError

Read = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Rows of a file with the given bytes; `share` of them may be bad. Extra keys are the recipe's."""

    def rows(name: str, data: bytes, share: float = 1.0, **keys: Any) -> list[tuple[Any, ...]]:
        (tmp_path / name).write_bytes(data)
        db = duckdb.connect()
        tables = SourceTables(db, tmp_path, "mine", share)
        tables.declare("log", SourceFile.model_validate(keys), [tmp_path / name])
        tables.load()
        return db.execute(tables.fill("SELECT * FROM {log}")).fetchall()

    return rows


@pytest.mark.parametrize("kind", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("suffix", "keys", "data"),
    [
        ("csv", {"format": "csv"}, b'user,item,t\n1,"a,b",3\n2,c,4\n'),
        ("tsv", {"format": "tsv"}, b"user\titem\tt\n1\ta,b\t3\n2\tc\t4\n"),
        (
            "csv",
            {"format": "csv", "header": False, "columns": {"u": "BIGINT", "i": "VARCHAR", "t": "BIGINT"}},
            b'1,"a,b",3\n2,c,4\n',
        ),
        ("jsonl", {"format": "jsonl"}, b'{"u": 1, "i": "a,b", "t": 3}\n\n{"u": 2, "i": "c", "t": 4}\n'),
        (
            "json",
            {"format": "loose_json", "columns": {"u": "BIGINT", "i": "VARCHAR", "t": "BIGINT"}},
            b"{'u': 1, 'i': 'a,b', 'x': [None, True]}\n{'u': 2, 'i': 'c', 't': 4}\n".replace(
                b"'x'", b"'t': 3, 'x'"
            ),
        ),
    ],
)
def test_formats_and_compressions_give_the_same_rows(
    read: Read, kind: str, suffix: str, keys: dict[str, Any], data: bytes
) -> None:
    assert read(f"log.{suffix}{kind}", compress(kind, data), 0.0, **keys) == [(1, "a,b", 3), (2, "c", 4)]


@pytest.mark.parametrize("kind", ["", ".gz"])
def test_sequences_keep_their_order(read: Read, kind: str) -> None:
    data = b"10 5 6 5\r\n2\t8 9\n\n7,3,4 \n"
    assert read(f"s.txt{kind}", compress(kind, data), 0.0, format="sequences") == [
        ("10", "5", 1),
        ("10", "6", 2),
        ("10", "5", 3),
        ("2", "8", 1),
        ("2", "9", 2),
        ("7", "3", 1),
        ("7", "4", 2),
    ]


def test_a_long_history_is_one_line(read: Read) -> None:
    items = [str(n) for n in range(100_000)]
    rows = read("s.txt", (" ".join(["u", *items]) + "\n").encode(), format="sequences")
    assert [row[1] for row in rows] == items


def test_recbole_columns_have_bare_names_and_types(read: Read) -> None:
    data = b'user_id:token\titem_id:token\ttags:token_seq\ttimestamp:float\n07\t"x\ta b\t12.0\n'
    assert read("a.inter", data, 0.0, format="recbole") == [("07", '"x', "a b", 12.0)]


def test_several_files_become_one_table(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"{number}.csv").write_text(f"u,i\n{number},5\n")
    db = duckdb.connect()
    paths = [tmp_path / "1.csv", tmp_path / "2.csv"]
    tables = SourceTables(db, tmp_path, "mine", 0.0)
    tables.declare("log", SourceFile(format="csv"), paths)
    tables.load()
    query = tables.fill("SELECT * FROM {log}")
    assert db.execute(query).fetchall() == [(1, 5), (2, 5)]
    db.execute(f"COPY ({query}) TO '{tmp_path}/log.parquet'")
    tables = SourceTables(db, tmp_path, "mine", 0.0)
    tables.declare("same", SourceFile(format="parquet"), [tmp_path / "log.parquet"])
    tables.load()
    assert db.execute(tables.fill("SELECT * FROM {same}")).fetchall() == [(1, 5), (2, 5)]


BAD = [
    ("csv", b"u,i,t\n1,2,3\n1,2\n1,4,4\n", {"columns": {"i": "BIGINT"}}, "line 3: .*Columns.*'1,2'"),
    ("csv", b"u,i,t\n1,2,3\n1,x,3\n1,4,4\n", {"columns": {"i": "BIGINT"}}, "line 3: .*\"x\".*'1,x,3'"),
    (
        "csv",
        b"u,i,name\n1,2,a\n1,4,b\n1,2,caf\xe9\n",
        {},
        r"line 4: not UTF-8.*`encoding` \(such as latin-1\)",
    ),
    ("jsonl", b'{"u": 1}\n{"u": 2\n{"u": 3}\n', {}, "line 2: not JSON"),
    (
        "jsonl",
        b'{"u": 1}\n\n{"u": "\xe9"}\n{"u": 3}\n',
        {},
        "line 3: not UTF-8.*convert the file to UTF-8",
    ),
    ("jsonl", b'{"u": 1}\n[1]\n{"u": 3}\n', {"columns": {"u": "BIGINT"}}, "line 2: not an object"),
    (
        "loose_json",
        b"{'u': 1}\n{'u': open('/etc/passwd')}\n{'u': 3}\n",
        {},
        "line 2: neither JSON nor a Python",
    ),
    ("sequences", b"1 2 3\n4\n5 6\n", {}, "line 2: a user without items: '4'"),
    ("recbole", b"u:token\tt:float\n1\t2\n1\tx\n3\t4\n", {}, 'line 3: .*"x"'),
]


@pytest.mark.parametrize(("kind", "data", "keys", "message"), BAD)
def test_bad_rows_are_quoted_and_too_many_are_an_error(
    read: Read, capsys: pytest.CaptureFixture[str], kind: str, data: bytes, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(FindRecError, match=rf"mine: 1 of [34] rows of file 'log'.*{message}.*max_bad_rows"):
        read("log.txt", data, 0.2, format=kind, **keys)
    rows = read("log.txt", data, 0.5, format=kind, **keys)
    assert len(rows) == (3 if kind == "sequences" else 2)
    assert "log.txt line" in capsys.readouterr().out


def test_all_kinds_of_bad_rows_are_counted(read: Read) -> None:
    data = b"{'u': 1}\n{'u': 1e999}\n{'u': {1, 2}}\n{'v': 4}\n[5]\n"
    with pytest.raises(FindRecError, match="4 of 5 rows"):
        read("a.json", data, 0.5, format="loose_json", columns={"u": "BIGINT"})


def test_text_in_another_encoding(read: Read) -> None:
    data = "u,name\n1,café\n".encode("latin-1")
    assert read("log.csv", data, 0.0, format="csv", encoding="latin-1") == [(1, "café")]


# Without a time, or the names of the tests would differ from one test process to the next.
CUT_SHORT = gzip.compress(b'{"u": 1}\n' * 99, mtime=0)[:30]


@pytest.mark.parametrize(
    ("name", "data", "kind", "message"),
    [
        ("a.inter", b"user_id\titem_id\n1\t2\n", "recbole", "no RecBole header: 'user_id'"),
        ("s.txt", b"1 2\n1 3\n", "sequences", "several lines of user '1'"),
        ("a.jsonl.gz", CUT_SHORT, "jsonl", r"a\.jsonl\.gz\) cannot be read"),
        ("a.json.gz", CUT_SHORT, "loose_json", r"a\.json\.gz cannot be read"),
        ("a.parquet", b"no parquet", "parquet", "cannot be read as parquet"),
    ],
)
def test_files_of_another_format_are_reported(
    read: Read, name: str, data: bytes, kind: str, message: str
) -> None:
    with pytest.raises(FindRecError, match=message):
        read(name, data, format=kind)
