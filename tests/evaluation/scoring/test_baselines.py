"""Every baseline agrees with a slow implementation of its definition."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from slow_ranks import check, training

from findrec.baseline_configs import BASELINES, choose_baseline
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring import baselines
from findrec.evaluation.scoring.baselines import (
    Cooccurrence,
    OwnFrequent,
    Popularity,
    make_baseline,
)
from findrec.evaluation.scoring.inner_product import TextKNN


@pytest.mark.parametrize("masked", [False, True])
def test_popularity(folder: DataFolder, histories: list[list[int]], masked: bool) -> None:
    count = Counter(i for h in training(histories) for i in h)
    check(Popularity(folder), folder, histories, lambda _, item: count[item], masked)


@pytest.mark.parametrize("masked", [False, True])
def test_own_frequent(folder: DataFolder, histories: list[list[int]], masked: bool) -> None:
    count = Counter(i for h in training(histories) for i in h)

    def score(known: list[int], item: int) -> tuple[int, int, int]:
        latest = max((n for n, i in enumerate(known) if i == item), default=-1)
        return known.count(item), latest, count[item]

    check(OwnFrequent(folder), folder, histories, score, masked)


def test_cooccurrence(
    folder: DataFolder, histories: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    window, last, decay = 3, 4, 0.5
    count = Counter(i for h in training(histories) for i in h)
    link: Counter[tuple[int, int]] = Counter()
    for h in training(histories):
        for n, a in enumerate(h):
            for m in range(n + 1, min(n + window + 1, len(h))):
                link[a, h[m]] += window + 1 - (m - n)
                link[h[m], a] += window + 1 - (m - n)

    def score(known: list[int], item: int) -> tuple[np.float32, int]:
        total = 0.0
        for age, a in enumerate(known[::-1][:last]):
            if link[a, item]:
                total += decay**age * (link[a, item] / np.sqrt(float(count[a]) * count[item]))
        return np.float32(total), count[item]

    for at_once in (1 << 20, 40):  # all at a time, and in many pieces of events and of items
        monkeypatch.setattr(baselines, "_EVENTS_PER_CHUNK", at_once)
        monkeypatch.setattr(baselines, "_PAIRS_PER_CHUNK", 16 * at_once)
        scorer = Cooccurrence(folder, window=window, last=last, decay=decay)
        check(scorer, folder, histories, score, masked=False)


def test_cooccurrence_keeps_the_most_similar(folder: DataFolder) -> None:
    full, cut = Cooccurrence(folder), Cooccurrence(folder, neighbours=2)
    for item in range(1, folder.num_items + 1):
        mine = slice(full._start[item], full._start[item + 1])
        kept = slice(cut._start[item], cut._start[item + 1])
        assert cut._neighbour[kept].tolist() == full._neighbour[mine][:2].tolist()


def test_text_knn(folder: DataFolder, histories: list[list[int]]) -> None:
    """The target's score and all others in float64, from the stored unit vectors."""
    scorer = TextKNN(folder, last=2)
    unit = scorer.items_Vd.numpy()
    assert not unit[[0, 5, 12]].any()
    assert np.allclose(np.linalg.norm(unit[[1, 2, 3]], axis=1), 1)
    actual = rank_split(
        scorer, folder, "test", RankingProtocol(users_per_block=4, max_length=50, mask_seen=False)
    )
    users = [u for u, h in enumerate(histories) if len(h) >= 2]
    for row, user in zip(actual.to_array().tolist(), users, strict=True):
        history = histories[user]
        query = sum((unit[i] for i in history[:-1][::-1][:2]), np.zeros(6, dtype=np.float32))
        score = unit.astype(np.float64) @ query.astype(np.float64)
        target = history[-1]
        others = np.delete(np.arange(1, 41), target - 1)
        clear = np.abs(score[others] - score[target]) > 1e-9
        least = int((clear & (score[others] > score[target])).sum())
        assert row[:2] == [user, target]
        assert least <= row[2] <= least + int((~clear).sum())


def test_baselines_by_name(folder: DataFolder) -> None:
    for name in BASELINES:
        assert make_baseline(BASELINES[name](name=name), folder).name == name
    with pytest.raises(ValueError, match="did you mean 'popularity'"):
        choose_baseline("popularty")


def test_future_events_do_not_change_a_baseline(
    folder: DataFolder, histories: list[list[int]], tmp_path: Path
) -> None:
    """Changing what comes after the training events changes no fitted number."""
    changed = [[*h[:-2], 39, 40] if len(h) >= 3 else h for h in histories]
    other = write_data_folder(tmp_path / "other", changed, num_items=40)
    assert np.array_equal(Popularity(folder).popularity, Popularity(other).popularity)
    one, two = Cooccurrence(folder), Cooccurrence(other)
    assert np.array_equal(one._neighbour, two._neighbour)
    assert np.array_equal(one._similarity, two._similarity)
