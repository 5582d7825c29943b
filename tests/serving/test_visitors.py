"""Visitors who are not in the data get the lists that users with the same histories get."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from findrec.cli.app import main
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.serving.recommender import Recommender

USERS = ["3", "0", "59"]


@pytest.fixture(scope="module")
def recommender(trained: Path) -> Recommender:
    return Recommender.load(trained)


def past(data: DataFolder) -> tuple[list[list[str]], list[list[int]]]:
    rows = [data.histories([int(user)]) for user in USERS]
    return [[str(v) for v in row.item.tolist()] for row in rows], [row.timestamp.tolist() for row in rows]


@pytest.mark.parametrize("at", [None, 600])
def test_a_visitor_with_the_history_of_a_user_gets_the_same_list(
    recommender: Recommender, data: DataFolder, at: int | None
):
    histories, times = past(data)
    of_users = recommender.recommend(USERS, k=8, at=at)
    of_visitors = recommender.recommend(histories=histories, times=times, k=8, at=at)
    for one, other in zip(of_users, of_visitors, strict=True):
        assert one.items == other.items
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
        assert (one.time, one.more, one.ranked_by) == (other.time, other.more, "findrec")
    vectors = recommender.user_vectors(USERS, at=at)
    if at is None:
        np.testing.assert_allclose(
            recommender.user_vectors(histories=histories, times=times), vectors, atol=1e-5
        )


def test_tables_and_lists_give_the_same(recommender: Recommender, data: DataFolder):
    histories, times = past(data)
    rows = [
        (user, item, time)
        for user, items, stamps in zip(USERS, histories, times, strict=True)
        for item, time in zip(items, stamps, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["user", "item", "timestamp"])
    shuffled = table.sample(frac=1, random_state=0).sort_values("timestamp", kind="stable")
    by_list = recommender.recommend(histories=histories, times=times)
    for given in (table, pa.Table.from_pandas(table)):
        by_table = recommender.recommend(histories=given)
        assert [one.user for one in by_table] == USERS
        assert [one.items for one in by_table] == [one.items for one in by_list]
    by_user = {one.user: one.items for one in recommender.recommend(histories=shuffled)}
    assert by_user == {one.user: one.items for one in recommender.recommend(histories=table)}
    assert recommender.recommend(pd.Series(USERS))[2].items == recommender.recommend("59")[0].items
    frame = by_list.to_pandas()
    assert list(frame.columns[:6]) == ["user", "time", "rank", "item", "title", "score"]
    assert frame["item"].tolist() == [item for one in by_list for item in one.items]


def test_unknown_items_are_left_out_and_empty_histories_get_popular_items(
    recommender: Recommender, data: DataFolder, capsys: pytest.CaptureFixture[str]
):
    known, extended, nothing, unknown = recommender.recommend(
        histories=[["5", "9"], ["5", "new", "9"], [], ["new"]], k=6
    )
    assert extended.items == known.items
    assert "2 events of the given histories are of items that are not in the data, e.g. 'new'" in (
        capsys.readouterr().out
    )
    counts = data.train_count[1:]
    for one in (nothing, unknown):
        assert one.ranked_by == "popularity"
        assert one.scores == sorted(counts.tolist(), reverse=True)[:6]
    (few,) = recommender.recommend(histories=[[]], k=6, items=["7", "8"])
    assert set(few.items) == {"7", "8"}
    with pytest.raises(FindRecError, match="history 1 has no known item"):
        recommender.user_vectors(histories=[["new"]])


def test_popular_items_are_available_ones_at_each_time(recommender: Recommender, data: DataFolder):
    lists = recommender.recommend(histories=[[]] * 2, k=99)
    ranked = sorted(range(1, data.num_items + 1), key=lambda item: (-data.train_count[item], item))
    assert [list(map(int, one.items)) for one in lists] == [ranked[:99]] * 2
    (early,) = recommender.recommend(histories=[[]], k=99, at=600)
    assert list(map(int, early.items)) == [item for item in ranked if item <= 10]


def test_filters(recommender: Recommender):
    history = [["5", "9", "12"]]
    (seen,) = recommender.recommend(histories=history, k=60, exclude_seen=False)
    (unseen,) = recommender.recommend(histories=history, k=60, exclude_seen=True)
    assert set(seen.items) - set(unseen.items) == {"5", "9", "12"}
    (some,) = recommender.recommend(histories=history, k=60, items=["1", "2", "5"], only=["price<5"])
    assert set(some.items) == {"1", "2"}
    with pytest.raises(FindRecError, match="no item 'x' in"):
        recommender.recommend(histories=history, items=["x"])


def test_similar_items_and_vectors(recommender: Recommender):
    vectors = recommender.item_vectors()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    for one in recommender.similar_items(["5", "40"], k=4):
        row = int(one.item) - 1
        assert one.title == f"item {one.item}"
        assert one.items == [str(v + 1) for v in np.argsort(-cosine[row], kind="stable")[:4]]
        assert one.scores == pytest.approx(np.sort(cosine[row])[::-1][:4], abs=1e-5)
    (cheap,) = recommender.similar_items("5", k=99, only=["price<=8"])
    assert sorted(map(int, cheap.items)) == [1, 2, 3, 4, 6, 7, 8]
    assert recommender.item_ids[:2] == ["1", "2"]
    assert recommender.similar_items("5").to_arrow().column_names[0] == "similar_to"


def test_threads_get_what_one_caller_gets(recommender: Recommender):
    histories = [[str(1 + (7 * i + j) % 60) for j in range(1 + i % 9)] for i in range(24)]
    alone = [recommender.recommend(histories=[one])[0].items for one in histories]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda one: recommender.recommend(histories=[one])[0].items, histories))
    assert together == alone
    assert [one.items for one in recommender.recommend(histories=histories)] == alone


def test_explanations(recommender: Recommender):
    inspection = recommender.explain(3, last=4)
    assert (inspection.user, len(inspection.steps)) == ("3", 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either users or histories"),
        ({"users": ["3"], "histories": [["1"]]}, "either users or histories"),
        ({"histories": ["1", "2"]}, r"must be a list of lists: write \[\[\.\.\.\]\]"),
        ({"histories": "1,2"}, "must be a list of lists of raw item ids, or a table, not str"),
        ({"histories": [["1"]], "times": [[1, 2]]}, "times: there must be one value for each event"),
        ({"histories": [["1", "2"]], "times": [[2, 1]]}, "times of history 1 decrease"),
        ({"histories": [["1"]], "times": [["noon"]]}, "whole seconds since 1970, not 'noon'"),
        ({"histories": [["1"]], "events": [["view"]]}, "unknown event type 'view'"),
        ({"histories": pd.DataFrame({"sku": ["1"]})}, "no column 'item' .columns: sku"),
        ({"histories": [["1"]], "k": 0}, "k=0"),
    ],
)
def test_mistakes_are_named(recommender: Recommender, arguments: dict[str, object], message: str):
    with pytest.raises(FindRecError, match=message):
        recommender.recommend(**arguments)  # type: ignore[arg-type]


def test_commands(run: Path, recommender: Recommender, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["recommend", str(run), "--history", "5, 9", "--history", "12", "--k", "3", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    lists = recommender.recommend(histories=[["5", "9"], ["12"]], k=3)
    assert [row["item"] for row in rows] == [item for one in lists for item in one.items]
    out = tmp_path / "similar.csv"
    assert main(["similar", str(run), "5", "--k", "3", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "similar to 5: item 5" in shown
    assert out.read_text().splitlines()[0].startswith("similar_to,rank,item,title,score")
    assert main(["recommend", str(run), "--history", "5", "--user", "3"]) == 2
    assert "--history is given instead of --user" in capsys.readouterr().err
    assert main(["similar", str(run), "nothing"]) == 2
    assert re.search("no item 'nothing' in", capsys.readouterr().err)
