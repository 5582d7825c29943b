"""Loads WebDataset tars of other tools, with one sample per user, into a table with one row per event.

A sample consists of the members with the same key: `u7.item.npy` and `u7.timestamp.npy`, or `u7.json` with an
object of lists. A member `KEY.NAME.EXTENSION` with an array or list is the field NAME; the entries of an
object or .npz are the fields `NAME.ENTRY`, or `ENTRY` if the member has no name. Lists have one entry per
event; other values (such as a user id) apply to all events of the sample. Members with other extensions, and
those whose names begin with `.` or `__`, are ignored.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from webdataset.tariterators import group_by_keys

from findrec.datasets.sources.duckdb_engine import BAR_AFTER_S, execute, identifier, literals
from findrec.datasets.sources.unpack import COMPRESSIONS, DAMAGED, TarMember
from findrec.errors import FindRecError
from findrec.progress import progress

KEY = "__key__"  # column of the samples' keys
_LARGEST_MEMBER = 64 << 20  # bytes, unpacked
_EVENTS_AT_ONCE = 1 << 20
_SAMPLES_AT_ONCE = 1 << 14
_PICKLES = {"pkl", "pickle", "pyd", "pth", "pt"}
_SELECT = "or select other fields with `columns`"

Kinds = dict[str, tuple[str, str]]  # by field: the kind of its values, and the key of the first sample


def _npz(data: bytes) -> dict[str, Any]:
    size = sum(entry.file_size for entry in zipfile.ZipFile(io.BytesIO(data)).infolist())
    if size > _LARGEST_MEMBER:
        raise ValueError(f"an .npz unpacks to {size:,} bytes, more than {_LARGEST_MEMBER:,}: split the user")
    return dict(np.load(io.BytesIO(data), allow_pickle=False))


_DECODERS = {
    "json": json.loads,
    "npy": lambda data: np.lib.format.read_array(io.BytesIO(data), allow_pickle=False),
    "npz": _npz,
    **dict.fromkeys(("msgpack", "msg", "mp"), msgpack.unpackb),
}


def _members(path: Path) -> Iterator[dict[str, Any]]:
    """The members of a tar that hold fields, in the form of `group_by_keys`; `ValueError` for unsafe ones."""
    kind = COMPRESSIONS.get(path.suffix)
    with (
        pa.OSFile(str(path)) as raw,
        pa.CompressedInputStream(raw, kind) if kind else raw as stream,
        progress(f"read {path.name}", total=raw.size(), unit="bytes", after_s=BAR_AFTER_S) as bar,
        tarfile.open(fileobj=stream, mode="r|", tarinfo=TarMember) as tar,
    ):
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
            bar.advance(raw.tell() - bar.done)
            extension = member.name.rpartition(".")[2].lower()
            why = None
            if member.name.startswith("/") or ".." in member.name.split("/"):
                why = "has an absolute name or one with `..`: use plain relative names"
            elif not (member.isdir() or member.isreg()) or member.issparse():
                why = "is a link or special file: pack the file itself"
            elif extension in _PICKLES:
                why = "is a pickle, which can run code when it is loaded: write .npy, .npz, .json or .msgpack"
            elif extension in _DECODERS and member.size > _LARGEST_MEMBER:
                why = f"has {member.size:,} bytes, more than {_LARGEST_MEMBER:,}: split the user"
            if why:
                raise ValueError(f"member {member.name!r} {why}")
            hidden = member.name.rpartition("/")[2].startswith((".", "__"))
            if member.isreg() and extension in _DECODERS and not hidden:
                data = tar.extractfile(member)
                yield {"fname": member.name, "data": data.read() if data else b"", "__url__": path.name}


def _fields(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for entry, inner in value.items():
            yield from _fields(f"{name}.{entry}" if name else str(entry), inner)
    elif name:
        yield name, value
    else:
        raise ValueError("a member has an array without a name: name it KEY.item.npy (or .json, .msgpack)")


def _column(field: str, value: Any) -> pa.Array | pa.Scalar:
    """Convert a list to an array and any other value to a scalar, with one type per kind of value."""
    if isinstance(value, np.ndarray):
        if value.ndim > 1:
            raise ValueError(f"field {field!r} has {value.ndim} dimensions instead of one; {_SELECT}")
        value = value.astype(value.dtype.newbyteorder("="), copy=False) if value.ndim else value.item()
    converted = pa.array(value) if isinstance(value, list | np.ndarray) else pa.scalar(value)
    if pa.types.is_integer(converted.type):
        return converted.cast(pa.int64())
    if pa.types.is_floating(converted.type):
        return converted.cast(pa.float64())
    plain = (
        pa.types.is_boolean,
        pa.types.is_string,
        pa.types.is_timestamp,
        pa.types.is_date,
        pa.types.is_null,
    )
    if not any(test(converted.type) for test in plain):
        raise ValueError(f"field {field!r} holds {converted.type}, not numbers, texts or times; {_SELECT}")
    return converted


def _kind(type_: pa.DataType) -> str:
    return "numbers" if pa.types.is_integer(type_) or pa.types.is_floating(type_) else str(type_)


def _table(sample: dict[str, Any], wanted: list[str], kinds: Kinds) -> pa.Table:
    """The events of a sample; `wanted` are its columns (empty: all), `kinds` those of earlier samples."""
    fields: dict[str, Any] = {KEY: sample["__key__"]}
    for suffix, data in sample.items():
        name, _, extension = suffix.rpartition(".")
        for field, value in _fields(name, _DECODERS[extension](data)) if suffix[:2] != "__" else ():
            if field in fields:
                raise ValueError(f"two members have the field {field!r}; name them differently")
            fields[field] = value
    names = wanted or list(kinds) or list(fields)
    missing = [name for name in names if name not in fields]
    odd = [] if wanted else [name for name in fields if name not in names]
    if missing or odd:
        raise ValueError(
            f"it has the fields {', '.join(map(repr, fields))} instead of {', '.join(map(repr, names))}: "
            f"all samples need the same; {_SELECT}"
        )
    columns = {name: _column(name, fields[name]) for name in names}
    lengths = {name: len(column) for name, column in columns.items() if isinstance(column, pa.Array)}
    if len(set(lengths.values())) != 1:
        given = ", ".join(f"{name!r} has {length:,}" for name, length in lengths.items()) or "it has no list"
        raise ValueError(f"its lists must all have one entry per event, but {given}; correct them, {_SELECT}")
    for name, column in columns.items():
        kind, (other, key) = _kind(column.type), kinds.get(name, ("null", ""))
        if "null" not in (kind, other) and kind != other:
            raise ValueError(
                f"field {name!r} holds {kind}, but {other} in sample {key!r}: use one type, {_SELECT}"
            )
        if other == "null":
            kinds[name] = (kind, sample["__key__"])
    count = lengths.popitem()[1]
    arrays = {k: v if isinstance(v, pa.Array) else pa.repeat(v, count) for k, v in columns.items()}
    return pa.table(arrays)


def _samples(paths: list[Path], wanted: list[str], recipe: str) -> Iterator[tuple[str, str, pa.Table]]:
    """Shard, key and events of each sample."""
    kinds: Kinds = {}
    for path in paths:
        try:
            for sample in group_by_keys(_members(path)):
                where = f"sample {sample['__key__']!r} of {path}"
                try:
                    table = _table(sample, wanted, kinds)
                except Exception as error:  # each decoder has exceptions of its own
                    why = str(error) or type(error).__name__
                    raise FindRecError(f"recipe {recipe}: {where} cannot be read: {why}") from None
                yield path.name, sample["__key__"], table
        except FindRecError:
            raise
        except (tarfile.TarError, OSError, EOFError, pa.ArrowException) as error:
            raise FindRecError(
                f"recipe {recipe}: {path} is not a readable tar (plain, .gz or .zst): {error}. Download it "
                "again"
            ) from None
        except DAMAGED as error:
            raise FindRecError(f"recipe {recipe}: {path} cannot be read: {error}") from None


def read_webdataset(
    db: duckdb.DuckDBPyConnection,
    table: str,
    columns: dict[str, str] | None,
    paths: list[Path],
    scratch: Path,
    recipe: str,
) -> None:
    """Create `table` with the events of all samples.

    It has the fields and SQL types of `columns`, by default the key and all fields. For bad samples, raises
    `FindRecError`, which names the shard and the key.
    """
    selected = list(columns or {})
    seen = '"keys of a file"'
    db.execute(f"CREATE TABLE {seen} (shard VARCHAR, key VARCHAR)")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        parts: list[Path] = []
        pending: list[tuple[str, str, pa.Table]] = []

        def flush() -> None:
            shards, keys, tables = zip(*pending, strict=True)
            named = pa.table({"shard": list(shards), "key": list(keys)})  # noqa: F841 - DuckDB finds it by its name
            db.execute(f"INSERT INTO {seen} SELECT * FROM named")
            parts.append(Path(folder) / f"{len(parts)}.parquet")
            pq.write_table(pa.concat_tables(tables, promote_options="permissive"), parts[-1])
            pending.clear()

        events = 0
        for sample in _samples(paths, selected, recipe):
            pending.append(sample)
            events += sample[2].num_rows
            if events >= _EVENTS_AT_ONCE or len(pending) >= _SAMPLES_AT_ONCE:
                flush()
                events = 0
        if pending:
            flush()
        if not parts:
            raise FindRecError(
                f"recipe {recipe}: {', '.join(map(str, paths[:3]))} has no samples: a sample has members "
                f"KEY.FIELD.EXTENSION with an extension of {', '.join(_DECODERS)}"
            )
        repeated = db.execute(
            f"SELECT key, min(shard), max(shard) FROM {seen} GROUP BY key HAVING count(*) > 1 LIMIT 1"
        ).fetchall()
        if repeated and (not selected or KEY in selected):
            key, *shards = repeated[0]
            raise FindRecError(
                f"recipe {recipe}: several samples have the key {key!r} ({', '.join(shards)}), so it "
                f"does not identify a user. Select the field that does with `columns`, without {KEY}"
            )
        select = ", ".join(
            f"CAST({identifier(n)} AS {t}) AS {identifier(n)}" for n, t in (columns or {}).items()
        )
        execute(
            db,
            f"read {paths[0].name}",
            f"CREATE TABLE {table} AS SELECT {select or '*'} FROM read_parquet({literals(parts)}, "
            "union_by_name=true)",
        )
    db.execute(f"DROP TABLE {seen}")
