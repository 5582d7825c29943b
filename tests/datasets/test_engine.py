"""DuckDB stays within its limits, says how far it is, and gives the same data whatever it may use."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from findrec.datasets import engine
from findrec.datasets.engine import Limits, Stopwatch, execute, open_database
from findrec.datasets.prepare import prepare
from findrec.datasets.recipe import Recipe, parse_recipe
from findrec.errors import FindRecError

VARIABLES = ("FINDREC_MEMORY_GIB", "FINDREC_THREADS", "FINDREC_SCRATCH")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_options_come_before_the_environment_and_that_before_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    default = Limits.of()
    assert engine.LEAST_MEMORY_GIB < default.memory_gib <= engine.MEMORY_GIB
    assert default.scratch is None
    for name, value in zip(VARIABLES, ("1.5", "3", str(tmp_path)), strict=True):
        monkeypatch.setenv(name, value)
    assert Limits.of() == Limits(1.5, 3, tmp_path)
    assert Limits.of(0.5, 1, Path("here")) == Limits(0.5, 1, Path("here"))


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("FINDREC_MEMORY_GIB", "much", "'much' is no number"),
        ("FINDREC_MEMORY_GIB", "0.01", "too few"),
        ("FINDREC_MEMORY_GIB", "nan", "too few"),
        ("FINDREC_THREADS", "0", "0 threads"),
        ("FINDREC_THREADS", "1.5", "whole number"),
    ],
)
def test_impossible_limits_are_told(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, told: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(FindRecError, match=told):
        Limits.of()


def test_the_database_has_the_limits(tmp_path: Path) -> None:
    with open_database(tmp_path, Limits(0.5, 1)) as db:
        names = ("memory_limit", "threads", "temp_directory", "preserve_insertion_order")
        found = [db.execute(f"SELECT current_setting('{name}')").fetchall()[0][0] for name in names]
        assert found == ["512.0 MiB", 1, str(tmp_path), True]


def test_slow_statements_show_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_database(tmp_path, Limits(0.5, 1)) as db:
        execute(db, "a quick one", "CREATE TABLE quick AS SELECT 1 AS a")
        assert capsys.readouterr().out == ""
        monkeypatch.setattr(engine, "TOLD_AFTER_S", 1e-6)
        execute(db, "a slow one", "CREATE TABLE slow AS SELECT range AS a FROM range(9)")
        assert "a slow one: 100 % in" in capsys.readouterr().out
        assert db.execute("SELECT count(*) FROM slow").fetchall() == [(9,)]
        with pytest.raises(duckdb.BinderException, match="nonsense"):
            execute(db, "a wrong one", "SELECT nonsense FROM slow")


def test_interrupted_statements_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppedError(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise StoppedError

    with open_database(tmp_path, Limits(0.5, 1)) as db:
        monkeypatch.setattr("findrec.progress.Bar.advance", stop)
        begin = time.perf_counter()
        with pytest.raises(StoppedError):
            execute(db, "endless", "SELECT count(*) FROM range(1000000000000) WHERE random() < 0")
        assert time.perf_counter() - begin < 30
        assert db.execute("SELECT 1").fetchall() == [(1,)]


def test_a_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    for name in ("read", "write", "read"):
        with watch.stage(name):
            time.sleep(0.01)
    assert list(watch.seconds) == ["read", "write"]
    assert watch.seconds["read"] >= 0.02
    assert watch.total == sum(watch.seconds.values())
    assert str(watch).startswith("read 0.")


def big(folder: Path, rows: int, **keys: Any) -> Recipe:
    rng = np.random.default_rng(0)
    text = np.char.add("household-number-", rng.integers(0, rows // 20, rows).astype(str))
    columns = {"user": text, "item": rng.integers(0, rows, rows), "timestamp": rng.integers(0, 999, rows)}
    pq.write_table(pa.table(columns), folder / "log.parquet")
    tree = {
        "name": "big",
        "title": "t",
        "licence": "l",
        "source": "s",
        "sources": {"files": [{"path": ".", "files": {"log": {"member": "log.parquet"}}}]},
        "events": "SELECT * FROM read_parquet({log})",
    }
    return parse_recipe(tree | keys, "test", folder)


def test_limits_change_no_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"duplicates": "drop", "k_core": {"users": 3, "items": 1}, "ties": "shuffle"}
    recipe = big(tmp_path, 100_000, **keys)
    scratch = tmp_path / "elsewhere"
    limits = (Limits(1.0, 2), Limits(0.1, 1, scratch))
    for number, limit in enumerate(limits):
        prepare(recipe, tmp_path / str(number), limits=limit)
    said = capsys.readouterr().out
    assert "DuckDB gets 0.1 GiB of memory and 1 thread, temporary files in " + str(scratch) in said
    assert "events/s: fetch" in said
    assert list(scratch.iterdir()) == []
    one, two = (sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in "01")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_too_little_memory_is_told_with_the_mend(tmp_path: Path) -> None:
    recipe = big(tmp_path, 100_000)
    with pytest.raises(FindRecError, match=r"not enough.*--memory-gib.*--scratch"):
        prepare(recipe, tmp_path / "data", limits=Limits(0.002, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]
