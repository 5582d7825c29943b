"""Allow-lists: conditions, their combination, and errors."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.scoring.allow_list import allowed_items

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
        "stock": pa.array([True, False, None, True, False, True, True, False]),
        "sold": pa.array(["9", "10", "11.5", "", None, "100", "-3", "1e1"]),  # numbers as text
        "open": pa.array(["True", "false", None, "TRUE", "False", "", "true", "false"]),
        "since": pa.array(["2020-01-02", "2019-12-31", None, "2021-05-01"] * 2),
        "cost": pa.array([Decimal("1.50"), Decimal("2.00"), None, Decimal("9.99")] * 2),
        "tags": pa.array([["a", "b"], [], None, ["b"], ["c"], ["a b"], ["a"], [None, "c"]]),
    }
    for name, column in more.items():
        index = items.column_names.index(name) if name in items.column_names else None
        items = items.append_column(name, column) if index is None else items.set_column(index, name, column)
    pq.write_table(items, path / "items.parquet", row_group_size=3)  # columns in several chunks
    return DataFolder.open(path, verify=False)


def ids(folder: DataFolder, *conditions: str) -> list[int]:
    actual = allowed_items(folder, conditions)
    assert actual.shape == (NUM_ITEMS + 1,)
    return [int(v) for v in np.flatnonzero(actual)]


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
        (["price=5.0"], [5]),
        (["price<5"], [1, 2, 3, 6]),
        (["price <= 5"], [1, 2, 3, 5, 6]),
        (["price>=5", "price<8"], [5, 7]),  # both, on one column too
        (["price!=1"], [2, 4, 5, 7, 8]),  # the opposite of =, so an unknown price too
        (["price!=1", "price>0"], [2, 5, 7, 8]),
        (["price=1", "price=8", "price>1"], [8]),
        (["stock=true"], [1, 4, 6, 7]),
        (["stock=False"], [2, 5, 8]),
        (["stock=1", "price<5"], [1, 6]),
        (["stock!=true"], [2, 3, 5, 8]),
        (["sold>9"], [2, 3, 6, 8]),  # as text, "10" would come before "9"
        (["sold=10"], [2, 8]),
        (["sold<0"], [7]),
        (["open=true"], [1, 4, 7]),
        (["open=FALSE"], [2, 5, 8]),
        (["since>=2020-01-01"], [1, 4, 5, 8]),
        (["cost<2"], [1, 5]),
        (["cost=2"], [2, 6]),
        (["category!=Comedy", "category!=drama"], [3, 5, 7, 8]),
        (["raw>=sku 8"], [8]),
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
    assert "1 of 3 ids are not in the data" in capsys.readouterr().out
    assert ids(folder, f"file:{table}") == [1, 6]
    assert ids(folder, f"file:{table}", f"file:{columns}") == [1, 6, 8]  # several files: either
    assert ids(folder, f"file:{text}", "category=Comedy") == [1]
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    assert ids(folder, "file:stock.csv") == [1, 6], "relative to the home, wherever a worker runs"


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (["category"], r"'category' is not a condition.*column=value .* file:PATH"),
        (["=5"], "is not a condition"),
        (["categry=Comedy"], r"no column 'categry'; did you mean 'category'.*available: raw, title"),
        (["category=Comdey"], r"category=Comdey: no item .* did you mean 'Comedy'"),
        (["price=99"], r"no item of .* has that value \(its values are from 1 to 8\)"),
        (["price>8"], r"price>8: no item of .* satisfies it \(its values are from 1 to 8\)"),
        (["price<cheap"], "'price' of .* has numbers, and 'cheap' is none"),
        (["price<true"], "'true' is none"),
        (["prise<5"], "no column 'prise'; did you mean 'price'"),
        (["price<"], r"in quotes, because of the shell"),
        (["tags<b"], "'tags' is a list; use tags=value"),
        (["price<3", "price>5"], "satisfies price<3 and price>5 at once"),
        (["category=Comedy", "price=5"], "no item of .* satisfies category=Comedy and price=5 at once"),
        (["file:nowhere.txt"], r"cannot be read from .*nowhere\.txt"),
    ],
)
def test_errors_are_reported(folder: DataFolder, conditions: list[str], message: str) -> None:
    with pytest.raises(FindRecError, match=message):
        allowed_items(folder, conditions)


def test_files_without_a_known_id_are_refused(folder: DataFolder, tmp_path: Path) -> None:
    messages = {"7\n8\n": r"none of its 2 ids .*of the data: 'sku 1', of the file: '7'", "": "none of its 0"}
    for text, message in messages.items():
        (tmp_path / "x.txt").write_text(text)
        with pytest.raises(FindRecError, match=message):
            allowed_items(folder, [f"file:{tmp_path / 'x.txt'}"])
