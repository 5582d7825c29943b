"""Allow-lists: what a condition means, how several combine, and mistakes in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from findrec.datasets.folder import DataFolder
from findrec.datasets.memory import write_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.allow import allowed_items

CATEGORIES = ["Comedy", "Comedy, Drama", None, "drama", "Noir|Drama", "Sci-Fi, Comedy", "", "Food; Drinks"]
NUM_ITEMS = len(CATEGORIES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    path: Path = tmp_path_factory.mktemp("data") / "small"
    write_data_folder(path, [list(range(1, NUM_ITEMS + 1))], num_items=NUM_ITEMS)
    items = pq.read_table(path / "items.parquet")
    more = {
        "category": pa.array(CATEGORIES),
        "raw": pa.array([f"sku {v}" for v in range(1, NUM_ITEMS + 1)]),
        "price": pa.array([1, 2, 1, None, 5, 1, 7, 8]),
        "tags": pa.array([["a", "b"], [], None, ["b"], ["c"], ["a b"], ["a"], [None, "c"]]),
    }
    for name, column in more.items():
        place = items.column_names.index(name) if name in items.column_names else None
        items = items.append_column(name, column) if place is None else items.set_column(place, name, column)
    pq.write_table(items, path / "items.parquet", row_group_size=3)  # columns in several chunks
    return DataFolder.open(path, verify=False)


def ids(folder: DataFolder, *conditions: str) -> list[int]:
    found = allowed_items(folder, conditions)
    assert found.shape == (NUM_ITEMS + 1,)
    return [int(v) for v in np.flatnonzero(found)]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["category=Comedy"], [1, 2, 6]),
        (["category=Drama"], [2, 5]),
        (["category=Comedy, Drama"], [2]),  # the whole cell
        (["category=Drinks"], [8]),
        (["category=Drama", "category=drama"], [2, 4, 5]),  # one column: either
        (["category=Comedy", "price=1"], [1, 6]),  # two: both
        (["price=5"], [5]),
        (["tags=a"], [1, 7]),
        (["tags=a b"], [6]),
        (["tags=b", "tags=c", "raw=sku 4", "raw=sku 8"], [4, 8]),
    ],
)
def test_values_of_columns(folder: DataFolder, conditions: list[str], expected: list[int]) -> None:
    assert ids(folder, *conditions) == expected


def test_files_of_ids(
    folder: DataFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, table, columns = tmp_path / "stock.txt", tmp_path / "stock.csv", tmp_path / "stock.parquet"
    text.write_text("sku 3\n  sku 1 \n\nsku 99\nsku 3\n")
    table.write_text("price,item\n3,sku 1\n4,sku 6\n")
    pq.write_table(pa.table({"item": ["sku 8"]}), columns)
    assert ids(folder, f"file:{text}") == [1, 3]
    assert "1 of 3 ids are of no item of the data" in capsys.readouterr().out
    assert ids(folder, f"file:{table}") == [1, 6]
    assert ids(folder, f"file:{table}", f"file:{columns}") == [1, 6, 8]  # several files: either
    assert ids(folder, f"file:{text}", "category=Comedy") == [1]
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    assert ids(folder, "file:stock.csv") == [1, 6], "relative to the home, wherever a worker runs"


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (["category"], r"'category' is no condition.*column=value .* file:PATH"),
        (["=5"], "is no condition"),
        (["categry=Comedy"], r"no column 'categry'; did you mean 'category'.*there: raw, title"),
        (["category=Comdey"], r"category=Comdey: no item .* did you mean 'Comedy'"),
        (["price=99"], "no item of .* has that value"),
        (["category=Comedy", "price=5"], "no item of .* meets category=Comedy and price=5 at once"),
        (["file:nowhere.txt"], r"cannot be read from .*nowhere\.txt"),
    ],
)
def test_mistakes_are_told(folder: DataFolder, conditions: list[str], message: str) -> None:
    with pytest.raises(FindRecError, match=message):
        allowed_items(folder, conditions)


def test_files_without_a_known_id_are_told(folder: DataFolder, tmp_path: Path) -> None:
    told = {"7\n8\n": r"none of its 2 ids .*there: 'sku 1', one here: '7'", "": "none of its 0"}
    for text, message in told.items():
        (tmp_path / "x.txt").write_text(text)
        with pytest.raises(FindRecError, match=message):
            allowed_items(folder, [f"file:{tmp_path / 'x.txt'}"])
