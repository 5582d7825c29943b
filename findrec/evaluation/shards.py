"""A catalogue ranked by several Ray workers, each with a range of its rows.

The item vectors lie in one file that all workers can reach (the run folder's storage). Counts of ranges add
up and lists of ranges merge, both exactly, so their number changes no digit. A worker knows nothing but its
range: a lost one is started again and asked again. What a worker holds is its range, where that is no more
than `HELD_BYTES`, else two tiles of it.

How long it takes: a core counts some 300 million pairs a second for vectors of 128 (`users_per_s` x items of
evaluation/benchmarks/ranking.py), so 100 million items need as many times more workers than one million do
for the same rate; evaluation/README.md works it out.
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

from findrec.cluster.launch import usable_cpus
from findrec.evaluation.exact_top import Top, best, exact_top, with_specials
from findrec.ops._rank_special import Specials
from findrec.ops.counting import Counts
from findrec.ops.item_rows import FileRows, Impl

HELD_BYTES = 2 << 30


class Shard:
    """What one worker does: counts and lists over items lo..hi-1 of a file of vectors."""

    def __init__(self, path: str, lo: int, hi: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._rows = FileRows(path, lo, hi, held_bytes=HELD_BYTES)

    def count(
        self,
        users_Bd: Tensor,
        row_C: Tensor,
        t_C: Tensor,
        since_V: Tensor | None,
        time_C: Tensor | None,
        impl: Impl,
        tile_mib: int,
    ) -> Counts:
        """`ItemRows.count` of the range."""
        return self._rows.count(
            *(users_Bd, row_C, t_C), since_V=since_V, time_C=time_C, impl=impl, tile_mib=tile_mib
        )

    def top(self, users_Bd: Tensor, k: int, since_V: Tensor | None, time_B: Tensor | None) -> Top:
        """`exact_top` of the range."""
        return exact_top(users_Bd, self._rows.tiles, k, since_V=since_V, time_B=time_B)


class ShardedRows:
    """The item vectors of a file, counted and listed by `shards` Ray workers. Ray must have been started."""

    def __init__(self, path: Path, shards: int) -> None:
        import ray

        self._whole = FileRows(path)
        shards = max(1, min(shards, self._whole.num_items))
        cuts = [1 + self._whole.num_items * s // shards for s in range(shards + 1)]
        cpus = ray.available_resources().get("CPU", 0.0)
        threads = max(1, usable_cpus() // shards)
        # A share of a core where there are more shards than free cores, nothing where workers train on all of
        # them: Ray would wait for more without end.
        remote: Any = ray.remote(
            num_cpus=min(1.0, int(100 * cpus / shards) / 100), max_restarts=3, max_task_retries=3
        )
        worker = remote(Shard)
        self._shards = [worker.remote(str(path), lo, hi, threads) for lo, hi in itertools.pairwise(cuts)]

    @property
    def num_items(self) -> int:
        """V."""
        return self._whole.num_items

    @property
    def width(self) -> int:
        """d."""
        return self._whole.width

    def rows(self, item_P: Tensor) -> Tensor:
        """The vectors `[P, d]` of some items, read from the file here."""
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
        """How all items compare with the scores `t_C` of cases."""
        parts = self._ask("count", users_Bd, row_C, t_C, since_V, time_C, impl, tile_mib)
        return Counts(sum(part.greater for part in parts), sum(part.equal for part in parts))

    def top(
        self,
        users_Bd: Tensor,
        k: int,
        *,
        own_ids_BN: Tensor | None = None,
        own_bonus_BN: Tensor | None = None,
        exclude_ids_BN: Tensor | None = None,
        since_V: Tensor | None = None,
        time_B: Tensor | None = None,
    ) -> Top:
        """The first k items of each user by exact scores; arguments as in `target_rank`."""
        special = Specials.of(
            *(len(users_Bd), self.num_items, own_ids_BN, own_bonus_BN, exclude_ids_BN, users_Bd.device)
        )
        if since_V is not None and time_B is not None:  # a bonus brings no item forward in time
            special = special.there(since_V[special.item] <= time_B[special.row])
        most = int((special.start[1:] - special.start[:-1]).max()) if len(special.key) else 0
        parts = self._ask("top", users_Bd, k + most, since_V, time_B)
        merged = best((torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)), k + most)
        return with_specials(merged, users_Bd, self, special, k)

    def _ask(self, name: str, *args: Any) -> list[Any]:
        import ray

        shared = [ray.put(arg) if isinstance(arg, Tensor) else arg for arg in args]
        answers: list[Any] = ray.get([getattr(shard, name).remote(*shared) for shard in self._shards])
        return answers

    def close(self) -> None:
        """End the workers."""
        import ray

        for shard in self._shards:
            ray.kill(shard)


@contextmanager
def sharded(items_Vd: Tensor, folder: Path, shards: int) -> Iterator[ShardedRows]:
    """`ShardedRows` of vectors in memory, by way of a temporary file in a folder that all workers reach."""
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
