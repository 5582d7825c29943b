"""Ranks with several Ray workers, each with a range of the catalogue's rows.

Item vectors are in one file that all workers can read. Counts of ranges are added and lists of ranges merged
exactly, so results do not depend on the number of workers. Workers are stateless: a lost one is restarted and
its task repeated. A worker keeps its range in memory if it has at most `HELD_BYTES`, otherwise two tiles of
it. evaluation/README.md estimates the number of workers for large catalogues.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from findrec.evaluation.search.exact_top import Top, best, exact_top, with_specials
from findrec.ops.ranking._rank_special import Specials
from findrec.ops.ranking.counting import Counts
from findrec.ops.ranking.item_rows import FileRows, Impl
from findrec.ops.ranking.rules import ALL_COMPETE, Rules
from findrec.ray_session import usable_cpus

HELD_BYTES = 2 << 30


class Shard:
    """A worker with the items lo..hi-1 of a file of vectors."""

    def __init__(self, path: str, lo: int, hi: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._rows = FileRows(path, lo, hi, held_bytes=HELD_BYTES)

    def count(self, *args: Any, **kwargs: Any) -> Counts:
        """Compute `ItemRows.count` of the range."""
        return self._rows.count(*args, **kwargs)

    def top(self, users_Bd: Tensor, k: int, **times: Tensor | None) -> Top:
        """Compute `exact_top` of the range."""
        return exact_top(users_Bd, self._rows.tiles, k, **times)


class ShardedRows:
    """The item vectors of a file, distributed over `shards` Ray workers. Ray must be initialised."""

    def __init__(self, path: Path, shards: int) -> None:
        import ray

        self._whole = FileRows(path)
        shards = max(1, min(shards, self._whole.num_items))
        cuts = [1 + self._whole.num_items * s // shards for s in range(shards + 1)]
        cpus = ray.available_resources().get("CPU", 0.0)
        threads = max(1, usable_cpus() // shards)
        # A fraction of a core if there are more shards than free cores, and 0 if training uses all of them:
        # Ray would wait forever for more.
        remote: Any = ray.remote(
            num_cpus=min(1.0, int(100 * cpus / shards) / 100), max_restarts=3, max_task_retries=3
        )
        worker = remote(Shard)
        self._shards = [worker.remote(str(path), lo, hi, threads) for lo, hi in itertools.pairwise(cuts)]

    @property
    def num_items(self) -> int:
        """Number of items V."""
        return self._whole.num_items

    @property
    def width(self) -> int:
        """Width d of the vectors."""
        return self._whole.width

    def rows(self, item_P: Tensor) -> Tensor:
        """Vectors `[P, d]` of some items, read from the file in this process."""
        return self._whole.rows(item_P)

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
        """Count all items against the scores `t_C` of cases."""
        parts = self._call_all(
            "count", users_Bd, row_C, t_C, since_V=since_V, time_C=time_C, impl=impl, tile_mib=tile_mib
        )
        return Counts(sum(part.greater for part in parts), sum(part.equal for part in parts))

    def top(self, users_Bd: Tensor, k: int, rules: Rules = ALL_COMPETE, time_B: Tensor | None = None) -> Top:
        """The first k items of each user by exact scores, of those available at the users' times `time_B`.

        `users_Bd` and `rules` are as in `target_rank`.
        """
        since_V = rules.since_V
        special = Specials.of(len(users_Bd), self.num_items, rules, users_Bd.device)
        if since_V is not None and time_B is not None:  # items with a bonus must be available too
            special = special.there(since_V[special.item] <= time_B[special.row])
        most = int((special.start[1:] - special.start[:-1]).max()) if len(special.key) else 0
        parts = self._call_all("top", users_Bd, k + most, since_V=since_V, time_B=time_B)
        merged = best((torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)), k + most)
        return with_specials(merged, users_Bd, self, special, k)

    def _call_all(self, name: str, *args: Any, **kwargs: Any) -> list[Any]:
        import ray

        def share(value: Any) -> Any:
            return ray.put(value) if isinstance(value, Tensor) else value

        args, kwargs = tuple(map(share, args)), {key: share(value) for key, value in kwargs.items()}
        results: list[Any] = ray.get([getattr(shard, name).remote(*args, **kwargs) for shard in self._shards])
        return results

    def close(self) -> None:
        """Stop the workers."""
        import ray

        for shard in self._shards:
            ray.kill(shard)


@contextmanager
def sharded(items_Vd: Tensor, folder: Path, shards: int) -> Iterator[ShardedRows]:
    """`ShardedRows` of vectors in memory, through a temporary file in a folder that all workers can read."""
    handle, name = tempfile.mkstemp(prefix=".items.", suffix=".npy", dir=folder)
    os.close(handle)
    path = Path(name)
    try:
        np.save(path, items_Vd.cpu().numpy())
        rows = ShardedRows(path, shards)
        try:
            yield rows
        finally:
            rows.close()
    finally:
        path.unlink()
