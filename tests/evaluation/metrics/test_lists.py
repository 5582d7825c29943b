"""List metrics agree with loops over all pairs and with known values."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.evaluation.metrics import lists as module
from findrec.evaluation.metrics.lists import gini, intra_list_similarity, list_metrics, novelty
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring.baselines import Cooccurrence, Popularity


def slow_gini(counts: list[int]) -> float:
    """Half the mean distance of all pairs, over the mean."""
    apart = math.fsum(abs(a - b) for a in counts for b in counts) / len(counts) ** 2
    return apart / (2 * math.fsum(counts) / len(counts))


def slow_row(shown: list[list[int]], folder: DataFolder, k: int) -> dict[str, float | None]:
    """Every figure by its definition."""
    cut = [[item for item in items[:k] if item] for items in shown]
    counts = [sum(items.count(v) for items in cut) for v in range(1, folder.num_items + 1)]
    events = folder.train_count.tolist()
    bits = [
        math.fsum(-math.log2(max(1, events[i]) / sum(events)) for i in items) / len(items)
        for items in cut
        if items
    ]
    feature = folder.feature("text")
    values = np.asarray(feature.values, dtype=np.float64)
    means = []
    for items in cut:
        usable = [values[i] / np.linalg.norm(values[i]) for i in items if feature.present[i]]
        if len(usable) > 1:
            cosines = [float(a @ b) for a, b in combinations(usable, 2)]
            means.append(math.fsum(cosines) / len(cosines))
    return {
        f"gini@{k}": slow_gini(counts),
        f"novelty@{k}": math.fsum(bits) / len(bits),
        f"ils_text@{k}": math.fsum(means) / len(means) if means else None,
    }


@pytest.mark.parametrize("num_users", [1, 2, 17, 200])
@pytest.mark.parametrize("bytes_at_once", [1, 2000, 64 << 20])
def test_agree_with_loops(
    num_users: int, bytes_at_once: int, folder: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", bytes_at_once)
    rng = np.random.default_rng(num_users)
    shown = np.stack([1 + rng.permutation(40)[:12] for _ in range(num_users)])
    for u in range(num_users):
        shown[u, int(rng.integers(3, 13)) :] = 0  # lists of several lengths
    shown[-1, :2] = (5, 12)  # without features
    lists = np.concatenate([np.arange(num_users)[:, None], shown], axis=1)
    actual = list_metrics(lists, folder, [1, 2, 5, 12, 13])
    wanted: dict[str, float | None] = {}
    for k in (1, 2, 5, 12):
        wanted |= slow_row(shown.tolist(), folder, k)
    assert actual == {key: pytest.approx(value, abs=1e-12) for key, value in wanted.items()}


def test_concentration_bounds() -> None:
    alike = np.arange(1, 13).reshape(3, 4)
    assert gini(alike, 12) == pytest.approx(0, abs=1e-15)
    one = np.full((7, 1), 3)
    assert gini(one, 12) == pytest.approx(1 - 1 / 12)
    assert gini(np.zeros((3, 4), dtype=np.int64), 12) is None


def test_novelty_by_hand() -> None:
    count = np.array([0, 8, 4, 4, 0])
    bits = novelty(np.array([[1, 2], [3, 4], [1, 0], [0, 0]]), count)
    assert bits[:3].tolist() == [1.5, 3.0, 1.0]  # item 4 counts as seen once: 4 bits
    assert math.isnan(bits[3])


def test_similarity_bounds(tmp_path: Path) -> None:
    side = np.array([[2, 0], [1, 0], [-3, 0], [0, 5], [0, 0]], dtype=np.float32)
    folder = write_data_folder(tmp_path / "d", [[1, 2, 3, 4, 5]], features={"m": side}, num_items=5)
    actual = intra_list_similarity(
        np.array([[1, 2, 0], [1, 3, 0], [1, 4, 5], [5, 1, 0], [1, 2, 3]]), folder.feature("m")
    )
    assert actual[[0, 1, 2]].tolist() == [1, -1, 0]
    assert math.isnan(actual[3])  # item 5 has no direction
    assert actual[4] == pytest.approx(-1 / 3)


def test_popularity_has_high_gini_and_low_novelty(folder: DataFolder) -> None:
    def of(scorer: Popularity | Cooccurrence) -> dict[str, float | None]:
        ranks = rank_split(
            scorer,
            folder,
            "test",
            RankingProtocol(users_per_block=8, max_length=50, mask_seen=False),
            list_k=10,
        )
        return list_metrics(ranks.lists, folder, [5, 10])

    popular, other = of(Popularity(folder)), of(Cooccurrence(folder))
    assert popular["gini@10"] == pytest.approx(1 - 10 / 40)  # the same ten for everyone
    for k in (5, 10):
        assert popular[f"gini@{k}"] > other[f"gini@{k}"]
        assert popular[f"novelty@{k}"] < other[f"novelty@{k}"]


def test_edges(folder: DataFolder) -> None:
    whole = np.concatenate([[[0], [1]], np.tile(np.arange(1, 41), (2, 1))], axis=1)
    row = list_metrics(whole, folder, [40, 100])
    assert row["gini@100"] == row["gini@40"] == pytest.approx(0, abs=1e-15)
    assert list_metrics(np.zeros((0, 0), dtype=np.int64), folder, [5]) == {}
    empty = list_metrics(np.zeros((3, 6), dtype=np.int64), folder, [0, 5])
    assert empty == {"gini@5": None, "novelty@5": None, "ils_text@5": None}
    for wrong in (-1, 41):
        with pytest.raises(ValueError, match=r"valid ids are 1\.\.40"):
            list_metrics(np.array([[0, wrong]]), folder, [1])
