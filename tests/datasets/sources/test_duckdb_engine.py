"""DuckDB stays within its limits and shows progress, and the limits do not change the data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_recipe import small_recipe

from findrec.datasets.prepare.pipeline import prepare
from findrec.datasets.sources import duckdb_engine as engine
from findrec.datasets.sources.duckdb_engine import Limits, Stopwatch, execute, fetch_value, open_database
from findrec.datasets.sources.recipe import Recipe
from findrec.errors import FindRecError

VARIABLES = ("FINDREC_MEMORY_GIB", "FINDREC_THREADS", "FINDREC_SCRATCH")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_options_override_the_environment_and_the_environment_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    default = Limits.of()
    assert engine.MIN_MEMORY_GIB < default.memory_gib <= engine.MEMORY_GIB
    assert default.scratch is None
    for name, value in zip(VARIABLES, ("1.5", "3", str(tmp_path)), strict=True):
        monkeypatch.setenv(name, value)
    assert Limits.of() == Limits(1.5, 3, tmp_path)
    assert Limits.of(0.5, 1, Path("here")) == Limits(0.5, 1, Path("here"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FINDREC_MEMORY_GIB", "much", "'much' is not a number"),
        ("FINDREC_MEMORY_GIB", "0.01", "too few"),
        ("FINDREC_MEMORY_GIB", "nan", "too few"),
        ("FINDREC_THREADS", "0", "0 threads"),
        ("FINDREC_THREADS", "1.5", "whole number"),
    ],
)
def test_invalid_limits_are_reported(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(FindRecError, match=message):
        Limits.of()


def test_limits_are_set_in_the_database(tmp_path: Path) -> None:
    with open_database(tmp_path, Limits(0.5, 1)) as db:
        names = ("memory_limit", "threads", "temp_directory", "preserve_insertion_order")
        values = [fetch_value(db, f"SELECT current_setting('{name}')") for name in names]
        assert values == ["512.0 MiB", 1, str(tmp_path), True]


def test_slow_statements_show_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_database(tmp_path, Limits(0.5, 1)) as db:
        execute(db, "a quick one", "CREATE TABLE quick AS SELECT 1 AS a")
        assert capsys.readouterr().out == ""
        monkeypatch.setattr(engine, "BAR_AFTER_S", 1e-6)
        execute(db, "a slow one", "CREATE TABLE slow AS SELECT range AS a FROM range(9)")
        assert "a slow one: 100 % in" in capsys.readouterr().out
        assert db.execute("SELECT count(*) FROM slow").fetchall() == [(9,)]
        with pytest.raises(duckdb.BinderException, match="nonsense"):
            execute(db, "a wrong one", "SELECT nonsense FROM slow")


def test_statements_can_be_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_stopwatch_accumulates_stages() -> None:
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
    files = {"log": {"member": "log.parquet"}}
    return small_recipe(folder, files=files, events="SELECT * FROM read_parquet({log})", **keys)


def test_limits_do_not_change_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"duplicates": "drop", "k_core": {"users": 3, "items": 1}, "ties": "shuffle"}
    recipe = big(tmp_path, 100_000, **keys)
    scratch = tmp_path / "elsewhere"
    limits = (Limits(1.0, 2), Limits(0.1, 1, scratch))
    for number, limit in enumerate(limits):
        prepare(recipe, tmp_path / str(number), limits=limit)
    output = capsys.readouterr().out
    assert "DuckDB gets 0.1 GiB of memory and 1 thread, temporary files in " + str(scratch) in output
    assert "events/s: fetch" in output
    assert list(scratch.iterdir()) == []
    one, two = (sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in "01")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_too_little_memory_is_reported_with_a_hint(tmp_path: Path) -> None:
    recipe = big(tmp_path, 100_000)
    with pytest.raises(FindRecError, match=r"not enough.*--memory-gib.*--scratch"):
        prepare(recipe, tmp_path / "data", limits=Limits(0.002, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]
