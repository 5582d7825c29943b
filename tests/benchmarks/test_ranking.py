"""The ranking benchmark gives complete rows, ours exact, with targets at the planned ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench.ranking import OURS, PRODUCT, Problem, bench_file, bench_ranking, multiplies_bfloat16

from findrec.ops.ranking.target_rank import target_rank

COLUMNS = {"impl", "targets", "users", "items", "dim", "dtype", "users_per_s", "peak_bytes", "exact"}


def test_rows_of_a_small_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")

    def run_here(make: Callable[..., Callable[[], object]], *args: object) -> int:
        make(*args)()  # a process for each would take most of the time
        return 1

    monkeypatch.setattr("bench.ranking.peak_bytes", run_here)
    rows = bench_ranking([700], num_users=20, width=16, runs=1, peers=tmp_path)
    assert {row["impl"] for row in rows} >= {PRODUCT, "findrec", "faiss.IndexFlatIP", "torch matmul+topk"}
    assert ("findrec, torch bfloat16" in {row["impl"] for row in rows}) == multiplies_bfloat16()
    assert [row["targets"] for row in rows if row["impl"] == "findrec"] == ["half", "trained", "uniform"]
    for row in rows:
        assert set(row) >= COLUMNS
        assert (row["items"], row["dim"]) == (700, 16)
        assert row["exact"] or row["impl"] not in OURS
    product = next(row for row in rows if row["impl"] == PRODUCT)
    for row in rows:
        assert row["times_product"] == pytest.approx(row["users_per_s"] / product["users_per_s"])


def test_targets_have_log_uniform_ranks() -> None:
    problem = Problem.make(400, 1000, 8)
    row = torch.arange(400)
    rank = {
        name: 1.0 + target_rank(problem.users_Bd, problem.items_Vd, row, target)[0]
        for name, target in problem.targets.items()
    }
    assert abs(rank["trained"].log().mean() / torch.tensor(1000.0).log() - 0.5) < 0.06
    assert abs(rank["uniform"].mean() - 500) < 60
    assert torch.equal(rank["half"][::2], rank["trained"][::2])


def test_a_file_is_ranked_in_bounded_memory(tmp_path: Path) -> None:
    row = bench_file(400_000, num_users=6, width=64, folder=tmp_path)
    assert set(row) >= COLUMNS
    assert row["peak_bytes"] < 90 << 20 < 4 * 64 * 400_000
    assert list(tmp_path.iterdir()) == []
