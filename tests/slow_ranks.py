"""Ranks of a leave-one-out split by scores of single items, to compare scorers with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from findrec.datasets.batches.evaluation import Part
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring.base import Scorer

Score = Callable[[list[int], int], Any]  # something that sorts, from a history and an item


def split_of(history: list[int], split: str) -> tuple[list[int], int | None]:
    """What is known before the target, and the target (leave-one-out)."""
    if split == "test":
        return (history[:-1], history[-1]) if len(history) >= 2 else (history, None)
    return (history[:-2], history[-2]) if len(history) >= 3 else (history, None)


def training(histories: list[list[int]]) -> list[list[int]]:
    return [h[:-2] if len(h) >= 3 else h[:1] for h in histories]


def check(scorer: Scorer, folder: DataFolder, histories: list[list[int]], score: Score, masked: bool) -> None:
    splits: tuple[Part, Part] = ("valid", "test")
    for split in splits:
        actual = rank_split(
            scorer, folder, split, RankingProtocol(users_per_block=7, max_length=3, mask_seen=masked)
        )
        expected = []
        for user, history in enumerate(histories):
            known, target = split_of(history, split)
            if target is None:
                continue
            value = score(known, target)
            rivals = [
                i for i in range(1, folder.num_items + 1) if i != target and not (masked and i in known)
            ]
            scores = [score(known, i) for i in rivals]
            greater = sum(s > value for s in scores)
            expected.append([user, target, greater, sum(s == value for s in scores)])
        assert actual.to_array().tolist() == expected
