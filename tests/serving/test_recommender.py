"""`findrec recommend` lists the items that the trained model scores highest under all filters."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted import NUM_ITEMS

from findrec.cli.app import main
from findrec.config import dump_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.run import evaluate_run
from findrec.evaluation.scoring.candidates import Candidates
from findrec.serving.display import write_lists
from findrec.serving.lists import Lists, Recommended
from findrec.serving.query_blocks import rows_in_blocks
from findrec.serving.recommender import Recommender
from findrec.serving.streaming import load_streaming
from findrec.serving.users import parse_time
from findrec.training.runs import read_run_config

USERS = ["3", "0", "59"]


def recommend(run: Path, users: list[str], *, index: str | None = None, **asked: Any) -> Lists[Recommended]:
    return Recommender.load(run, index).recommend(users, **asked)


def configure(run: Path, **evaluation: Any) -> None:
    config = read_run_config(run)
    changed = config.evaluation.model_copy(update=evaluation)
    (run / "config.yaml").write_text(dump_config(config.model_copy(update={"evaluation": changed})))


def by_hand(run: Path, data: DataFolder, user: str, at: int | None = None) -> dict[str, float]:
    """Scores of all items, one event of the user after the other."""
    streaming = load_streaming(run)
    past = data.histories([int(user)])
    known = len(past.item) if at is None else int((past.timestamp <= at).sum())
    state = streaming.start(past.item[:known].tolist()[-16:], past.timestamp[:known].tolist()[-16:])
    scores = streaming.scores(state, at).tolist()
    return {str(v): scores[v] for v in range(1, NUM_ITEMS + 1)}


def check(
    recommended: Recommended, scores: dict[str, float], k: int, allowed: set[int] | None = None
) -> None:
    allowed = set(range(1, NUM_ITEMS + 1)) if allowed is None else allowed
    best = sorted((scores[str(v)] for v in allowed), reverse=True)[:k]
    assert recommended.scores == pytest.approx(best, rel=1e-3, abs=1e-3)
    assert [scores[item] for item in recommended.items] == pytest.approx(best, rel=1e-3, abs=1e-3)
    assert {int(item) for item in recommended.items} <= allowed
    assert len(set(recommended.items)) == len(recommended.items)
    assert recommended.more["price"] == [float(item) for item in recommended.items]
    assert recommended.titles == [f"item {item}" for item in recommended.items]


def test_lists_use_all_events_of_a_user(run: Path, data: DataFolder) -> None:
    lists = recommend(run, USERS, k=7)
    assert [recommended.user for recommended in lists] == USERS
    for recommended in lists:
        assert recommended.time == data.histories([int(recommended.user)]).timestamp[-1]
        check(recommended, by_hand(run, data, recommended.user), 7)


def test_later_events_and_items_are_ignored(run: Path, data: DataFolder) -> None:
    for at in (60 * 5, 60 * 20):  # the sixth event; after the last of some
        for recommended in recommend(run, USERS, k=40, at=str(at)):
            assert recommended.time == at
            check(recommended, by_hand(run, data, recommended.user, at), 40, set(range(1, at // 60 + 1)))


def test_allow_lists(run: Path, data: DataFolder, tmp_path: Path) -> None:
    stock = tmp_path / "stock.csv"
    stock.write_text("item,count\n" + "".join(f"{v},1\n" for v in range(1, 31)) + "unknown,3\n")
    skus = tmp_path / "skus.csv"
    skus.write_text("sku,count\n" + "".join(f"{v},1\n" for v in range(1, 13)))
    with pytest.raises(FindRecError, match=r"has columns sku, count: name the column .*--items-column"):
        recommend(run, ["3"], items=skus)
    third = {v for v in range(1, NUM_ITEMS + 1) if v % 3 == 1}
    scores = by_hand(run, data, "3")
    for given, allowed in (
        ({"only": ["category=third 1"]}, third),
        ({"items": stock}, set(range(1, 31))),
        ({"only": ["category=third 1"], "items": stock}, third & set(range(1, 31))),
        ({"only": ["price<20"]}, set(range(1, 20))),
        ({"only": ["price>=5", "price<20", "category=third 1"]}, third & set(range(5, 20))),
        ({"items": skus, "items_column": "sku"}, set(range(1, 13))),
    ):
        check(recommend(run, ["3"], k=12, **given)[0], scores, 12, allowed)  # type: ignore[arg-type]
        assert len(recommend(run, ["3"], k=99, **given)[0].items) == len(allowed)  # type: ignore[arg-type]
    configure(run, candidates=["price<20", f"file:{skus}#sku"])
    check(recommend(run, ["3"], k=30)[0], scores, 30, set(range(1, 13)))
    configure(run, candidates=["category=third 0", "category=third 1"])
    check(recommend(run, ["3"], k=30)[0], scores, 30, {v for v in range(1, 61) if v % 3 < 2})
    check(recommend(run, ["3"], k=30, items=stock)[0], scores, 30, set(range(1, 31)))  # instead of the run's
    allowed_V = Candidates.of(data, "category=third 1").at(0, NUM_ITEMS)
    past = data.histories([3])
    streaming = load_streaming(run)
    state = streaming.start(past.item[-16:].tolist(), past.timestamp[-16:].tolist())
    served = streaming.recommend(state, 12, allowed=allowed_V)
    check(
        recommend(run, ["3"], k=12, only=["category=third 1"])[0],
        {str(v): s for v, s in served} | {str(v): -np.inf for v in third - {v for v, _ in served}},
        12,
        third,
    )


@pytest.mark.parametrize("written", ["users.txt", "users.csv", "users.parquet", "all"])
def test_users_of_a_file(
    run: Path, data: DataFolder, written: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(run, users_per_block=7)  # several blocks, ordered by length
    names = data.user_ids if written == "all" else ["3", "59", "0", "17", "31", "8", "44", "5", "21"]
    file = tmp_path / written
    if written.endswith("txt"):
        file.write_text("\n".join([*names, "nobody", "3"]))
    elif written.endswith("csv"):
        file.write_text("segment,who\n" + "".join(f"a,{name}\n" for name in [*names, "nobody"]))
    elif written.endswith("parquet"):
        pq.write_table(pa.table({"age": range(len(names)), "user": names}), file)
    out = tmp_path / "lists.parquet"
    given = "all" if written == "all" else str(file)
    arguments = ["recommend", str(run), "--users", given, "--k", "4", "--out", str(out)]
    if written.endswith("csv"):
        assert main(arguments) == 2
        assert "--users-column" in capsys.readouterr().err
        arguments += ["--users-column", "who"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert ("1 of 10 users are not in the data, e.g. 'nobody'" in shown) == (written[-3:] in ("txt", "csv"))
    rows = pq.read_table(out).to_pylist()
    assert [row["user"] for row in rows[::4]] == list(names)
    assert ("60 lists, of which the first 20 are shown" in shown) == (written == "all")
    for row, (alone,) in zip(rows[::4], ([one] for one in recommend(run, names, k=1)), strict=True):
        assert row["score"] == pytest.approx(alone.scores[0], abs=1e-4)
    for name in names[:3]:
        (single,) = recommend(run, [name], k=4)
        own = [row for row in rows if row["user"] == name]
        assert [row["item"] for row in own] == single.items
        assert [row["score"] for row in own] == pytest.approx(single.scores, abs=1e-4)


def test_users_who_come_later_are_left_out_of_a_file(
    run: Path, data: DataFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = data.histories(np.arange(data.num_users), None, np.ones(data.num_users, np.int64)).timestamp
    at = int(first.min())
    assert main(["recommend", str(run), "--users", "all", "--at", str(at), "--k", "1"]) == 0
    late = int((first > at).sum())
    assert (f"{late} of 60 users have no event" in capsys.readouterr().out) == (late > 0)


@pytest.mark.parametrize("mask_seen", [True, False])
@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8"])
def test_a_saved_index_gives_the_same_lists(
    run: Path, data: DataFolder, factory: str, mask_seen: bool
) -> None:
    pytest.importorskip("faiss")
    configure(run, mask_seen=mask_seen)
    with pytest.raises(FindRecError, match=r"no index in .* \(available: none\)"):
        recommend(run, USERS, index=factory)
    setting = {"Flat": [], "IVF4,Flat": ["--setting", "nprobe=4"], "HNSW8": ["--setting", "efSearch=256"]}
    assert main(["index", str(run), "--factory", factory, *setting[factory], "--users", "9"]) == 0
    for given in ({}, {"only": ["category=third 2"]}, {"at": "600"}, {"k": 99}):
        plain, fast = (recommend(run, USERS, index=name, **given) for name in (None, factory))  # type: ignore[arg-type]
        for a, b in zip(plain, fast, strict=True):
            assert a.items == b.items
            assert a.scores == pytest.approx(b.scores, rel=1e-4, abs=1e-4)
            seen = set(map(str, data.histories([int(a.user)]).item.tolist()))
            assert not (mask_seen and "at" not in given and seen & set(a.items))


def test_a_user_who_has_seen_everything_gets_an_empty_list(
    run: Path, data: DataFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(run, mask_seen=True)
    seen = data.histories([3]).item.tolist()
    (tmp_path / "stock.txt").write_text("\n".join(map(str, seen)))
    arguments = ["recommend", str(run), "--user", "3", "--items", str(tmp_path / "stock.txt")]
    assert main([*arguments, "--out", str(tmp_path / "x.parquet")]) == 0
    assert "empty: all items" in capsys.readouterr().out
    table = pq.read_table(tmp_path / "x.parquet")
    assert (table.num_rows, table.column_names[:2]) == (0, ["user", "time"])


@pytest.mark.parametrize("end", ["jsonl", "parquet", "csv"])
def test_the_command_prints_and_writes(
    run: Path, data: DataFolder, end: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / f"lists.{end}"
    arguments = [
        "--user",
        "3",
        "--user",
        "0",
        "--k",
        "4",
        "--only",
        "category=third 1",
        "--at",
        "1970-01-01T00:25",
    ]
    assert main(["recommend", str(run), *arguments, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    lists = recommend(run, ["3", "0"], k=4, only=["category=third 1"], at="1500")
    rows: list[dict[str, Any]]
    if end == "jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    elif end == "csv":
        numbers = {"time": int, "rank": int, "score": float, "price": float}
        with out.open(newline="") as stream:
            read = list(csv.DictReader(stream))
        rows = [{key: numbers.get(key, str)(value) for key, value in row.items()} for row in read]
    else:
        rows = pq.read_table(out).to_pylist()
    assert [(row["user"], row["rank"], row["item"]) for row in rows] == [
        (recommended.user, rank + 1, item)
        for recommended in lists
        for rank, item in enumerate(recommended.items)
    ]
    assert {row["time"] for row in rows} == {1500}
    assert all(row["price"] == float(row["item"]) for row in rows)
    assert "user 3" in shown
    assert "price" in shown
    assert all(row["title"] in shown and f"{row['score']:.4f}" in shown for row in rows)
    assert str(out) in shown


def test_without_faiss_all_items_are_scored(
    run: Path, data: DataFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    check(recommend(run, ["3"], k=7)[0], by_hand(run, data, "3"), 7)
    for command in (["index", str(run)], ["recommend", str(run), "--user", "3", "--index", "Flat"]):
        assert main(command) == 2
        assert "FAISS is not installed" in capsys.readouterr().err


def test_times() -> None:
    assert parse_time("1500") == 1500
    assert parse_time("1970-01-02") == 86400
    assert parse_time("1970-01-01T01:00:00Z") == parse_time("1970-01-01T02:00:00+01:00") == 3600
    with pytest.raises(FindRecError, match=r"'yesterday' is not a time: .*2024-05-01"):
        parse_time("yesterday")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--user", "1500"], r"no user '1500' in .*; did you mean"),
        (["--user", "3", "--at", "soon"], "'soon' is not a time"),
        (["--user", "3", "--at", "-1970"], "user '3' has no event before the query time"),
        (["--user", "3", "--only", "category=none"], "no item of .* has that value"),
        (["--user", "3", "--only", "categories=x"], "did you mean 'category'"),
        (["--user", "3", "--items", "nowhere.txt"], r"cannot be read from .*nowhere\.txt"),
        (
            ["--user", "3", "--out", "lists.txt"],
            r"lists\.txt: lists are written as \.csv, \.parquet or \.jsonl",
        ),
        ([], "no users: name them with --user ID, --users FILE or --users all"),
        (["--users", "nowhere.txt"], r"user ids cannot be read from .*nowhere\.txt"),
        (["--user", "3", "--out", "/proc/nowhere/lists.jsonl"], "cannot write /proc/nowhere"),
    ],
)
def test_errors_are_reported(
    run: Path, data: DataFolder, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recommend", str(run), *arguments]) == 2
    assert re.search(f"error: .*{message}", capsys.readouterr().err)


def test_k_and_the_writer(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FindRecError, match="k=0"):
        recommend(run, ["3"], k=0)
    assert main(["recommend", str(run), "--user", "3", "--k", "0"]) == 2
    with pytest.raises(FindRecError, match="are written as"):
        write_lists(tmp_path / "x.txt", [])


def test_evaluation_takes_an_allow_list(run: Path, data: DataFolder, tmp_path: Path) -> None:
    stock = tmp_path / "stock.txt"
    stock.write_text("\n".join(str(v) for v in range(1, 31)))
    configure(run, candidates=[f"file:{stock}", "category=third 1"])
    row = evaluate_run(run)["test"][0]
    assert row["items"] == 10
    targets = [int(data.histories([u]).item[-1]) for u in range(data.num_users)]
    assert row["cases"] == sum(v <= 30 and v % 3 == 1 for v in targets) > 5
    assert row["mean_rank"] < 5
    assert "stock.txt and category=third 1" in (run / "report.html").read_text()
    stock.write_text("0\n")
    configure(run, candidates=[f"file:{stock}"])
    with pytest.raises(FindRecError, match="none of its 1 ids"):
        evaluate_run(run)


@pytest.mark.parametrize(("history", "candidates"), [([1], "all"), ([1, 2], "raw=1")])
def test_evaluation_without_targets_is_refused(
    run: Path, tmp_path: Path, history: list[int], candidates: str
) -> None:
    rng = np.random.default_rng(0)
    features = {name: rng.normal(size=(NUM_ITEMS, width)) for name, width in (("text", 12), ("image", 8))}
    data = write_data_folder(tmp_path / "nobody", [history] * 3, features=features, num_items=NUM_ITEMS)
    config = read_run_config(run)
    changed = config.data.model_copy(update={"folder": str(data.path)})
    (run / "config.yaml").write_text(dump_config(config.model_copy(update={"data": changed})))
    configure(run, candidates=candidates)
    with pytest.raises(FindRecError, match=rf"no user of .* can be tested: .*\({candidates}\)"):
        evaluate_run(run)


def test_blocks_hold_every_row_once_with_little_padding():
    length = np.random.default_rng(0).lognormal(3, 1, 2000).astype(np.int64) + 1
    blocks = list(rows_in_blocks(length, 256))
    assert sorted(np.concatenate(blocks).tolist()) == list(range(2000))
    assert max(map(len, blocks)) <= 256
    assert min(map(len, blocks[:-1])) >= 32
    padded = sum(len(block) * length[block].max() for block in blocks)
    assert padded < 1.5 * length.sum()
    assert [block.tolist() for block in rows_in_blocks(np.array([3, 1, 2]), 2)] == [[1, 2], [0]]
