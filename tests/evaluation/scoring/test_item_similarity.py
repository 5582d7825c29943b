"""ItemKNN and EASE agree with slow implementations of their definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from slow_ranks import check, split_of, training

from findrec.baseline_configs import EASEConfig, choose_baseline
from findrec.datasets.batches.evaluation import Part
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring import item_similarity
from findrec.evaluation.scoring.baselines import make_baseline
from findrec.evaluation.scoring.item_similarity import EASE, ItemKNN


def user_item(histories: list[list[int]], num_items: int) -> NDArray[np.float64]:
    """X `[U, V + 1]`: 1 where a user has a training event with an item."""
    matrix = np.zeros((len(histories), num_items + 1))
    for user, history in enumerate(training(histories)):
        matrix[user, history] = 1
    return matrix


def cosines(matrix: NDArray[np.float64], shrink: float) -> NDArray[np.float64]:
    """Entry by entry."""
    size = matrix.shape[1]
    similarity = np.zeros((size, size))
    for a in range(size):
        for b in range(size):
            both = float((matrix[:, a] * matrix[:, b]).sum())
            if a != b and both:
                norms = np.sqrt(matrix[:, a].sum() * matrix[:, b].sum())
                similarity[a, b] = both / (norms + shrink)
    return similarity


@pytest.mark.parametrize("masked", [False, True])
def test_item_knn(
    folder: DataFolder, histories: list[list[int]], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink, neighbours, decay = 1.5, 7, 0.8
    similarity = cosines(user_item(histories, folder.num_items), shrink)
    for row in similarity:
        row[np.argsort(-row, kind="stable")[neighbours:]] = 0
    count = np.zeros(folder.num_items + 1)
    for history in training(histories):
        np.add.at(count, history, 1)

    def score(known: list[int], item: int) -> tuple[np.float32, float]:
        total = 0.0
        for own in sorted(set(known)):
            age = known[::-1].index(own)
            total += decay**age * similarity[own, item]
        return np.float32(total), count[item]

    for pairs in (1 << 22, 60, 1):  # all items at a time, some, and one by one
        monkeypatch.setattr(item_similarity, "_PAIRS_PER_CHUNK", pairs)
        scorer = ItemKNN(folder, neighbours=neighbours, shrink=shrink, decay=decay)
        np.testing.assert_allclose(scorer.similarity.toarray(), similarity, rtol=1e-12)
        check(scorer, folder, histories, score, masked)


def test_ranges_of_items_are_bounded_by_their_pairs(
    folder: DataFolder, histories: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = user_item(histories, folder.num_items)
    bound = np.minimum(matrix.T @ matrix.sum(1), folder.num_items + 1)
    monkeypatch.setattr(item_similarity, "_PAIRS_PER_CHUNK", 100)
    ranges = item_similarity._item_ranges(item_similarity.scipy.sparse.csr_array(matrix))
    assert [lo for lo, _ in ranges[1:]] == [hi for _, hi in ranges[:-1]]
    assert (ranges[0][0], ranges[-1][1]) == (0, folder.num_items + 1)
    assert len(ranges) > 3
    assert max(bound[lo:hi].sum() for lo, hi in ranges) <= 100 + bound.max()


def test_ease_solves_its_least_squares_problem(
    folder: DataFolder, histories: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each column by itself: a ridge regression of an item on all others."""
    l2 = 3.0
    matrix = user_item(histories, folder.num_items)
    size = folder.num_items + 1
    expected = np.zeros((size, size))
    trained = np.flatnonzero(matrix.any(0))
    for item in trained:
        others = trained[trained != item]
        x = matrix[:, others]
        expected[others, item] = np.linalg.solve(x.T @ x + l2 * np.eye(len(others)), x.T @ matrix[:, item])
    for rows in (1024, 5):
        monkeypatch.setattr(item_similarity, "_DENSE_ROWS", rows)
        scorer = EASE(folder, l2=l2)
        np.testing.assert_allclose(
            scorer.similarity, expected[np.ix_(trained, trained)], rtol=1e-9, atol=1e-12
        )
    splits: tuple[Part, Part] = ("valid", "test")
    for split in splits:
        ranks = rank_split(
            scorer, folder, split, RankingProtocol(users_per_block=7, max_length=3, mask_seen=False)
        )
        users = [u for u, h in enumerate(histories) if split_of(h, split)[1] is not None]
        assert ranks.user.tolist() == users
        for user, target, greater, equal in ranks.to_array().tolist():
            known, _ = split_of(histories[user], split)
            scores = expected[sorted(set(known))].sum(0)[1:]
            clear = np.abs(scores - scores[target - 1]) > 1e-6
            least = int((clear & (scores > scores[target - 1])).sum())
            unclear = int((~clear).sum()) - 1
            assert least <= greater
            assert greater + equal <= least + unclear


def test_ease_of_too_many_items_is_refused_before_any_work(
    folder: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = int((folder.train_count > 0).sum())
    monkeypatch.setattr(item_similarity.TrainingPairs, "read", None)  # nothing is read
    message = (
        rf"ease inverts .* the {trained} of .*GiB.*max_items={trained - 1} are not.*Set max_items={trained}"
    )
    with pytest.raises(FindRecError, match=message):
        EASE(folder, max_items=trained - 1)


def test_future_events_do_not_change_similarities(
    folder: DataFolder, histories: list[list[int]], tmp_path: Path
) -> None:
    changed = [[*h[:-2], 39, 40] if len(h) >= 3 else h for h in histories]
    other = write_data_folder(tmp_path / "other", changed, num_items=40)
    assert (ItemKNN(folder).similarity != ItemKNN(other).similarity).nnz == 0
    assert np.array_equal(EASE(folder).similarity, EASE(other).similarity)


def test_keys_are_those_of_the_configuration(folder: DataFolder) -> None:
    config = choose_baseline({"name": "ease", "l2": 5.0, "label": "linear"})
    assert isinstance(config, EASEConfig)
    scorer = make_baseline(config, folder)
    assert scorer.name == "linear"
    assert isinstance(scorer, EASE)
    assert np.array_equal(scorer.similarity, EASE(folder, l2=5.0).similarity)
    for wrong in ({"name": "ease", "l2": 0}, {"name": "item_knn", "decay": 1.5}):
        with pytest.raises(ValueError, match=r"greater|less"):
            choose_baseline(wrong)
