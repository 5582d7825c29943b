"""A catalogue distributed over Ray workers gives the results of one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from planted import planted_folder, planted_run

from findrec.cli.app import main
from findrec.config import RunConfig
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import evaluate_scorers, rank_split
from findrec.evaluation.scoring import inner_product
from findrec.evaluation.scoring.inner_product import InnerProductScorer
from findrec.evaluation.scoring.user_vectors import UserVectors
from findrec.evaluation.scoring.users import UserBlock
from findrec.evaluation.search.ray_rows import sharded
from findrec.ops.ranking.target_rank import target_rank
from findrec.ray_session import ray_session

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster]


class Vectors(InnerProductScorer):
    """A user is the sum of its items' vectors (whole numbers: many ties); its own items get a bonus."""

    name = "vectors"

    def __init__(self, num_items: int, interests: int = 1) -> None:
        self.interests = interests
        self.items_Vd = torch.randint(-2, 3, (num_items + 1, 4)).float()
        self.items_Vd[0] = 0  # what pads the users' items

    def queries(self, block: UserBlock) -> UserVectors:
        own = block.padded_items()
        users = self.items_Vd[own].sum(1)
        if self.interests > 1:
            users = torch.stack([users.roll(n, dims=1) for n in range(self.interests)], dim=1)
        return UserVectors(users, own, torch.full(own.shape, 0.5))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_session(RunConfig()):
        yield


@pytest.mark.parametrize("interests", [1, 3])
def test_results_do_not_depend_on_the_number_of_shards(
    cluster: None, folder: DataFolder, tmp_path: Path, interests: int
) -> None:
    torch.manual_seed(0)
    scorer = Vectors(folder.num_items, interests)
    protocol = RankingProtocol(users_per_block=8, max_length=50, mask_seen=True)
    here = rank_split(scorer, folder, "test", protocol)
    lists: list[NDArray[np.int64]] = []
    for shards in (1, 2, 4):
        with scorer.distributed(tmp_path, shards) as spread:
            for block in (11, 100):
                actual = rank_split(
                    spread, folder, "test", replace(protocol, users_per_block=block), list_k=6
                )
                assert np.array_equal(actual.to_array(), here.to_array())
                lists.append(actual.lists)
    assert all(np.array_equal(one, lists[0]) for one in lists)
    assert (lists[0][:, 1:] > 0).all()
    assert list(tmp_path.iterdir()) == []  # the file of vectors is gone


def test_evaluation_with_shards_writes_the_same_rows(
    cluster: None, folder: DataFolder, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    scorer = Vectors(folder.num_items)
    rows = [
        evaluate_scorers([scorer], folder, RankingProtocol(ks=[5]), shards=shards, scratch=tmp_path)[0]
        for shards in (0, 1, 3)
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
        actual = target_rank(users, spread, row, target)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_command_with_shards_gives_the_same_results(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    data = planted_folder(tmp_path / "data", num_users=60)
    run = planted_run(tmp_path / "runs" / "small", data, baselines=["popularity"], ks=[5])
    results, shard_counts = [], []
    real = inner_product.sharded

    def counted(items_Vd: torch.Tensor, folder: Path, shards: int) -> Any:
        shard_counts.append(shards)
        return real(items_Vd, folder, shards)

    monkeypatch.setattr(inner_product, "sharded", counted)
    for more in ([], ["--shards", "2"], ["--shards", "3"]):
        assert main(["evaluate", str(run), *more]) == 0
        results.append((run / "metrics.json").read_bytes())
        assert not list(run.glob(".items.*"))
    assert results[0] == results[1] == results[2]
    assert list(dict.fromkeys(shard_counts)) == [2, 3]
