"""Metrics rows name the pages in evaluation/protocols."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from findrec.datasets.batches.evaluation import Part, evaluated_users, evaluation_blocks, target_events
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.datasets.folder.splits import Split
from findrec.evaluation.display.wording import draw_users, sample_recommendations
from findrec.evaluation.protocol import RankingProtocol, split_title
from findrec.evaluation.ranking.evaluate import evaluate_scorers, rank_split
from findrec.evaluation.scoring.base import Scorer
from findrec.evaluation.scoring.baselines import Cooccurrence, OwnFrequent, Popularity
from findrec.evaluation.scoring.users import UserBlock
from findrec.paths import PACKAGE

PROTOCOLS = PACKAGE.parent / "evaluation" / "protocols"


TIMES = [[0, 0, 60, 60, 120], [0, 60, 60, 120, 120], [60, 60, 120, 120, 180]]
TAIL = Split(kind="tail", last=(1, 2))
TEMPORAL = Split(kind="global_temporal", valid_from=60, test_from=120)


def made(path: Path, split: Split) -> DataFolder:
    return write_data_folder(path, [[1, 2, 3, 4, 5]] * 3, TIMES, split=split)


def test_every_split_has_a_page(folder: DataFolder, tmp_path: Path) -> None:
    others = [Split(unit="timestamp"), TEMPORAL, Split(kind="per_user_ratio"), TAIL]
    titles = {split_title(made(tmp_path / str(n), split)) for n, split in enumerate(others)}
    titles.add(split_title(folder))
    assert titles == {"leave-one-out", "leave-one-basket-out", "global-temporal", "per-user-ratio", "tail"}
    pages = {page.stem: page.read_text(encoding="utf-8") for page in PROTOCOLS.glob("*.md")}
    assert set(pages) == titles
    assert all(pages[title].startswith(f"# {title}\n") for title in titles)


def test_protocol_line(folder: DataFolder) -> None:
    line = RankingProtocol(mask_seen=True).describe(folder)
    assert line == "leave-one-out, full catalogue (40 items), seen items removed, ties at expected rank"


def test_protocol_lines_of_splits_with_several_targets(tmp_path: Path) -> None:
    temporal = RankingProtocol(mask_seen=False).describe(made(tmp_path / "time", TEMPORAL))
    assert temporal == (
        "global-temporal (validation from 1970-01-01T00:01:00Z, test from 1970-01-01T00:02:00Z; all events "
        "of a part ranked from the history before its first), full catalogue (5 items), seen items kept, "
        "ties at expected rank"
    )
    ratio = RankingProtocol(mask_seen=False).describe(made(tmp_path / "ratio", Split(kind="per_user_ratio")))
    tail = RankingProtocol(mask_seen=False).describe(made(tmp_path / "tail", TAIL))
    assert tail.startswith(
        "tail (the last 2 events of each user, the 1 before them for validation; each event ranked from all "
        "events before it), full catalogue"
    )
    assert ratio.startswith("per-user-ratio (7:2:1 of each user's events; all events of a part")


def test_the_targets_of_a_period_are_ranked_from_one_history(tmp_path: Path) -> None:
    folder = made(tmp_path / "time", TEMPORAL)
    assert folder.valid_start.tolist() == [2, 1, 0]  # user 2 came after the first cut
    assert folder.test_start.tolist() == [4, 3, 2]
    # Without a history user 2 cannot be validated on; its events of that period are one for the test.
    for split, able, first, last in (
        ("valid", [0, 1], [2, 1, 0], [4, 3, 2]),
        ("test", [0, 1, 2], [4, 3, 2], [5, 5, folder.length[2]]),
    ):
        part: Part = "valid" if split == "valid" else "test"
        assert evaluated_users(folder, part).tolist() == draw_users(folder, part, 9).tolist() == able
        (users,) = evaluation_blocks(folder, part, 8)
        block = UserBlock.read(folder, part, users, 200)
        for b, user in enumerate(users.tolist()):
            shown = block.item[block.offset[b] : block.offset[b + 1]]
            assert shown.tolist() == list(range(1, first[user] + 1))
            targets = block.cases.target[block.cases.row == b]
            assert targets.tolist() == list(range(first[user] + 1, last[user] + 1))
    rows, _ = evaluate_scorers([Popularity(folder)], folder, RankingProtocol())
    assert (rows["test"][0]["users"], rows["test"][0]["cases"]) == (3, 6)


@pytest.mark.parametrize("unit", ["event", "timestamp"])
def test_a_tail_has_one_query_per_event_or_basket(tmp_path: Path, unit: str) -> None:
    """Each test event, or basket, has everything before it as history; nothing else is shown or removed."""
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 31, size=n).tolist() for n in (1, 2, 3, 9, 30, 30)]
    times = [(60 * np.arange(len(h)) // (60 if unit == "event" else 150)).tolist() for h in histories]
    split = Split(kind="tail", last=(2, 4), unit=unit)  # type: ignore[arg-type]
    folder = write_data_folder(tmp_path / unit, histories, times, num_items=30, split=split)
    num_targets = 0
    for users in evaluation_blocks(folder, "test", 8):
        block = UserBlock.read(folder, "test", users, 5)
        cases = block.cases
        for b, user in enumerate(block.user.tolist()):
            past = block.item[block.offset[b] : block.offset[b + 1]].tolist()
            target = cases.target[cases.row == b].tolist()
            at = len(past)
            assert past == histories[user][:at]
            assert target == histories[user][at : at + len(target)]
            shown = int(block.batch.length[b])
            assert block.batch.item[b, :shown].tolist() == past[-5:]
            same = {times[user][at + n] for n in range(len(target))}
            assert len(same) == 1
            assert at == 0 or times[user][at - 1] not in same or unit == "event"
            num_targets += len(target)
    assert num_targets == int((folder.length - folder.test_start).sum()) == len(target_times_of(folder))
    row = evaluate_scorers([Popularity(folder)], folder, RankingProtocol())[0]["test"][0]
    assert (row["users"], row["cases"]) == (5 if unit == "event" else 3, num_targets)


def target_times_of(folder: DataFolder) -> list[int]:
    return target_events(folder, "test", np.arange(folder.num_users)).timestamp.tolist()


def test_ranks_of_a_tail_do_not_depend_on_blocks(tmp_path: Path) -> None:
    """The seen filter uses the history of each case; every case equals a user whose history ends there."""
    rng = np.random.default_rng(1)
    histories = [rng.integers(1, 31, size=n).tolist() for n in (5, 12, 30, 17)]
    split = Split(kind="tail", last=(2, 3))
    folder = write_data_folder(tmp_path / "all", histories, num_items=30, split=split)
    scorers: list[Scorer] = [OwnFrequent(folder), Cooccurrence(folder)]
    for scorer in scorers:
        actual = [
            rank_split(
                scorer,
                folder,
                "test",
                RankingProtocol(users_per_block=n, max_length=9, mask_seen=True),
                list_k=4,
            )
            for n in (1, 4, 64)
        ]
        for other in actual[1:]:
            assert np.array_equal(other.to_array(), actual[0].to_array())
            assert np.array_equal(other.lists, actual[0].lists)
        assert len(actual[0].lists) == len(actual[0].user) == 12
        for c in range(12):
            user, back = c // 3, 3 - c % 3
            short = [h if u != user else h[: len(h) - back + 1] for u, h in enumerate(histories)]
            alone = write_data_folder(tmp_path / f"{scorer.name}{c}", short, num_items=30)  # leave-one-out
            one = rank_split(
                scorer, alone, "test", RankingProtocol(users_per_block=8, max_length=9, mask_seen=True)
            )
            assert one.to_array()[user].tolist() == actual[0].to_array()[c].tolist()


def test_strata_of_a_tail_use_the_history_of_each_case(tmp_path: Path) -> None:
    histories = [[1, 2, 3] * 7 + [4], [1] * 19 + [2, 3, 4]]
    folder = write_data_folder(tmp_path / "tail", histories, num_items=4, split=TAIL)
    rows, _ = evaluate_scorers([Popularity(folder)], folder, RankingProtocol())
    cases = {row["part"]: row["cases"] for row in rows["strata"]}
    assert (cases["history 1 to 20"], cases["history 21 to 50"]) == (2, 2)
    assert cases["target warm"] + cases["target cold"] == 4


def test_samples_of_a_tail_show_the_first_query(tmp_path: Path) -> None:
    histories = [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 1]]
    folder = write_data_folder(tmp_path / "tail", histories, num_items=6, split=TAIL)
    samples = sample_recommendations(Popularity(folder), folder, "test", [0, 1], RankingProtocol(), k=2)
    for sample, history in zip(samples, histories, strict=True):
        assert [one.item for one in sample.history] == history[:-2]
        assert [one.item for one in sample.target] == [history[-2]]
        assert len(sample.recommended) == 2
