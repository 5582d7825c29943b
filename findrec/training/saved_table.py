"""The item table of a checkpoint, read as far as it is needed.

It lies in files of row ranges, one for each worker that held some: `table-<first>-<last>.safetensors`. Any
other number of workers, or a single process, reads its own rows out of them, so nothing is ever converted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from findrec.errors import FindRecError


class SavedTable(Mapping[str, Tensor]):
    """Weights and moments of the item table by name, read from the files of its row ranges when asked for."""

    def __init__(self, path: Path) -> None:
        """Raises `FindRecError` where the ranges below `path` leave rows out or overlap."""
        self._files: list[tuple[range, Path]] = []
        for file in path.glob("table-*-*.safetensors"):
            first, last = (int(part) for part in file.stem.split("-")[1:])
            self._files.append((range(first, last + 1), file))
        self._files.sort(key=lambda entry: entry[0].start)
        ends = [0, *(part.stop for part, _ in self._files)]
        if len(ends) == 1 or ends[:-1] != [part.start for part, _ in self._files]:
            names = ", ".join(file.name for _, file in self._files) or "none"
            raise FindRecError(
                f"cannot load checkpoint {path}: its table files ({names}) are not all rows, once"
            )
        self.num_rows = ends[-1]
        with safe_open(str(self._files[0][1]), framework="pt") as file:
            self._names = sorted(file.keys())
            self.width = int(file.get_slice(self._names[0]).get_shape()[1])

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows `first` to `end - 1`, `[end - first, d]`; nothing else is read."""
        parts = []
        for held, path in self._files:
            low, high = max(first, held.start), min(end, held.stop)
            if low < high:
                with safe_open(str(path), framework="pt") as file:
                    parts.append(file.get_slice(name)[low - held.start : high - held.start])
        return torch.cat(parts) if parts else torch.zeros(0, self.width)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self.rows(name, 0, self.num_rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
