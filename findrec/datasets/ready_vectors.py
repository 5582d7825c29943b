"""Vectors that somebody has made already: `.npy`, `.safetensors` or Parquet files, checked row by row.

Rows are the items in id order, or belong to the items that an id column or a list of ids names. Nothing is
unpickled.
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

from findrec.datasets.encode_rows import first_few
from findrec.errors import FindRecError, suggest
from findrec.progress import say

CHUNK = 4096  # rows looked at together
KINDS = (".npy", ".safetensors", ".parquet")


@dataclass(frozen=True)
class Ready:
    """Vectors of the items in id order."""

    values: NDArray[np.float16]  # [V, D]; zero where missing
    present: NDArray[np.bool_]  # [V] False where the file has no vector, or one that is all zero


def _npy(path: Path) -> NDArray[Any]:
    values: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return values


def _safetensors(path: Path) -> NDArray[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as bundle:  # torch's has bfloat16
            names = list(bundle.keys())
            tables = [name for name in names if len(bundle.get_slice(name).get_shape()) == 2]
            if "values" not in names and len(tables) != 1:
                raise FindRecError(
                    f"{path} holds {first_few(names) or 'no tensor'}: it must hold one matrix, or `values`"
                )
            values: NDArray[Any] = (
                bundle.get_tensor("values" if "values" in names else tables[0]).float().numpy()
            )
            if "present" in names:  # as in a data folder's own files
                values[~bundle.get_tensor("present").bool().numpy()] = 0
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    return values


def _column(path: Path, names: Sequence[str], column: str | None, default: str, what: str) -> str | None:
    """The name of a column: the one asked for, or the default where it is there."""
    if column is not None and column not in names:
        raise FindRecError(
            f"{path} has no column {column!r}{suggest(column, list(names))} ({first_few(names, 9)})"
        )
    if column is None and default not in names and what == "vectors":
        raise FindRecError(f"{path} has columns {first_few(names, 9)}: name the one of the vectors")
    return column or (default if default in names else None)


def _parquet(
    path: Path, id_column: str | None, vector_column: str | None
) -> tuple[NDArray[Any], list[str] | None]:
    """The vectors (NaN rows where null) and, where there is an id column, whose they are."""
    file = pq.ParquetFile(path)
    vectors = _column(path, file.schema_arrow.names, vector_column, "vector", "vectors")
    ids = _column(path, file.schema_arrow.names, id_column, "item", "ids")
    kind = file.schema_arrow.field(vectors).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise FindRecError(f"{path}: column {vectors!r} holds {kind}, not lists of numbers")
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
            at = int(odd[0])
            whose = f" (item {names[row + at]!r})" if ids is not None else ""
            raise FindRecError(
                f"{path}: row {row + at + 1}{whose} has {length[at]} numbers, those before it {width}"
            )
        piece = np.zeros((len(column), width), dtype=np.float32)
        inner = pc.list_flatten(column).to_numpy(zero_copy_only=False).astype(np.float32)  # nulls become NaN
        piece[length >= 0] = inner.reshape(-1, width) if width else 0
        pieces.append(piece)
        row += len(column)
    values = np.concatenate(pieces) if pieces else np.zeros((0, 0), dtype=np.float32)
    return values, (names if ids is not None else None)


def read_ids(path: Path, column: str | None = None) -> list[str]:
    """Raw item ids, e.g. one for each row of a vector file: a CSV or TSV with a header, a Parquet file, or a
    text file with an id a line.
    """
    try:
        if path.suffix == ".parquet":
            names = pq.ParquetFile(path).schema_arrow.names
            chosen = _column(path, names, column, "item", "ids") or names[0]
            return [str(one) for one in pq.read_table(path, columns=[chosen]).column(0).to_pylist()]
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix not in (".csv", ".tsv"):
                return [line.rstrip("\r\n") for line in stream]
            rows = csv.reader(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
            header = next(rows, [])
            if len(header) > 1 and column is None and "item" not in header:
                raise FindRecError(f"{path} has columns {first_few(header, 9)}: name the one of the ids")
            place = header.index(_column(path, header, column, "item", "ids") or header[0])
            return [row[place] for row in rows if row]
    except (OSError, pa.ArrowException, UnicodeDecodeError, IndexError, csv.Error) as error:
        raise FindRecError(f"item ids cannot be read from {path}: {error}") from None


def _chunks(values: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.float16]]]:
    for begin in range(0, len(values), CHUNK):
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is told
            yield begin, np.asarray(values[begin : begin + CHUNK]).astype(np.float16)


def _places(path: Path, owners: list[str], items: Sequence[str], rows: int) -> NDArray[np.int64]:
    """Which item (0-based) each row belongs to, -1 for none of these."""
    if len(owners) != rows:
        raise FindRecError(f"{path} has {rows:,} vectors, but there are {len(owners):,} ids for them")
    place = {name: number for number, name in enumerate(items)}
    seen: dict[str, int] = {}
    for row, owner in enumerate(owners):
        if owner in seen:
            raise FindRecError(
                f"{path}: item {owner!r} has two vectors, in rows {seen[owner] + 1} and {row + 1}"
            )
        seen[owner] = row
    found = np.array([place.get(owner, -1) for owner in owners], dtype=np.int64)
    if not (found >= 0).any():
        raise FindRecError(
            f"{path}: none of its {len(owners):,} ids ({first_few(owners)}) is a raw id of the data "
            f"({first_few(list(items))})"
        )
    if strange := int((found < 0).sum()):
        say(f"vectors: {strange:,} of {len(owners):,} belong to no item of the data and are left out")
    return found


def read_vectors(
    path: Path,
    items: Sequence[str],
    *,
    ids: Sequence[str] | None = None,
    id_column: str | None = None,
    vector_column: str | None = None,
) -> Ready:
    """Vectors of `items` (raw ids in the order of the data folder) from a file.

    Row k belongs to `ids[k]`; without them to what the Parquet file's `id_column` (default `item`) says;
    without that to item k, and a first row of zeros may stand for padding. `FindRecError` names the row and
    item that is wrong: not finite, beyond fp16, of another width, given twice.
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
        raise FindRecError(f"{path} holds {values.dtype} of shape {values.shape}, not a matrix of floats")
    owners = list(ids) if ids is not None else owners
    padded = owners is None and len(values) == len(items) + 1 and not np.any(values[0])
    if owners is None and not padded and len(values) != len(items):
        raise FindRecError(
            f"{path} has {len(values):,} rows, the data {len(items):,} items: give the id of each row "
            "(--ids, or an id column in Parquet)"
        )
    if owners is not None:
        place = _places(path, owners, items, len(values))
    else:
        place = np.arange(len(values), dtype=np.int64) - int(padded)
    out = np.zeros((len(items), values.shape[1]), dtype=np.float16)
    for begin, chunk in _chunks(values):
        where = place[begin : begin + len(chunk)]
        if (bad := np.flatnonzero(~np.isfinite(chunk).all(axis=1) & (where >= 0))).size:
            row = begin + int(bad[0])
            entry = np.asarray(values[row], dtype=np.float64)
            why = (
                "a number that fp16 cannot hold (scale them down)"
                if np.isfinite(entry).all()
                else "NaN or inf"
            )
            raise FindRecError(f"{path}: row {row + 1} (item {items[place[row]]!r}) has {why}")
        out[where[where >= 0]] = chunk[where >= 0]
    present: NDArray[np.bool_] = np.asarray(out.any(axis=1))
    if missing := int((~present).sum()):
        names = [items[v] for v in np.flatnonzero(~present)[:4]]
        say(f"vectors: {missing:,} of {len(items):,} items have none ({first_few(names)}); marked as missing")
    return Ready(out, present)
