"""Precomputed vectors in each format; errors name the row and item."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from findrec.datasets.encoders.ready_vectors import read_ids, read_vectors
from findrec.errors import FindRecError

ITEMS = ["10", "20", "a b", "30"]
GIVEN = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


def written(kind: str, values: np.ndarray, folder: Path) -> Path:
    path = folder / f"vectors.{kind}"
    if kind == "npy":
        np.save(path, values)
    elif kind == "safetensors":
        save_file({"anything": values}, path)
    else:
        pq.write_table(pa.table({"vector": pa.array(list(values))}), path)
    return path


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_in_the_items_order(kind: str, padded: bool, dtype: type, tmp_path: Path) -> None:
    values = GIVEN.astype(dtype)
    values[2] = 0
    if padded:
        values = np.concatenate([np.zeros((1, 6), dtype), values])
    found = read_vectors(written(kind, values, tmp_path), ITEMS)
    assert found.values.dtype == np.float16
    assert found.present.tolist() == [True, True, False, True]
    assert (found.values[found.present] == GIVEN.astype(np.float16)[[0, 1, 3]]).all()


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
def test_rows_named_by_a_list(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(kind, GIVEN, tmp_path)
    found = read_vectors(path, ITEMS, ids=["30", "elsewhere", "10", "a b"])
    assert found.present.tolist() == [True, False, True, True]
    assert (found.values[[3, 0, 2]] == GIVEN.astype(np.float16)[[0, 2, 3]]).all()
    output = capsys.readouterr().out
    assert "1 of 4 belong to no item" in output
    assert "1 of 4 items have none (20)" in output


@pytest.mark.parametrize(
    ("kind", "gap"),
    [
        (pa.list_(pa.float32()), None),
        (pa.large_list(pa.float64()), None),
        (pa.list_(pa.float16(), 6), np.zeros(6, np.float16)),  # of fixed size: pyarrow itself reads no nulls
    ],
)
def test_parquet_with_ids_and_gaps(kind: pa.DataType, gap: np.ndarray | None, tmp_path: Path) -> None:
    rows = [GIVEN[0].astype(np.float16), gap, GIVEN[2].astype(np.float16)]
    table = pa.table({"film": pa.array([30, 20, 10]), "emb": pa.array(rows, kind)})
    pq.write_table(table, tmp_path / "v.parquet")
    found = read_vectors(tmp_path / "v.parquet", ITEMS, id_column="film", vector_column="emb")
    assert found.present.tolist() == [True, False, False, True]
    assert (found.values[[3, 0]] == GIVEN.astype(np.float16)[[0, 2]]).all()


def test_our_own_file_keeps_its_mask(tmp_path: Path) -> None:
    present = np.array([False, True, False, True, True])
    values = np.concatenate([np.zeros((1, 6), np.float32), GIVEN])
    save_file({"values": values, "present": present}, tmp_path / "v.safetensors")
    assert read_vectors(tmp_path / "v.safetensors", ITEMS).present.tolist() == [True, False, True, True]


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
@pytest.mark.parametrize(
    ("bad", "message"), [(np.nan, "NaN or inf"), (-np.inf, "NaN or inf"), (1e6, "too large for fp16")]
)
def test_the_row_and_item_of_a_bad_number_are_reported(
    kind: str, bad: float, message: str, tmp_path: Path
) -> None:
    values = GIVEN.copy()
    values[2, 4] = bad
    with pytest.raises(FindRecError, match=rf"row 3 \(item 'a b'\) has .*{message}"):
        read_vectors(written(kind, values, tmp_path), ITEMS)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (GIVEN[:3], {}, "has 3 rows, the data 4 items"),
        (np.concatenate([GIVEN[:1], GIVEN]), {}, "has 5 rows, the data 4 items"),  # its first is no padding
        (GIVEN[0], {}, r"shape \(6,\), not a matrix"),
        (GIVEN.astype(np.int64), {}, "int64 of shape"),
        (GIVEN[:, :0], {}, "not a matrix of floats"),
        (GIVEN, {"ids": ["10", "20"]}, "4 vectors, but there are 2 ids"),
        (GIVEN, {"ids": ["10", "20", "30", "10"]}, "item '10' has two vectors, in rows 1 and 4"),
        (GIVEN, {"ids": list("wxyz")}, r"none of its 4 ids \(w, x, y, ...\) is a raw id of the data \(10, "),
    ],
)
def test_mismatches_are_reported(
    values: np.ndarray, options: dict[str, list[str]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FindRecError, match=message):
        read_vectors(written("npy", values, tmp_path), ITEMS, ids=options.get("ids"))


def test_nothing_is_unpickled_or_guessed(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "cut.npy").write_bytes(written("npy", GIVEN, tmp_path).read_bytes()[:-9])
    (tmp_path / "cut.safetensors").write_bytes(written("safetensors", GIVEN, tmp_path).read_bytes()[:-9])
    (tmp_path / "cut.parquet").write_bytes(written("parquet", GIVEN, tmp_path).read_bytes()[:-9])
    for name in ("objects.npy", "cut.npy", "cut.safetensors", "cut.parquet", "none.npy"):
        with pytest.raises(FindRecError, match=name.replace(".", r"\.") + " cannot be read"):
            read_vectors(tmp_path / name, ITEMS)
    with pytest.raises(FindRecError, match=r"read from \.npy"):
        read_vectors(tmp_path / "vectors.pt", ITEMS)
    save_file({"a": GIVEN, "b": GIVEN}, tmp_path / "two.safetensors")
    with pytest.raises(FindRecError, match="one matrix, or `values`"):
        read_vectors(tmp_path / "two.safetensors", ITEMS)


def test_parquet_of_uneven_width_and_wrong_columns(tmp_path: Path) -> None:
    path = tmp_path / "v.parquet"
    pq.write_table(pa.table({"item": ["10", "20"], "vector": [[1.0, 2.0], [1.0]]}), path)
    with pytest.raises(FindRecError, match=r"row 2 \(item '20'\) has 1 numbers, those before it 2"):
        read_vectors(path, ITEMS)
    with pytest.raises(FindRecError, match="no column 'vektor'; did you mean 'vector'"):
        read_vectors(path, ITEMS, vector_column="vektor")
    with pytest.raises(FindRecError, match="column 'item' has type string"):
        read_vectors(path, ITEMS, vector_column="item")
    pq.write_table(pa.table({"item": ["10"], "emb": [[1.0]]}), path)
    with pytest.raises(FindRecError, match="name the column of the vectors"):
        read_vectors(path, ITEMS)
    pq.write_table(pa.table({"item": ["10"], "vector": [[1.0, None]]}), path)
    with pytest.raises(FindRecError, match=r"row 1 \(item '10'\) has NaN"):
        read_vectors(path, ITEMS)


def test_ids_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ufefftitle,film\n"One, the",1\nTwo,2\n', encoding="utf-8")
    (tmp_path / "b.tsv").write_text("item\n1\n2\n")
    (tmp_path / "c.txt").write_text("1\r\n2\r\n")
    pq.write_table(pa.table({"x": [0, 0], "item": [1, 2]}), tmp_path / "d.parquet")
    assert read_ids(tmp_path / "a.csv", "film") == ["1", "2"]
    for name in ("b.tsv", "c.txt", "d.parquet"):
        assert read_ids(tmp_path / name) == ["1", "2"]
    with pytest.raises(FindRecError, match="name the column of the item ids"):
        read_ids(tmp_path / "a.csv")
    with pytest.raises(FindRecError, match="no column 'movie'"):
        read_ids(tmp_path / "a.csv", "movie")
    with pytest.raises(FindRecError, match="cannot be read from"):
        read_ids(tmp_path / "none.csv")
