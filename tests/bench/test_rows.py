"""Rows survive the file, and the table shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from findrec.bench.rows import Row, publish, read_json

ROWS = [
    Row("scan", "B1", "float32", "loop", "loop", 0.002, 0.001, 3 * 2**20, 1.0),
    Row("scan", "B1", "float32", "cpp", "loop", 0.0005, 0.0004, 2**20, 4.0),
]


def test_publish_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    publish(ROWS, ["--json", str(path)])
    assert read_json(path) == ROWS
    assert json.loads(path.read_text())["machine"]["torch"]
    shown = capsys.readouterr().out
    assert "0.50" in shown  # milliseconds
    assert "4.00" in shown
