"""The canonical hash of the events depends on the events, not on the format of their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_recipe import compress, small_recipe

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.prepare.pipeline import prepare

COLUMNS = ("user", "item", "timestamp")


def events(seed: int = 0) -> np.ndarray:
    """`[N, 3]` user, item, timestamp in the source's order; ids of one to three digits, distinct times."""
    rng = np.random.default_rng(seed)
    count = 300
    columns = (rng.integers(1, 120, count), rng.integers(1, 150, count), rng.permutation(count))
    return np.stack(columns, axis=1)


def write(folder: Path, kind: str, rows: np.ndarray) -> dict[str, Any]:
    """Write the events in a format; returns the file's entry in a recipe."""
    folder.mkdir()
    lines = "".join(",".join(map(str, row)) + "\n" for row in rows.tolist())
    text = ",".join(COLUMNS) + "\n" + lines
    if kind.startswith("csv"):
        (folder / f"log.{kind}").write_bytes(compress(kind.removeprefix("csv"), text.encode()))
        return {"member": f"log.{kind}", "format": "csv"}
    if kind == "several":
        for number, part in enumerate(np.array_split(rows, 3)):
            write(folder / str(number), "csv", part)
        return {"member": "*/log.csv", "format": "csv"}
    if kind == "tsv":
        (folder / "log.tsv").write_text(text.replace(",", "\t"))
        return {"member": "log.tsv", "format": "tsv"}
    if kind == "recbole":
        header = "\t".join(f"{name}:{'float' if name == 'timestamp' else 'token'}" for name in COLUMNS)
        (folder / "log.inter").write_text(header + "\n" + lines.replace(",", "\t"))
        return {"member": "log.inter", "format": "recbole"}
    if kind == "jsonl":
        objects = (json.dumps(dict(zip(COLUMNS, row, strict=True))) for row in rows.tolist())
        (folder / "log.jsonl").write_text("\n".join(objects) + "\n")
        return {"member": "log.jsonl", "format": "jsonl"}
    table = pa.table(dict(zip(COLUMNS, rows.T, strict=True)))
    if kind == "parquet of text":
        table = table.cast(
            pa.schema([("user", pa.string()), ("item", pa.string()), ("timestamp", pa.int64())])
        )
    pq.write_table(table, folder / "log.parquet", row_group_size=64)
    return {"member": "log.parquet", "format": "parquet"}


def made(folder: Path, kind: str, rows: np.ndarray, **keys: Any) -> DataFolder:
    files, events = {"log": write(folder, kind, rows)}, 'SELECT "user", item, timestamp FROM {log}'
    return prepare(small_recipe(folder, files=files, events=events, **keys), folder / "data")


KINDS = ["csv.gz", "csv.zst", "several", "tsv", "jsonl", "parquet", "parquet of text", "recbole"]


@pytest.mark.parametrize("ties", ["row", "shuffle"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_hash(tmp_path: Path, kind: str, ties: str) -> None:
    rows = events()
    rows[:, 2] //= 9  # ties too: the files are in one order
    one = made(tmp_path / "one", "csv", rows, ties=ties)
    two = made(tmp_path / "two", kind, rows, ties=ties)
    assert one.manifest.tie_rate > 0
    assert one.manifest.events_sha256 == two.manifest.events_sha256
    assert one.user_ids == two.user_ids == sorted(one.user_ids, key=int)
    shards = [folder.path / folder.manifest.shards[0].name for folder in (one, two)]
    assert shards[0].read_bytes() == shards[1].read_bytes()


def test_the_order_of_rows_matters_only_within_ties(tmp_path: Path) -> None:
    rows = events()
    shuffled = rows[np.random.default_rng(1).permutation(len(rows))]
    hashes = {
        made(tmp_path / name, "csv", some).manifest.events_sha256
        for name, some in (("rows", rows), ("shuffled", shuffled))
    }
    assert len(hashes) == 1
    tied, reversed_ties = rows.copy(), rows[::-1].copy()
    tied[:, 2] = reversed_ties[:, 2] = 7
    hashes |= {
        made(tmp_path / name, "csv", some).manifest.events_sha256
        for name, some in (("tied", tied), ("reversed", reversed_ties))
    }
    assert len(hashes) == 3


@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_changed_value_changes_the_hash(tmp_path: Path, column: int) -> None:
    other = events()
    other[17, column] += 1000
    one, two = made(tmp_path / "one", "csv", events()), made(tmp_path / "two", "csv", other)
    assert one.manifest.events_sha256 != two.manifest.events_sha256
