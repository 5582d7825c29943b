"""The item vectors that a ranking walks through: in memory, or in a file that is read tile by tile.

Counts of parts of a catalogue add up, so whatever can hand out single rows and count a part of them can be
ranked: see `findrec.evaluation.search.ray_rows` for parts on other machines.

Shape letters: V items (ids 1..V; row 0 is padding), B users, C cases, T items of a part, P pairs, d width.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from findrec.ops.ranking._rank_cpp import cpp_count, cpp_rank_problem
from findrec.ops.ranking._rank_torch import torch_count
from findrec.ops.ranking.counting import Counts
from findrec.progress import warn

Impl = Literal["auto", "int16", "float32", "torch", "bfloat16", "exact"]
_COMPILED: dict[str, Literal["int16", "float32"]] = {"int16": "int16", "float32": "float32"}
_KINDS: dict[str, Literal["float32", "bfloat16", "float64"]] = {
    "torch": "float32",
    "bfloat16": "bfloat16",
    "exact": "float64",
}
_TILE_BYTES = 32 << 20  # of a file, read while the tile before it is counted


class ItemRows(Protocol):
    """Float32 vectors of the items 1..`num_items`, `width` wide."""

    @property
    def num_items(self) -> int:
        """V."""

    @property
    def width(self) -> int:
        """The width d of a row."""

    def rows(self, item_P: Tensor) -> Tensor:
        """The vectors `[P, d]` of some items."""

    def count(
        self,
        users_Bd: Tensor,
        row_C: Tensor,
        t_C: Tensor,
        *,
        since_V: Tensor | None,
        time_C: Tensor | None,
        impl: Impl,
        tile_mib: int,
    ) -> Counts:
        """How all items compare with the scores `t_C` of cases (see `count_part`)."""


@dataclass(frozen=True)
class TensorRows:
    """Vectors in memory: float32 `[V + 1, d]`."""

    items_Vd: Tensor

    def __post_init__(self) -> None:
        """Refuse other dtypes: the score is defined by the stored float32 numbers."""
        if self.items_Vd.dtype != torch.float32:
            raise ValueError(f"item vectors must be float32, got {self.items_Vd.dtype}: convert them first")

    @property
    def num_items(self) -> int:
        """V."""
        return len(self.items_Vd) - 1

    @property
    def width(self) -> int:
        """The width d of a row."""
        return self.items_Vd.shape[1]

    def rows(self, item_P: Tensor) -> Tensor:
        """The vectors `[P, d]` of some items."""
        return self.items_Vd[item_P]

    def count(
        self,
        users_Bd: Tensor,
        row_C: Tensor,
        t_C: Tensor,
        *,
        since_V: Tensor | None,
        time_C: Tensor | None,
        impl: Impl,
        tile_mib: int,
    ) -> Counts:
        """How all items compare with the scores `t_C` of cases."""
        since_T = None if since_V is None else since_V[1:]
        return count_part(
            users_Bd,
            self.items_Vd[1:],
            row_C,
            t_C,
            since_T=since_T,
            time_C=time_C,
            impl=impl,
            tile_mib=tile_mib,
        )


class FileRows:
    """Items lo..hi-1 of a `.npy` file of float32 `[V + 1, d]` vectors; row 0 is padding.

    No more than two tiles are in memory, however many items there are: the next is read while one is counted.
    A part of no more than `held_bytes` is read once and kept.
    """

    def __init__(self, path: Path | str, lo: int = 1, hi: int | None = None, *, held_bytes: int = 0) -> None:
        self._path = Path(path)
        with self._path.open("rb") as stream:
            version = npy.read_magic(stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            self._begin = stream.tell()
        if dtype != np.float32 or len(shape) != 2 or fortran:
            raise ValueError(
                f"{path} holds {dtype} of shape {shape}: item vectors are float32 [items + 1, width], rows "
                "in order (numpy.save of a C-ordered array)"
            )
        self._held, self._width = shape
        self.lo, self.hi = lo, self._held if hi is None else hi
        if not 1 <= self.lo <= self.hi <= self._held:
            raise ValueError(f"items {lo}..{hi} are not in {path}, which holds 1..{self._held - 1}")
        self._kept: Tensor | None = None
        if 4 * self._width * (self.hi - self.lo) <= held_bytes:
            self._kept = torch.empty(self.hi - self.lo, self._width)
            self._read(self.lo, self._kept)

    @property
    def num_items(self) -> int:
        """V: of the whole file."""
        return self._held - 1

    @property
    def width(self) -> int:
        """The width d of a row."""
        return self._width

    def rows(self, item_P: Tensor) -> Tensor:
        """The vectors `[P, d]` of some items, of this part or not."""
        # Not through a memory map, which takes a dozen pages into memory for each row.
        wanted, index_P = torch.unique(item_P, return_inverse=True)
        rows = torch.empty(len(wanted), self._width)
        with self._path.open("rb", buffering=0) as stream:
            for row, item in enumerate(wanted.tolist()):
                stream.seek(self._begin + 4 * item * self._width)
                stream.readinto(rows[row].numpy().data)
        return rows[index_P]

    def count(
        self,
        users_Bd: Tensor,
        row_C: Tensor,
        t_C: Tensor,
        *,
        since_V: Tensor | None,
        time_C: Tensor | None,
        impl: Impl,
        tile_mib: int,
    ) -> Counts:
        """How the items lo..hi-1 compare with the scores `t_C` of cases."""
        total = Counts(torch.zeros_like(row_C), torch.zeros_like(row_C))
        for lo, items_Td in self.tiles():
            part = count_part(
                users_Bd,
                items_Td,
                row_C,
                t_C,
                since_T=None if since_V is None else since_V[lo : lo + len(items_Td)],
                time_C=time_C,
                impl=impl,
                tile_mib=tile_mib,
            )
            total.greater += part.greater
            total.equal += part.equal
        return total

    def tiles(self) -> Iterator[tuple[int, Tensor]]:
        """The part in pieces: the first item's id, and vectors `[T, d]` that the next piece overwrites."""
        if self._kept is not None:
            yield self.lo, self._kept
            return
        step = max(1, _TILE_BYTES // (4 * max(1, self._width)))
        spare = [torch.empty(min(step, self.hi - self.lo), self._width) for _ in range(2)]
        starts = range(self.lo, self.hi, step)

        def fill(tile: int) -> Tensor:
            lo = starts[tile]
            tile_Td = spare[tile % 2][: min(step, self.hi - lo)]
            self._read(lo, tile_Td)
            return tile_Td

        with ThreadPoolExecutor(1) as reader:
            pending = [reader.submit(fill, tile) for tile in range(min(1, len(starts)))]
            for tile, lo in enumerate(starts):
                tile_Td = pending.pop().result()
                if tile + 1 < len(starts):
                    pending.append(reader.submit(fill, tile + 1))
                yield lo, tile_Td

    def _read(self, lo: int, tile_Td: Tensor) -> None:
        view = tile_Td.numpy().reshape(-1).view(np.uint8).data
        with self._path.open("rb", buffering=0) as stream:
            stream.seek(self._begin + 4 * lo * self._width)
            done = 0
            while done < len(view):
                got = stream.readinto(view[done:])
                if not got:
                    raise OSError(f"{self._path} ends early: it was cut while it was read")
                done += got


def count_part(
    users_Bd: Tensor,
    items_Td: Tensor,
    row_C: Tensor,
    t_C: Tensor,
    *,
    since_T: Tensor | None = None,
    time_C: Tensor | None = None,
    impl: Impl = "auto",
    tile_mib: int = 64,
) -> Counts:
    """How many of some items are above and level with each case's score: exact (see `target_rank`).

    Args:
        users_Bd: float32 `[B, d]`, or `[B, K, d]`: the score is the largest of K inner products.
        items_Td: float32 `[T, d]`.
        row_C: int64 `[C]`, the user of each case.
        t_C: float64 `[C]`, the scores to compare with; never NaN.
        since_T: int64 `[T]`, with `time_C`: an item counts in the cases with `time_C >= since_T`.
        time_C: int64 `[C]`.
        impl: as in `target_rank`.
        tile_mib: working memory of torch's forms.
    """
    chosen = choose(impl, users_Bd.device)
    if users_Bd.dim() == 3 and chosen in _COMPILED:  # the compiled walk knows one vector of a user
        chosen = "torch"
    if chosen in _KINDS:
        return torch_count(
            users_Bd,
            items_Td,
            row_C,
            t_C,
            kind=_KINDS[chosen],
            since_T=since_T,
            time_C=time_C,
            tile_mib=tile_mib,
        )
    rows, size = torch.unique_consecutive(row_C.sort().values, return_counts=True)
    order_C = torch.argsort(row_C, stable=True)
    start = torch.cat([size.new_zeros(1), size.cumsum(0)])
    greater, equal, _ = cpp_count(
        users_Bd[rows],
        items_Td,
        start,
        t_C[order_C],
        kind=_COMPILED[chosen],
        since_T=since_T,
        time_C=None if time_C is None else time_C[order_C],
    )
    counts = Counts(torch.empty_like(row_C), torch.empty_like(row_C))
    counts.greater[order_C], counts.equal[order_C] = greater, equal
    return counts


def choose(impl: str, device: torch.device) -> str:
    """The form that `auto` stands for here. Raises `ValueError` for one that cannot work."""
    if impl != "auto" and impl not in _COMPILED and impl not in _KINDS:
        names = ", ".join(("auto", *_COMPILED, *_KINDS))
        raise ValueError(f"impl={impl!r} is unknown: choose one of {names}")
    if impl in _KINDS:
        return impl
    if device.type != "cpu":
        if impl == "auto":
            return "torch"
        raise ValueError(f"impl={impl!r} works on a CPU, the vectors are on {device.type}; use 'auto'")
    problem = cpp_rank_problem()
    if problem is None:
        return "int16" if impl == "auto" else impl
    if impl == "auto":
        _warn_once(problem)
        return "torch"
    raise ValueError(f"impl={impl!r} cannot be used here: {problem}; 'auto' picks what works")


@cache
def _warn_once(problem: str) -> None:
    warn(f"Ranking takes its slower form (the same results, about half the speed): {problem}")
