"""A catalogue spread over Ray workers gives the digits of one process, whatever their number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from planted import planted_folder, planted_run

from findrec.cli import main
from findrec.cluster.launch import ray_session
from findrec.config import RunConfig
from findrec.datasets.folder import DataFolder
from findrec.evaluation import evaluate
from findrec.evaluation.evaluate import evaluate_scorers, rank_split
from findrec.evaluation.scorers import Queries, UserBlock, VectorScorer
from findrec.evaluation.shards import sharded
from findrec.ops.target_rank import target_rank

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster]


class Vectors(VectorScorer):
    """A user is the sum of its items' vectors (whole numbers: many ties); its own items get a bonus."""

    name = "vectors"

    def __init__(self, num_items: int) -> None:
        self.items_Vd = torch.randint(-2, 3, (num_items + 1, 4)).float()
        self.items_Vd[0] = 0  # what pads the users' items

    def queries(self, block: UserBlock) -> Queries:
        own = block.padded_items()
        return Queries(self.items_Vd[own].sum(1), own, torch.full(own.shape, 0.5))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_session(RunConfig()):
        yield


def test_any_number_of_shards_gives_the_same_digits(
    cluster: None, folder: DataFolder, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    scorer = Vectors(folder.num_items)
    asked = {"max_length": 50, "mask_seen": True}
    here = rank_split(scorer, folder, "test", users_per_block=8, **asked)
    lists: list[NDArray[np.int64]] = []
    for shards in (1, 2, 4):
        with sharded(scorer.items_Vd, tmp_path, shards) as spread:
            for block in (11, 100):
                found = rank_split(
                    scorer, folder, "test", users_per_block=block, list_k=6, shards=spread, **asked
                )
                assert np.array_equal(found.to_array(), here.to_array())
                lists.append(found.lists)
    assert all(np.array_equal(one, lists[0]) for one in lists)
    assert (lists[0][:, 1:] > 0).all()
    assert list(tmp_path.iterdir()) == []  # the file of vectors is gone


def test_evaluation_over_shards_writes_the_same_rows(
    cluster: None, folder: DataFolder, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    scorer = Vectors(folder.num_items)
    rows = [
        evaluate_scorers([scorer], folder, ks=[5], shards=shards, scratch=tmp_path)[0] for shards in (0, 1, 3)
    ]
    ranked = [
        name for name in rows[0]["test"][0] if name.startswith(("ndcg", "recall", "mrr", "mean", "auc"))
    ]
    assert len(ranked) > 5  # the others are of lists, where one process breaks ties in another way
    for one in rows[1:]:
        assert all(one["test"][0][name] == rows[0]["test"][0][name] for name in ranked)
    assert rows[1] == rows[2]


def test_a_lost_worker_is_replaced(cluster: None, tmp_path: Path) -> None:
    import ray

    torch.manual_seed(2)
    users, items = torch.randn(6, 8), torch.randn(500, 8)
    row, target = torch.arange(6), torch.randint(1, 500, (6,))
    expected = target_rank(users, items, row, target)
    with sharded(items, tmp_path, 2) as spread:
        target_rank(users, spread, row, target)
        ray.kill(spread._shards[1], no_restart=False)
        found = target_rank(users, spread, row, target)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_from_the_command_line_the_results_are_the_same(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    data = planted_folder(tmp_path / "data", num_users=60)
    run = planted_run(tmp_path / "runs" / "small", data, baselines=["popularity"], ks=[5])
    results, asked = [], []
    real = evaluate.sharded

    def counted(items_Vd: torch.Tensor, place: Path, shards: int) -> Any:
        asked.append(shards)
        return real(items_Vd, place, shards)

    monkeypatch.setattr(evaluate, "sharded", counted)
    for more in ([], ["--shards", "2"], ["--shards", "3"]):
        assert main(["evaluate", str(run), *more]) == 0
        results.append((run / "metrics.json").read_bytes())
        assert not list(run.glob(".items.*"))
    assert results[0] == results[1] == results[2]
    assert list(dict.fromkeys(asked)) == [2, 3]
