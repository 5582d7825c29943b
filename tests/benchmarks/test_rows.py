"""Rows are printed as a table and written to a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.rows import Row, make_parser, publish

ROWS = [
    Row("scan", "B1", "float32", "loop", "loop", 0.002, 0.001, 3 * 2**20, 1.0),
    Row("scan", "B1", "float32", "cpp", "loop", 0.0005, 0.0004, 2**20, 4.0),
]


def test_publish_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    publish(ROWS, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.pop("machine")["torch"] for line in lines)
    assert [Row(**line) for line in lines] == ROWS
    shown = capsys.readouterr().out
    assert "0.50" in shown  # milliseconds
    assert "4.00" in shown


def test_an_unwritable_file_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = make_parser(None)
    assert parser.parse_args(["--json", str(tmp_path / "rows.json")]).json == tmp_path / "rows.json"
    for wrong in (tmp_path, tmp_path / "missing" / "rows.json"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--json", str(wrong)])
        assert "give a file in an existing folder" in capsys.readouterr().err
