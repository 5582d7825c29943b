"""The table benchmark measures the memory of single and sharded tables."""

import pytest
from bench.tables import TableCase, bench_tables


def test_sharding_reduces_memory_per_worker():
    case = TableCase("exact", items=200_000, tokens=8, replicated=False)
    alone, sharded = bench_tables([case], workers=2, steps=1)
    assert [(row["placement"], row["workers"]) for row in (alone, sharded)] == [
        ("replicated", 1),
        ("sharded", 2),
    ]
    held = [row["peak_bytes"] - row["base_bytes"] for row in (alone, sharded)]
    assert held[0] > 4 * 4 * 64 * case.items  # weights, gradient and two moments
    assert held[1] < 0.75 * held[0]
    assert alone["peak_of_one"] == alone["step_of_one"] == 1
    assert sharded["table_of_one"] == pytest.approx(held[1] / held[0])
