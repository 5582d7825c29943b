"""Writes and reads `metrics.jsonl` of a run folder, the log of training metrics, written by rank 0."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from findrec.files import replacing


def _plain(value: Any) -> Any:
    """A JSON value: array and tensor scalars become Python's, non-finite numbers `null`."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """An append-only file with one JSON object per line: `step`, `epoch`, `time` (Unix seconds) and metrics.

    A process killed while writing leaves an incomplete last line; it is dropped when the file is next opened.
    """

    def __init__(self, run_folder: Path, name: str = "metrics.jsonl") -> None:
        self.path = run_folder / name
        run_folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file() and not self.path.read_bytes().endswith(b"\n"):
            self._rewrite(self.read())
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Append one line and flush it. Non-finite numbers are written as `null`."""
        line = {"step": step, "epoch": epoch, "time": round(time.time(), 3)}
        line |= {key: _plain(value) for key, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def read(self) -> list[dict[str, Any]]:
        """All complete lines, in order."""
        return read_lines(self.path)

    def truncate_after(self, step: int) -> None:
        """Drop the lines of steps after `step`, which a run resumed from that step writes again."""
        self._file.close()
        self._rewrite([line for line in self.read() if line["step"] <= step])
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file. Every line is flushed when written, so an unclosed file loses nothing."""
        self._file.close()

    def _rewrite(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with replacing(self.path, sync=True) as part, part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file, in order; an empty list if the file does not exist."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue  # incomplete: the process was killed
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
