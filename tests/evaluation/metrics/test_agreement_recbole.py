"""The same tie-free scores give RecBole's full-sort figures, on data of MovieLens-100K's size.

RecBole lives in an environment of its own (`evaluation/benchmarks/model.py --setup-peers`) and does all by
itself: reads the events, holds out each user's last, leaves out what was seen or not, and averages.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.peers import default_peers, export_events

from findrec.datasets.folder.in_memory import write_data_folder
from findrec.evaluation.metrics.metrics import Ranks, summarise
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring.inner_product import InnerProductScorer
from findrec.evaluation.scoring.user_vectors import UserVectors
from findrec.evaluation.scoring.users import UserBlock

NUM_USERS, NUM_ITEMS, WIDTH = 943, 1682, 24
KS = (1, 5, 10, 20, 50)
PEERS = Path(os.environ.get("FINDREC_PEERS") or default_peers())
PYTHON = PEERS / "bin" / "python"
NAMES = {"hit": "recall", "recall": "recall", "ndcg": "ndcg", "mrr": "mrr"}


class Drawn(InnerProductScorer):
    """Vectors drawn at random, one for each user."""

    name = "drawn"

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.items_Vd = torch.randn(NUM_ITEMS + 1, WIDTH, generator=draw)
        self.users_Bd = torch.randn(NUM_USERS, WIDTH, generator=draw)

    def queries(self, block: UserBlock) -> UserVectors:
        return UserVectors(self.users_Bd[torch.from_numpy(block.user)])


@pytest.mark.slow
@pytest.mark.skipif(
    not PYTHON.is_file(),
    reason=f"RecBole has no environment at {PEERS}: python evaluation/benchmarks/model.py --setup-peers "
    "makes one (FINDREC_PEERS names another folder)",
)
def test_equal_to_recbole(tmp_path: Path) -> None:
    """Targets lie at log-uniform ranks of the user's order, so that every k has hits and misses."""
    rng, scorer = np.random.default_rng(0), Drawn()
    scores_UV = (scorer.users_Bd.double() @ scorer.items_Vd.double().T).numpy()[:, 1:]
    assert all(len(np.unique(row)) == NUM_ITEMS for row in scores_UV), "tie-free"
    order_UV = 1 + np.argsort(-scores_UV, axis=1)
    histories = []
    for user in range(NUM_USERS):
        seen = rng.choice(NUM_ITEMS, size=int(rng.integers(20, 120)), replace=False)
        target = int(NUM_ITEMS ** rng.random()) - 1
        histories.append(order_UV[user][[*seen[seen != target], target]].tolist())
    assert len({item for history in histories for item in history}) == NUM_ITEMS, "RecBole knows no others"
    folder = write_data_folder(tmp_path / "data", histories, num_items=NUM_ITEMS)
    export_events(folder, tmp_path / "events.csv")
    np.save(tmp_path / "scores.npy", scores_UV)

    worker = Path(__file__).with_name("recbole_worker.py")
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(PYTHON), str(worker), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env=kept | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads((tmp_path / "result.json").read_text())
    for rule, mask in (("kept", False), ("removed", True)):
        ranks: Ranks = rank_split(
            scorer, folder, "test", RankingProtocol(users_per_block=256, max_length=50, mask_seen=mask)
        )
        ours = summarise(ranks, folder, "test", RankingProtocol(ks=KS, mask_seen=mask), model="drawn")
        assert theirs[rule].pop("items") == NUM_ITEMS
        assert len(theirs[rule]) == len(NAMES) * len(KS)
        for name, value in theirs[rule].items():
            metric, _, k = name.partition("@")
            assert ours[f"{NAMES[metric]}@{k}"] == pytest.approx(value, abs=1e-9), (rule, name)
        assert 0.05 < ours["recall@1"] < ours["recall@50"] < 0.95
    assert theirs["kept"]["ndcg@10"] < theirs["removed"]["ndcg@10"]
