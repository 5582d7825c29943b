"""HR, NDCG and MRR agree with two established evaluators on tie-free scores (if installed)."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.datasets.folder.splits import Split
from findrec.evaluation.metrics.metrics import Ranks, case_metrics
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split, summarise
from findrec.evaluation.scoring.inner_product import InnerProductScorer
from findrec.evaluation.scoring.user_vectors import UserVectors
from findrec.evaluation.scoring.users import UserBlock

NUM_USERS, NUM_ITEMS = 60, 311
KS = (1, 5, 10, 20, 50, 311)
PER_CASE = [f"{name}@{k}" for name in ("recall", "ndcg", "mrr") for k in KS]
PER_USER = [f"recall@{k}" for k in KS]
Scores = dict[str, dict[str, float]]


class Drawn(InnerProductScorer):
    """Vectors drawn at random, one for each user."""

    name = "drawn"

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.items_Vd = torch.randn(NUM_ITEMS + 1, 16, generator=draw)
        self.users_Bd = torch.randn(NUM_USERS, 16, generator=draw)

    def queries(self, block: UserBlock) -> UserVectors:
        return UserVectors(self.users_Bd[torch.from_numpy(block.user)])

    def scores(self) -> NDArray[np.float64]:
        """`[U, V + 1]`, by the definition of a score: the float64 product of the stored vectors."""
        scores = (self.users_Bd.double() @ self.items_Vd.double().T).numpy()
        assert all(
            len(np.unique(row.astype(np.float32))) == len(row) for row in scores
        )  # trec_eval's precision
        return scores


@pytest.fixture(scope="module", params=["leave_one_out", "per_user_ratio"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Users with one target, or with several; events at log-uniform positions in the user's order."""
    rng = np.random.default_rng(4)
    histories = []
    for scores in Drawn().scores()[:, 1:]:
        position = np.floor(NUM_ITEMS ** rng.random(int(rng.integers(20, 80)))).astype(np.int64) - 1
        _, first = np.unique(
            position, return_index=True
        )  # distinct items: a seen filter removes no target's twin
        histories.append((1 + np.argsort(-scores)[position[np.sort(first)]]).tolist())
    path: Path = tmp_path_factory.mktemp("data") / "agreement"
    return write_data_folder(path, histories, num_items=NUM_ITEMS, split=Split(kind=request.param))


@pytest.fixture(scope="module", params=[False, True], ids=["seen kept", "seen removed"])
def case(request: pytest.FixtureRequest, data: DataFolder) -> tuple[DataFolder, bool, Ranks, list[Scores]]:
    """Our ranks, and the scores as others want them: of each case and of each user, by query and item."""
    scorer, mask = Drawn(), request.param
    ranks = rank_split(
        scorer, data, "test", RankingProtocol(users_per_block=16, max_length=50, mask_seen=mask)
    )
    by_case: Scores = {}
    by_user: Scores = {}
    scores = scorer.scores()
    past = data.histories(np.arange(NUM_USERS), np.zeros(NUM_USERS, dtype=np.int64), data.test_start)
    for c, (user, _) in enumerate(zip(ranks.user, ranks.target, strict=True)):
        seen = set(past.item[past.offset[user] : past.offset[user + 1]].tolist()) if mask else set()
        listed = {f"i{v}": float(scores[user, v]) for v in range(1, NUM_ITEMS + 1) if v not in seen}
        by_case[f"c{c:04d}"] = by_user[f"u{user:04d}"] = listed
    return data, mask, ranks, [by_case, by_user]


def judged(ranks: Ranks, *, by_user: bool) -> dict[str, dict[str, int]]:
    """What is relevant to each query: the target of a case, or all targets of a user."""
    relevant: dict[str, dict[str, int]] = {}
    for c, (user, target) in enumerate(zip(ranks.user, ranks.target, strict=True)):
        relevant.setdefault(f"u{user:04d}" if by_user else f"c{c:04d}", {})[f"i{target}"] = 1
    return relevant


def by_ranx(ranx: ModuleType, relevant: dict, scores: Scores, names: list[str]) -> dict[str, NDArray]:
    actual = ranx.evaluate(ranx.Qrels(relevant), ranx.Run(scores), names, return_mean=False)
    return {name: np.asarray(actual[name]) for name in names}


def by_ir_measures(
    library: ModuleType, relevant: dict, scores: Scores, names: list[str]
) -> dict[str, NDArray]:
    parsed = {library.parse_measure(name): name for name in names}
    actual: dict[str, dict[str, float]] = {name: {} for name in names}
    for value in library.iter_calc(list(parsed), relevant, scores):
        actual[parsed[value.measure]][value.query_id] = value.value
    return {name: np.array([values[query] for query in sorted(values)]) for name, values in actual.items()}


@pytest.mark.parametrize(
    ("package", "calculate", "theirs", "theirs_of_users"),
    [
        pytest.param(
            "ranx",
            by_ranx,
            {"recall": "hit_rate", "ndcg": "ndcg", "mrr": "mrr"},
            "recall",
            marks=pytest.mark.slow,  # numba compiles for a minute the first time
        ),
        ("ir_measures", by_ir_measures, {"recall": "Success", "ndcg": "nDCG", "mrr": "RR"}, "R"),
    ],
)
def test_equal_to(package: str, calculate, theirs: dict[str, str], theirs_of_users: str, case) -> None:
    """Every case is a query of its own; recall also with a user as the query, whose targets it averages."""
    library = pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")
    folder, mask, ranks, (by_case, by_user) = case
    ours = case_metrics(ranks.rank, KS, NUM_ITEMS)
    row = summarise(ranks, folder, "test", RankingProtocol(ks=KS, mask_seen=mask), model="drawn")

    named = {name: f"{theirs[name.partition('@')[0]]}@{name.partition('@')[2]}" for name in PER_CASE}
    actual = calculate(library, judged(ranks, by_user=False), by_case, list(named.values()))
    for name, other in named.items():
        assert actual[other].shape == ranks.rank.shape
        np.testing.assert_allclose(ours[name], actual[other], rtol=0, atol=1e-9, err_msg=name)

    named = {name: f"{theirs_of_users}@{name.partition('@')[2]}" for name in PER_USER}
    actual = calculate(library, judged(ranks, by_user=True), by_user, list(named.values()))
    for name, other in named.items():
        assert row[name] == pytest.approx(actual[other].mean(), abs=1e-9), name
    assert 0 < row["recall@5"] < row["recall@50"] < row["recall@311"] == 1
