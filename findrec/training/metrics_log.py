"""`metrics.jsonl` of a run folder: every number a training measures. Only rank 0 writes it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def _plain(value: Any) -> Any:
    """A JSON value: array and tensor scalars become Python's, non-finite numbers `null`."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """Append-only `metrics.jsonl`: one object a line, `step`, `epoch`, `time` (Unix seconds) and the values.

    A process killed while writing leaves a torn last line; it is dropped when the file is next opened.
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
        """Every whole line, in order."""
        return read_lines(self.path)

    def truncate_after(self, step: int) -> None:
        """Drop lines of steps after `step`: a run resumed from that step writes them again."""
        self._file.close()
        self._rewrite([line for line in self.read() if line["step"] <= step])
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file; nothing is buffered, so leaving it open loses nothing either."""
        self._file.close()

    def _rewrite(self, lines: Sequence[Mapping[str, Any]]) -> None:
        new = self.path.with_suffix(".jsonl.new")
        with new.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of such a file, in order; none when it is not there."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # torn by a kill
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines
