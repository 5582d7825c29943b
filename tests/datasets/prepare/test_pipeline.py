"""`prepare` on small inputs in the real formats of two built-in recipes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_recipe import contents

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.prepare.pipeline import check_replaceable, prepare
from findrec.datasets.sources.recipe import Recipe
from findrec.errors import FindRecError
from findrec.files import beside


def test_ml_events_are_in_order_of_time_then_file_row(
    publisher_ml: Recipe, ml_rows: list[tuple[int, int, int, int]], tmp_path: Path
) -> None:
    folder = prepare(publisher_ml, tmp_path / "data")
    assert (folder.num_users, folder.num_items, folder.manifest.num_events) == (12, 5, 60)
    for user in range(12):
        rows = [(t, n, film) for n, (u, film, _, t) in enumerate(ml_rows) if u == user + 1]
        history = folder.histories([user])
        assert history.item.tolist() == [film for _, _, film in sorted(rows)]
        assert history.timestamp.tolist() == [t for t, _, _ in sorted(rows)]
    assert (folder.valid_start == 3).all()
    assert (folder.test_start == 4).all()
    assert folder.manifest.repeat_rate == 0
    assert 0 < folder.manifest.tie_rate <= 1


def test_both_locations_of_ml_give_the_same_events_and_texts(
    publisher_ml: Recipe, package_ml: Recipe, tmp_path: Path
) -> None:
    one, two = prepare(publisher_ml, tmp_path / "one"), prepare(package_ml, tmp_path / "two")
    assert one.manifest.events_sha256 == two.manifest.events_sha256
    assert one.items.equals(two.items)
    assert one.items["title"][0].as_py() == "Café Noir, Le (1995)"
    assert one.items["text"][1].as_py() == "Toy Story (1995). Animation, Children's, Comedy"


def test_train_count_counts_training_events_only(publisher_ml: Recipe, tmp_path: Path) -> None:
    folder = prepare(publisher_ml, tmp_path / "data")
    history = folder.histories(np.arange(12))
    expected = np.zeros(6, dtype=int)
    for user in range(12):
        begin = history.offset[user]
        np.add.at(expected, history.item[begin : begin + 3], 1)
    assert folder.train_count.tolist() == expected.tolist()


def test_journey_splits_at_basket_edges(journey: Recipe, tmp_path: Path) -> None:
    folder = prepare(journey, tmp_path / "data")
    for user in range(folder.num_users):
        time = folder.histories([user]).timestamp
        valid, test = int(folder.valid_start[user]), int(folder.test_start[user])
        train, validation, tested = time[:valid], time[valid:test], time[test:]
        if user == 19:  # one basket only: all of it is training
            assert len(tested) == len(validation) == 0
            continue
        assert len(np.unique(tested)) == len(np.unique(validation)) == 1
        assert train.max() < validation.min() < tested.min()
    assert folder.manifest.repeat_rate > 0.2
    assert folder.manifest.tie_rate == 1
    assert folder.items["text"].null_count == 1  # product 1039 is bought but not described


def test_journey_order_within_baskets_is_independent_of_ids(journey: Recipe, tmp_path: Path) -> None:
    folder = prepare(journey, tmp_path / "data")
    history = folder.histories(np.arange(19))
    inside = np.diff(history.timestamp) == 0
    rising = (np.diff(history.item)[inside] > 0).mean()
    assert 0.4 < rising < 0.6  # sorted rows would give 1
    other = prepare(journey.model_copy(update={"seed": 1}), tmp_path / "other")
    assert other.manifest.events_sha256 != folder.manifest.events_sha256


def test_two_prepares_give_the_same_bytes(journey: Recipe, tmp_path: Path) -> None:
    prepare(journey, tmp_path / "one")
    prepare(journey, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_second_call_opens_the_existing_folder(publisher_ml: Recipe, tmp_path: Path) -> None:
    prepare(publisher_ml, tmp_path / "data")
    before = (tmp_path / "data/manifest.json").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "publisher")
    prepare(publisher_ml, tmp_path / "data")
    assert (tmp_path / "data/manifest.json").stat().st_mtime_ns == before


def test_folders_of_other_recipes_or_data_are_rejected(publisher_ml: Recipe, tmp_path: Path) -> None:
    prepare(publisher_ml, tmp_path / "data")
    with pytest.raises(FindRecError, match="another recipe"):
        prepare(publisher_ml, tmp_path / "data", limit_users=3)
    log = tmp_path / "publisher/ml-100k/u.data"
    log.write_text(log.read_text() + "1\t1\t5\t990000000\n")
    with pytest.raises(FindRecError, match=r"u\.data has changed"):
        prepare(publisher_ml, tmp_path / "data")
    assert prepare(publisher_ml, tmp_path / "data", force=True).manifest.num_events == 61


def test_what_a_killed_prepare_left_is_removed_or_restored(publisher_ml: Recipe, tmp_path: Path) -> None:
    data = prepare(publisher_ml, tmp_path / "data").path
    before = contents(data)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()

    def of_dead(kind: str) -> Path:
        own = beside(data, kind)
        return own.with_name(own.name.replace(str(os.getpid()), str(dead.pid)))

    of_dead("scratch").mkdir()
    of_dead("partial").mkdir()
    (tmp_path / ".data.lock").touch()
    data.rename(of_dead("old"))  # killed between moving the old folder away and the new one there
    prepare(publisher_ml, data)
    assert contents(data) == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_limit_users_keeps_the_first(publisher_ml: Recipe, tmp_path: Path) -> None:
    folder = prepare(publisher_ml, tmp_path / "data", limit_users=3)
    assert folder.user_ids == ["1", "2", "3"]


def test_min_events_removes_users(journey: Recipe, tmp_path: Path) -> None:
    folder = prepare(journey.model_copy(update={"min_events": 9}), tmp_path / "data")
    assert folder.num_users == 19


def test_folders_with_other_files_are_never_replaced(publisher_ml: Recipe, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("precious")
    with pytest.raises(FindRecError, match="is incomplete"):
        prepare(publisher_ml, tmp_path / "mine")
    with pytest.raises(FindRecError, match=r"thesis\.txt"):
        prepare(publisher_ml, tmp_path / "mine", force=True)
    assert (tmp_path / "mine/thesis.txt").read_text() == "precious"


def test_unwritable_path_is_reported(publisher_ml: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FindRecError, match="cannot write"):
        prepare(publisher_ml, tmp_path / "file/data")


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ("SELECT 1 AS user, 2 AS item", "must select"),
        ("SELECT nonsense FROM nowhere", "the events SQL fails"),
        ("SELECT 1 AS user, NULL::INT AS item, 3 AS timestamp", "no user, item or timestamp"),
        ("SELECT 1 AS user, 1 AS item, 'noon' AS timestamp", "the events SQL fails"),
        ("SELECT 1 AS user, 1 AS item, 3 AS timestamp WHERE false", "selects no rows"),
    ],
)
def test_bad_sql_is_reported_and_leaves_no_folder(
    publisher_ml: Recipe, tmp_path: Path, events: str, message: str
) -> None:
    location = publisher_ml.sources["movielens"][0].model_copy(update={"events": events})
    recipe = publisher_ml.model_copy(update={"sources": {"movielens": [location]}})
    with pytest.raises(FindRecError, match=message):
        prepare(recipe, tmp_path / "out/data")
    assert list((tmp_path / "out").iterdir()) == []


def test_duplicate_items_are_rejected(publisher_ml: Recipe, tmp_path: Path) -> None:
    films = tmp_path / "publisher/ml-100k/u.item"
    films.write_bytes(films.read_bytes() * 2)
    with pytest.raises(FindRecError, match="more than once"):
        prepare(publisher_ml, tmp_path / "data")


def test_event_types_become_codes(publisher_ml: Recipe, tmp_path: Path) -> None:
    rows = "VALUES (1, 7, 1, 'view'), (1, 8, 2, 'buy'), (1, 9, 3, NULL)"
    events = f"SELECT * FROM ({rows}) t(user, item, timestamp, event)"
    location = publisher_ml.sources["movielens"][0].model_copy(update={"events": events, "items": None})
    folder = prepare(
        publisher_ml.model_copy(update={"sources": {"movielens": [location]}}), tmp_path / "data"
    )
    assert folder.manifest.event_types == ["buy", "view"]
    assert folder.manifest.dtypes["event"] == "int16"


def test_folders_of_a_killed_process_are_not_trusted(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
import numpy as np
from findrec.datasets.folder import in_memory as memory
whole = memory._blocks
def half(*given):
    for block in whole(*given):
        yield block
        os._exit(9)
memory._blocks = half
memory.write_data_folder(Path(sys.argv[1]), [[1, 2, 3]] * 4, users_per_member=2)
"""
    target = tmp_path / "data"
    done = subprocess.run([sys.executable, "-c", code, str(target)], timeout=120)
    assert done.returncode == 9
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert ".partial-" in left[0].name
    with pytest.raises(FindRecError, match="no data folder"):
        DataFolder.open(target)
    with pytest.raises(FindRecError, match="is incomplete"):
        DataFolder.open(left[0])
    from findrec.datasets.folder.in_memory import write_data_folder

    write_data_folder(target, [[1, 2, 3]] * 4)
    assert list(tmp_path.iterdir()) == [target]  # the partial folder of the dead process was removed


def test_only_a_data_folder_is_replaced(tmp_path: Path) -> None:
    part = beside(tmp_path / "manifest.json", "part")
    part.touch()  # as a process leaves it that is killed while it writes the manifest
    check_replaceable(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FindRecError, match=r"contains 'thesis\.tex', which does not belong to a data folder"):
        check_replaceable(tmp_path)
