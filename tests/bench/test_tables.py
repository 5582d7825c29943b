"""The table benchmark measures what it says: the memory that rows account for, for each placement."""

import pytest

from findrec.bench.tables import TableCase, bench_tables


def test_workers_share_the_rows_of_one():
    case = TableCase("exact", items=60_000, tokens=8)
    alone, sharded, replicated = bench_tables([case], workers=2, steps=1)
    assert [row["workers"] for row in (alone, sharded, replicated)] == [1, 2, 2]
    held = {row["placement"]: row["peak_bytes"] - row["base_bytes"] for row in (sharded, replicated)}
    rows = 4 * 4 * 64 * case.items  # weights, gradient and two moments
    assert alone["peak_bytes"] - alone["base_bytes"] > rows
    assert held["sharded"] < 0.85 * held["replicated"]
    assert alone["peak_of_one"] == alone["step_of_one"] == 1
    assert sharded["table_of_one"] == pytest.approx(
        held["sharded"] / (alone["peak_bytes"] - alone["base_bytes"])
    )
