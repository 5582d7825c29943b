"""Further columns of the items SQL are kept in `items.parquet` with their kind of value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from small_recipe import small_recipe

from findrec.datasets.prepare.pipeline import prepare
from findrec.errors import FindRecError
from findrec.evaluation.scoring.allow_list import allowed_items

EVENTS = "SELECT u AS user, i AS item, u * 10 + i AS timestamp FROM range(3) a(u), range(3) b(i)"
ABOUT = """SELECT * FROM (VALUES
  (0, 'a', 'text a', 19.90::DECIMAL(8, 2), true, 'Acme', DATE '2024-01-31', [1, 2], 3::UTINYINT),
  (1, 'b', 'text b', 20, false, NULL, DATE '2024-02-01', NULL, NULL)
) t(item, title, text, price, in_stock, "the brand", since, sizes, packs)"""


def test_further_columns_are_kept_and_usable_as_conditions(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("unused\n")
    recipe = small_recipe(tmp_path, events=EVENTS, items=ABOUT)
    folder = prepare(recipe, tmp_path / "data")
    names = ["price", "in_stock", "the brand", "since", "sizes", "packs"]
    kinds = [pa.float64(), pa.bool_(), pa.string(), pa.string(), pa.list_(pa.string()), pa.int64()]
    assert [folder.items.schema.field(name).type for name in names] == kinds
    values = [[19.9, True, "Acme", "2024-01-31", ["1", "2"], 3]]
    values.append([20.0, False, None, "2024-02-01", None, None])
    rows = folder.items.select(names).to_pylist()
    assert [list(row.values()) for row in rows] == [*values, [None] * 6]  # item 2 has no row
    for condition, expected in {
        "price<20": [1],
        "in_stock=false": [2],
        "sizes=2": [1],
        "since>2024-01-31": [2],
        "the brand=Acme": [1],
    }.items():
        assert np.flatnonzero(allowed_items(folder, [condition])).tolist() == expected
    grown = prepare(recipe, tmp_path / "grown", grow=tmp_path / "data")
    assert grown.items.select(names).equals(folder.items.select(names))


@pytest.mark.parametrize("name", ["raw", "gone", "train_count"])
def test_columns_of_the_item_table_itself_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("unused\n")
    recipe = small_recipe(
        tmp_path, events=EVENTS, items=f"SELECT 1 AS item, 'a' AS title, 'a' AS text, 1 AS {name}"
    )
    with pytest.raises(FindRecError, match=f"'{name}'.*and others except"):
        prepare(recipe, tmp_path / "data")
