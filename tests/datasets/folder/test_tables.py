"""Damaged manifests, tables and feature headers are reported, and files that are not listed are not read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.datasets.folder.verify import check_folder
from findrec.errors import FindRecError
from findrec.files import sha256_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    features = {"image": np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)}
    write_data_folder(tmp_path / "data", [[1, 2, 3, 4], [5, 30, 2]], num_items=30, features=features)
    return tmp_path / "data"


def fit_manifest(path: Path, **changes: object) -> None:
    """Change keys of the manifest, and let its hashes match the files."""
    tree = json.loads((path / "manifest.json").read_text()) | changes
    tree["files"] = {name: sha256_file(path / name) for name in tree["files"]}
    (path / "manifest.json").write_text(json.dumps(tree))


@pytest.mark.parametrize("name", ["items.parquet", "users.parquet", "features/image.safetensors"])
@pytest.mark.parametrize("verify", [True, False])
def test_files_that_the_manifest_does_not_list_are_not_read(path: Path, name: str, verify: bool) -> None:
    tree = json.loads((path / "manifest.json").read_text())
    del tree["files"][name]
    (path / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(FindRecError, match=rf"does not list {name}"):
        DataFolder.open(path, verify=verify)


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"[" * 100_000, b'{"schema_version": 1}', b"\xff\xfe", b"null", b"[]"]
)
def test_manifests_of_another_form_are_damaged(path: Path, content: bytes) -> None:
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(FindRecError, match="is damaged"):
        DataFolder.open(path)


def test_a_manifest_of_a_newer_version_is_not_made_again(path: Path) -> None:
    fit_manifest(path, schema_version=2)
    with pytest.raises(FindRecError, match=r"this FindRec reads 1\. Update FindRec"):
        DataFolder.open(path)


@pytest.mark.parametrize("damage", ["cut", "text", "another file", "other column", "fewer rows", "not utf-8"])
def test_damaged_items_are_reported(path: Path, damage: str) -> None:
    file = path / "items.parquet"
    items = pq.read_table(file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "text":
        file.write_text("item,raw\n1,1\n")
    elif damage == "another file":
        pq.write_table(pq.read_table(path / "users.parquet"), file)
    elif damage == "other column":
        pq.write_table(items.set_column(0, "item", [["a"] * items.num_rows]).drop(["train_count"]), file)
    elif damage == "fewer rows":
        pq.write_table(items.slice(1), file)
    else:
        raw = pa.array([b"\xff"] * items.num_rows, pa.binary()).cast(pa.string(), safe=False)
        pq.write_table(items.set_column(items.column_names.index("raw"), "raw", raw), file)
    fit_manifest(path)
    data = DataFolder.open(path)
    with pytest.raises(FindRecError, match=r"items\.parquet"):
        check_folder(path)
    with pytest.raises(FindRecError, match=r"items\.parquet"):
        _ = data.train_count if damage in ("other column", "another file") else data.item_column("raw")


@pytest.mark.parametrize(
    "header",
    [
        *(b"[]", b"[" * 5000, b"7", b"\xff\xff", b"{}", b'{"values": 5}', b'{"values": {"dtype": "F16"}}'),
        b'{"values": {"dtype": "F16", "shape": [-1, 4], "data_offsets": [0, 8]}}',
        b'{"values": {"dtype": "BOOL", "shape": [2, 2], "data_offsets": [0, 4]}, '
        b'"present": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}',
    ],
)
def test_damaged_feature_headers_are_reported(path: Path, header: bytes) -> None:
    file = path / "features/image.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(99))
    fit_manifest(path)
    with pytest.raises(FindRecError, match=r"image\.safetensors cannot be read"):
        DataFolder.open(path).feature("image")
