"""The built-in recipes of public data sets, on small files in their publishers' formats."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from small_recipe import events_by_user, local_recipe

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.prepare.pipeline import prepare
from findrec.datasets.sources.recipe import load_recipe
from findrec.errors import FindRecError


def item(folder: DataFolder, raw: str) -> dict[str, Any]:
    """The row of one item."""
    rows: list[dict[str, Any]] = folder.items.to_pylist()
    return next(row for row in rows if row["raw"] == raw)


def json_lines(path: Path, rows: list[dict[str, Any]], loose: bool = False) -> None:
    lines = [(repr(row) if loose else json.dumps(row)) + "\n" for row in rows]
    path.write_bytes(gzip.compress("".join(lines).encode()))


def test_sequence_files(tmp_path: Path) -> None:
    (tmp_path / "sequences.txt").write_text("1 5 6 7 5\n2 8 5\n3 9\n")
    folder = prepare(local_recipe(load_recipe("sequence-files"), tmp_path), tmp_path / "data")
    assert [i for i, _ in events_by_user(folder)["1"]] == ["5", "6", "7", "5"]
    assert folder.valid_start.tolist() == [2, 1, 1]
    assert folder.test_start.tolist() == [3, 1, 1]


def test_recbole(tmp_path: Path) -> None:
    (tmp_path / "data.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\tb\t4\t20\n7\ta\t5\t10\n8\ta\t1\t30\n"
    )
    (tmp_path / "data.item").write_text(
        'item_id:token\ttitle:token_seq\tcategories:token_seq\na\tRed "soap\tBeauty Soap\nb\tComb\t\n'
    )
    folder = prepare(local_recipe(load_recipe("recbole"), tmp_path), tmp_path / "data")
    assert events_by_user(folder) == {"7": [("a", 10), ("b", 20)], "8": [("a", 30)]}
    assert item(folder, "a")["text"] == 'Red "soap. Beauty Soap'


def test_ml_latest_small(tmp_path: Path) -> None:
    inside = tmp_path / "ml-latest-small"
    inside.mkdir()
    rows = [f"{user},{film},{film}.5,{1000 + 10 * film + user}" for user in (1, 2) for film in (1, 2, 3, 4)]
    (inside / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(rows) + "\n")
    (inside / "movies.csv").write_text(
        "movieId,title,genres\n1,Toy Story (1995),Adventure|Animation\n"
        '2,"Heat, Dead (1995)",(no genres listed)\n'
    )
    folder = prepare(local_recipe(load_recipe("ml-latest-small"), tmp_path), tmp_path / "data")
    assert [i for i, _ in events_by_user(folder)["1"]] == ["1", "2", "3", "4"]
    assert item(folder, "1")["text"] == "Toy Story (1995). Adventure, Animation"
    assert item(folder, "2")["text"] == "Heat, Dead (1995)"
    assert folder.valid_start.tolist() == [2, 2]


def review(user: int, product: int, milliseconds: int) -> dict[str, Any]:
    return {
        "rating": 5.0,
        "title": "ok",
        "text": 'said "so"\n— très bien',
        "images": [{"small_image_url": "s", "large_image_url": "l"}],
        "asin": f"V{product}",
        "parent_asin": f"P{product}",
        "user_id": f"U{user}",
        "timestamp": milliseconds,
        "helpful_vote": 0,
        "verified_purchase": True,
    }


def test_amazon_reviews_2023(tmp_path: Path) -> None:
    early, late = 1_588_687_728_923, 1_660_000_000_000
    rows = [review(user, product, early + 1000 * product) for user in range(6) for product in range(5)]
    rows += [rows[0], review(0, 9, late), review(9, 0, early), review(9, 9, late)]  # user 9 is in no core
    json_lines(tmp_path / "All_Beauty.jsonl.gz", rows)
    product = {
        "main_category": "All Beauty",
        "title": "Soap",
        "average_rating": 4.8,
        "features": ["Soft", "Mild"],
        "description": [],
        "price": None,
        "images": [{"thumb": "t.jpg", "large": "l.jpg", "variant": "MAIN", "hi_res": None}],
        "videos": [],
        "store": "Howard",
        "categories": [],
        "details": {"UPC": "6"},
        "parent_asin": "P1",
        "bought_together": None,
    }
    json_lines(
        tmp_path / "meta_All_Beauty.jsonl.gz", [product, product | {"parent_asin": "P9", "images": []}]
    )
    folder = prepare(local_recipe(load_recipe("amazon-reviews-2023"), tmp_path), tmp_path / "data")
    assert folder.user_ids == [f"U{n}" for n in range(6)]
    assert events_by_user(folder)["U0"][-1] == ("P9", late // 1000)  # a cold item, kept
    assert item(folder, "P9")["train_count"] == 0
    assert folder.manifest.filtered == {"read": 34, "duplicates": 1, "k_core": 2}
    assert folder.test_start.tolist() == [5] * 6
    about = item(folder, "P1")
    assert (about["text"], about["category"], about["image"]) == (
        "Soap. Howard. Soft Mild",
        "All Beauty",
        "l.jpg",
    )
    assert item(folder, "P9")["image"] is None
    assert item(folder, "P2")["text"] is None


def test_amazon_reviews_2014(tmp_path: Path) -> None:
    rows = [
        {
            "reviewerID": "A1",
            "asin": f"000{n}",
            "reviewerName": "x",
            "helpful": [0, 1],
            "reviewText": "it's",
            "overall": 4.0,
            "summary": "s",
            "unixReviewTime": 1_369_699_200 + 86_400 * (n // 4),
            "reviewTime": "05 28, 2013",
        }
        for n in range(8)
    ]
    json_lines(tmp_path / "reviews_Beauty_5.json.gz", rows)
    product = {
        "asin": "0001",
        "description": 'Kids\' "own" comb',
        "title": "Comb",
        "imUrl": "http://x/1.jpg",
        "salesRank": {"Beauty": 4},
        "categories": [["Beauty", "Hair Care"]],
    }
    json_lines(tmp_path / "meta_Beauty.json.gz", [product, {"asin": "0002"}], loose=True)
    folder = prepare(local_recipe(load_recipe("amazon-reviews-2014"), tmp_path), tmp_path / "data")
    about = item(folder, "0001")
    assert about["text"] == 'Comb. Beauty, Hair Care. Kids\' "own" comb'
    assert (about["category"], about["image"]) == ("Hair Care", "http://x/1.jpg")
    days = [
        sorted(i for i, t in events_by_user(folder)["A1"] if t == time)
        for time in (1_369_699_200, 1_369_785_600)
    ]
    assert days == [["0000", "0001", "0002", "0003"], ["0004", "0005", "0006", "0007"]]
    assert [i for i, _ in events_by_user(folder)["A1"]] != [
        row["asin"] for row in rows
    ]  # shuffled inside a day


LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)


def test_kuairand(tmp_path: Path) -> None:
    inside = tmp_path / "KuaiRand-1K/data"
    inside.mkdir(parents=True)
    row = "0,{video},20220411,1900,{ms},{click},{like},0,0,0,0,{long},1500,209900,0,0,0,0,1\n"
    first = [
        row.format(video=n, ms=1649675512388 + 60_000 * n, click=n != 3, like=0, long=n % 2) for n in range(6)
    ]
    first = [line.replace("True", "1").replace("False", "0") for line in first]
    second = row.format(video=9, ms=1651000000000, click=1, like=1, long=1)
    (inside / "log_standard_4_08_to_4_21_1k.csv").write_text(LOG + "".join(first))
    (inside / "log_standard_4_22_to_5_08_1k.csv").write_text(LOG + second)
    (inside / "video_features_basic_1k.csv").write_text(
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,"
        "server_height,music_id,music_type,tag\n0,1,NORMAL,2022-04-10,Web,0.0,87433.0,720.0,1280.0,91,9.0,39\n"
        '1,1,AD,2022-04-10,Web,0.0,,720.0,1280.0,91,9.0,"3,67"\n'
    )
    folder = prepare(local_recipe(load_recipe("kuairand"), tmp_path), tmp_path / "data")
    assert [i for i, _ in events_by_user(folder)["0"]] == ["0", "1", "2", "4", "5", "9"]  # 3 was not clicked
    assert events_by_user(folder)["0"][0][1] == 1649675512
    assert folder.manifest.event_types == ["click", "like", "long view"]
    assert item(folder, "1")["category"] == "3,67"


@pytest.mark.parametrize("header", ["", "item,title\n"])
def test_microlens(tmp_path: Path, header: str) -> None:
    (tmp_path / "MicroLens-100k_pairs.csv").write_text(
        "user,item,timestamp\n1,20,1583378629552\n1,10,1583378600000\n1,30,1583379000000\n2,10,1583378629552\n"
    )
    (tmp_path / "MicroLens-100k_title_en.csv").write_text(
        header + '10,Cats, dogs and more\n20,"Quoted, ""well"""\n30,Fin\n'
    )
    folder = prepare(local_recipe(load_recipe("microlens"), tmp_path), tmp_path / "data")
    assert [i for i, _ in events_by_user(folder)["1"]] == ["10", "20", "30"]
    assert item(folder, "10")["text"] == "Cats, dogs and more"
    assert item(folder, "20")["title"] == 'Quoted, "well"'


def test_bad_rows_of_a_recipe_are_counted_in_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "sequences.txt").write_text("1 5 6 7\n2\n3 6 5\n")
    recipe = local_recipe(load_recipe("sequence-files"), tmp_path)
    with pytest.raises(FindRecError, match=r"sequences\.txt line 2"):
        prepare(recipe, tmp_path / "data")
    folder = prepare(recipe.model_copy(update={"max_bad_rows": 0.5}), tmp_path / "data")
    assert folder.manifest.filtered == {"read": 5, "bad_rows": 1}


def test_ties_in_source_order_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\tb\t4\t20\n7\ta\t5\t20\n7\tc\t1\t30\n"
    )
    (tmp_path / "data.item").write_text("item_id:token\ttitle:token_seq\tcategories:token_seq\n")
    recipe = local_recipe(load_recipe("recbole"), tmp_path)
    prepare(recipe, tmp_path / "one")
    assert "66.7% of the events share their time" in capsys.readouterr().out
    prepare(recipe.model_copy(update={"ties": "shuffle"}), tmp_path / "two")
    assert "share their time" not in capsys.readouterr().out
