"""Read precomputed vectors from `.npy`, `.safetensors` or Parquet files, and validate each row.

Rows are in item id order, or are matched to items by an id column or a list of ids. Pickles are not read.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from findrec.datasets.encoders.encoder import first_few
from findrec.errors import FindRecError, suggest
from findrec.progress import say, warn

CHUNK = 4096  # rows per block
KINDS = (".npy", ".safetensors", ".parquet")


@dataclass(frozen=True)
class ItemVectors:
    """Vectors of the items in id order."""

    values: NDArray[np.float16]  # [V, D]; zero where missing
    present: NDArray[np.bool_]  # [V] False for items without a vector in the file, or with all zeros


def _npy(path: Path) -> NDArray[Any]:
    values: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return values


def _safetensors(path: Path) -> NDArray[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as bundle:  # the torch framework reads bfloat16
            names = list(bundle.keys())
            tables = [name for name in names if len(bundle.get_slice(name).get_shape()) == 2]
            if "values" not in names and len(tables) != 1:
                raise FindRecError(
                    f"{path} has {first_few(names) or 'no tensors'}: it must have one matrix, or `values`"
                )
            values: NDArray[Any] = (
                bundle.get_tensor("values" if "values" in names else tables[0]).float().numpy()
            )
            if "present" in names:  # as in feature files of a data folder
                values[~bundle.get_tensor("present").bool().numpy()] = 0
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    return values


def _column(path: Path, names: Sequence[str], column: str | None, default: str, what: str) -> str | None:
    """The given column name, or the default if the file has it."""
    if column is not None and column not in names:
        raise FindRecError(
            f"{path} has no column {column!r}{suggest(column, list(names))} ({first_few(names, 9)})"
        )
    if column is None and default not in names and what == "vectors":
        raise FindRecError(f"{path} has columns {first_few(names, 9)}: name the column of the vectors")
    return column or (default if default in names else None)


def _parquet(
    path: Path, id_column: str | None, vector_column: str | None
) -> tuple[NDArray[Any], list[str] | None]:
    """The vectors and, if there is an id column, the id of each row."""
    file = pq.ParquetFile(path)
    vectors = _column(path, file.schema_arrow.names, vector_column, "vector", "vectors")
    ids = _column(path, file.schema_arrow.names, id_column, "item", "ids")
    kind = file.schema_arrow.field(vectors).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise FindRecError(f"{path}: column {vectors!r} has type {kind}, not lists of numbers")
    pieces: list[NDArray[Any]] = []
    names: list[str] = []
    width = 0
    row = 0
    for batch in file.iter_batches(CHUNK, columns=[c for c in (ids, vectors) if c is not None]):
        column = batch.column(vectors)
        if ids is not None:
            names += [str(name) for name in batch.column(ids).to_pylist()]
        length = np.asarray(pc.list_value_length(column).fill_null(-1))
        known = length[length >= 0]
        width = width or int(known[0] if len(known) else 0)
        if (odd := np.flatnonzero((length >= 0) & (length != width))).size:
            bad = int(odd[0])
            whose = f" (item {names[row + bad]!r})" if ids is not None else ""
            raise FindRecError(
                f"{path}: row {row + bad + 1}{whose} has {length[bad]} numbers, those before it {width}"
            )
        piece = np.zeros((len(column), width), dtype=np.float32)
        inner = pc.list_flatten(column).to_numpy(zero_copy_only=False).astype(np.float32)  # nulls become NaN
        piece[length >= 0] = inner.reshape(-1, width) if width else 0
        pieces.append(piece)
        row += len(column)
    values = np.concatenate(pieces) if pieces else np.zeros((0, 0), dtype=np.float32)
    return values, (names if ids is not None else None)


def read_ids(
    path: Path, column: str | None = None, *, default: str = "item", report: bool = False
) -> list[str]:
    """Read raw ids from a CSV or TSV with a header, a Parquet file, or the lines of a text file.

    The ids are in the given column, or else in `default` or the only column; with `report`, a line says
    which.
    """
    try:
        if path.suffix == ".parquet":
            names = pq.ParquetFile(path).schema_arrow.names
            chosen = _id_column(path, names, column, default, report)
            return [str(name) for name in pq.read_table(path, columns=[chosen]).column(0).to_pylist()]
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix not in (".csv", ".tsv"):
                return [line.rstrip("\r\n") for line in stream]
            rows = csv.reader(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
            header = next(rows, [])
            index = header.index(_id_column(path, header, column, default, report))
            return [row[index] for row in rows if row]
    except (OSError, pa.ArrowException, UnicodeDecodeError, IndexError, csv.Error) as error:
        raise FindRecError(f"{default} ids cannot be read from {path}: {error}") from None


def _id_column(path: Path, names: Sequence[str], column: str | None, default: str, report: bool) -> str:
    chosen = _column(path, names, column, default, "ids")
    if chosen is None and len(names) > 1:
        raise FindRecError(
            f"{path} has columns {first_few(list(names), 9)}: name the column of the {default} ids "
            f"(--{default}s-column of `findrec recommend`, --id-column of `findrec features`, or "
            f"file:PATH#COLUMN in evaluation.candidates), or call it {default!r}"
        )
    chosen = chosen or names[0]
    if report:
        say(f"{path}: {default} ids are read from the column {chosen!r}")
    return chosen


def _chunks(values: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.float16]]]:
    for begin in range(0, len(values), CHUNK):
        with np.errstate(over="ignore"):  # overflow becomes infinite, and is reported
            yield begin, np.asarray(values[begin : begin + CHUNK]).astype(np.float16)


def _item_indices(path: Path, owners: list[str], items: Sequence[str], rows: int) -> NDArray[np.int64]:
    """0-based index of each row's item, -1 for ids that are not in `items`."""
    if len(owners) != rows:
        raise FindRecError(f"{path} has {rows:,} vectors, but there are {len(owners):,} ids for them")
    index_of = {name: number for number, name in enumerate(items)}
    seen: dict[str, int] = {}
    for row, owner in enumerate(owners):
        if owner in seen:
            raise FindRecError(
                f"{path}: item {owner!r} has two vectors, in rows {seen[owner] + 1} and {row + 1}"
            )
        seen[owner] = row
    indices = np.array([index_of.get(owner, -1) for owner in owners], dtype=np.int64)
    if not (indices >= 0).any():
        raise FindRecError(
            f"{path}: none of its {len(owners):,} ids ({first_few(owners)}) is a raw id of the data "
            f"({first_few(list(items))})"
        )
    if unknown := int((indices < 0).sum()):
        warn(f"vectors: {unknown:,} of {len(owners):,} belong to no item of the data and are ignored")
    return indices


def read_vectors(
    path: Path,
    items: Sequence[str],
    *,
    ids: Sequence[str] | None = None,
    id_column: str | None = None,
    vector_column: str | None = None,
) -> ItemVectors:
    """Read the vectors of `items` (raw ids in the order of the data folder) from a file.

    Row k belongs to `ids[k]`, or else to the id in a Parquet file's `id_column` (default `item`), or else to
    item k, possibly after a row of zeros for padding. Raises `FindRecError` for the first row that is not
    finite, too large for fp16, a duplicate, or of another width.
    """
    owners: list[str] | None = None
    try:
        if path.suffix == ".parquet":
            values, owners = _parquet(path, id_column, vector_column)
        elif path.suffix in KINDS:
            values = _npy(path) if path.suffix == ".npy" else _safetensors(path)
        else:
            raise FindRecError(f"{path}: vectors are read from {', '.join(KINDS)} files")
    except (OSError, ValueError, EOFError, pa.ArrowException) as error:
        if isinstance(error, FindRecError):
            raise
        raise FindRecError(f"the vectors in {path} cannot be read: {error}") from None
    if values.ndim != 2 or not values.shape[1] or not np.issubdtype(values.dtype, np.floating):
        raise FindRecError(f"{path} has {values.dtype} of shape {values.shape}, not a matrix of floats")
    owners = list(ids) if ids is not None else owners
    padded = owners is None and len(values) == len(items) + 1 and not np.any(values[0])
    if owners is None and not padded and len(values) != len(items):
        raise FindRecError(
            f"{path} has {len(values):,} rows, the data {len(items):,} items: provide the id of each row "
            "(--ids, or an id column in Parquet)"
        )
    if owners is not None:
        item_index = _item_indices(path, owners, items, len(values))
    else:
        item_index = np.arange(len(values), dtype=np.int64) - int(padded)
    out = np.zeros((len(items), values.shape[1]), dtype=np.float16)
    for begin, chunk in _chunks(values):
        rows = item_index[begin : begin + len(chunk)]
        if (bad := np.flatnonzero(~np.isfinite(chunk).all(axis=1) & (rows >= 0))).size:
            row = begin + int(bad[0])
            too_large = np.isfinite(np.asarray(values[row], dtype=np.float64)).all()
            problem = "a number too large for fp16 (scale the vectors down)" if too_large else "NaN or inf"
            raise FindRecError(f"{path}: row {row + 1} (item {items[item_index[row]]!r}) has {problem}")
        out[rows[rows >= 0]] = chunk[rows >= 0]
    present: NDArray[np.bool_] = np.asarray(out.any(axis=1))
    if missing := int((~present).sum()):
        names = [items[v] for v in np.flatnonzero(~present)[:4]]
        warn(
            f"vectors: {missing:,} of {len(items):,} items have none ({first_few(names)}); marked as missing"
        )
    return ItemVectors(out, present)
