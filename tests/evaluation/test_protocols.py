"""The pages in evaluation/protocols are the ones that rows name."""

from __future__ import annotations

from pathlib import Path

from findrec.datasets.batches import Part, evaluated_users, evaluation_blocks
from findrec.datasets.folder import DataFolder
from findrec.datasets.memory import write_data_folder
from findrec.datasets.splits import Split
from findrec.evaluation.baselines import Popularity
from findrec.evaluation.evaluate import evaluate_scorers
from findrec.evaluation.metrics import describe_protocol, split_title
from findrec.evaluation.report import draw_users
from findrec.evaluation.scorers import UserBlock
from findrec.paths import PACKAGE

PROTOCOLS = PACKAGE.parent / "evaluation" / "protocols"


TIMES = [[0, 0, 60, 60, 120], [0, 60, 60, 120, 120], [60, 60, 120, 120, 180]]
TEMPORAL = Split(kind="global_temporal", valid_from=60, test_from=120)


def made(path: Path, split: Split) -> DataFolder:
    return write_data_folder(path, [[1, 2, 3, 4, 5]] * 3, TIMES, split=split)


def test_every_split_has_its_page(folder: DataFolder, tmp_path: Path) -> None:
    others = [Split(unit="timestamp"), TEMPORAL, Split(kind="per_user_ratio")]
    titles = {split_title(made(tmp_path / str(n), split)) for n, split in enumerate(others)}
    titles.add(split_title(folder))
    assert titles == {"leave-one-out", "leave-one-basket-out", "global-temporal", "per-user-ratio"}
    pages = {page.stem: page.read_text(encoding="utf-8") for page in PROTOCOLS.glob("*.md")}
    assert set(pages) == titles
    assert all(pages[title].startswith(f"# {title}\n") for title in titles)


def test_protocol_line(folder: DataFolder) -> None:
    line = describe_protocol(folder, mask_seen=True)
    assert line == "leave-one-out, full catalogue (40 items), seen items removed, ties at expected rank"


def test_protocol_lines_of_parts_say_what_ranks_what(tmp_path: Path) -> None:
    temporal = describe_protocol(made(tmp_path / "time", TEMPORAL), mask_seen=False)
    assert temporal == (
        "global-temporal (validation from 1970-01-01T00:01:00Z, test from 1970-01-01T00:02:00Z; all events "
        "of a part ranked from the history before its first), full catalogue (5 items), seen items kept, "
        "ties at expected rank"
    )
    ratio = describe_protocol(made(tmp_path / "ratio", Split(kind="per_user_ratio")), mask_seen=False)
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
            asked = block.cases.target[block.cases.row == b]
            assert asked.tolist() == list(range(first[user] + 1, last[user] + 1))
    rows, _ = evaluate_scorers([Popularity(folder)], folder)
    assert (rows["test"][0]["users"], rows["test"][0]["cases"]) == (3, 6)
