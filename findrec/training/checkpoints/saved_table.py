"""Reads row ranges of the tables of a checkpoint.

A table is stored in files of row ranges, `table-<first>-<last>.safetensors` for the item table and
`table_<name>-<first>-<last>.safetensors` for others, written by the workers that held those rows. Any number
of workers can load it: each reads its own rows, so no conversion is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from findrec.errors import FindRecError
from findrec.tables.base import ITEMS

_FILE = re.compile(r"table(_(?P<name>[^-]+))?-(?P<first>\d{1,18})-(?P<last>\d{1,18})\.safetensors")


def file_stem(name: str) -> str:
    """What the file names of a table begin with."""
    return "table" if name == ITEMS else f"table_{name}"


def saved_tables(path: Path, files: Iterable[str]) -> dict[str, SavedTable]:
    """The tables of a checkpoint by name; `files` are the names in its manifest, and no others are read.

    Raises `FindRecError` where a table is incomplete.
    """
    parts: dict[str, list[tuple[range, Path]]] = {}
    for match in filter(None, map(_FILE.fullmatch, files)):
        rows = range(int(match["first"]), int(match["last"]) + 1)
        if (path / match[0]).is_file():
            parts.setdefault(match["name"] or ITEMS, []).append((rows, path / match[0]))
    names = sorted(parts, key=lambda name: (name != ITEMS, name))
    return {name: SavedTable(path, name, parts[name]) for name in names}


class SavedTable(Mapping[str, Tensor]):
    """Weights and optimizer state of one table by name, read lazily from the row range files."""

    def __init__(self, path: Path, name: str, files: Sequence[tuple[range, Path]]) -> None:
        """Raises `FindRecError` if the rows of `files` have gaps or overlap, or a file cannot be read."""
        self._files = list(files)
        self._files.sort(key=lambda entry: entry[0].start)
        ends = [0, *(part.stop for part, _ in self._files)]
        if len(ends) == 1 or ends[:-1] != [part.start for part, _ in self._files]:
            listed = ", ".join(file.name for _, file in self._files) or "none"
            raise FindRecError(
                f"cannot load checkpoint {path}: the files of table {name!r} ({listed}) are not all "
                "rows, once"
            )
        self.num_rows = ends[-1]
        with _opened(self._files[0][1]) as file:
            self._names = sorted(file.keys())
            self.width = int(file.get_slice(self._names[0]).get_shape()[1])

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows `first` to `end - 1`, `[end - first, d]`; no other rows are read."""
        parts = []
        for file_rows, path in self._files:
            low, high = max(first, file_rows.start), min(end, file_rows.stop)
            if low < high:
                with _opened(path) as file:
                    parts.append(file.get_slice(name)[low - file_rows.start : high - file_rows.start])
        return torch.cat(parts) if parts else torch.zeros(0, self.width)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self.rows(name, 0, self.num_rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError, IndexError) as error:
        raise FindRecError(f"{path} cannot be read: {error}") from None
