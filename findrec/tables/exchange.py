"""Assigns the rows of a table to workers, and exchanges data between them.

Each worker holds a contiguous range of rows. So it saves, initialises and reads features of one range, and a
checkpoint consists of row range files from which any number of workers can read their ranges. A round-robin
assignment would distribute frequent items more evenly, but lookups are a small part of a step: the catalogue
loss costs the same for every row.

Shape letters: U ids requested by this worker, R local rows requested by all workers, W workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from findrec.devices import copy_to
from findrec.tables.collectives import COLLECTIVES


def row_range(num_rows: int, rank: int, world: int) -> range:
    """The range of rows that worker `rank` of `world` holds; sizes differ by one at most."""
    return range(rank * num_rows // world, (rank + 1) * num_rows // world)


@dataclass(frozen=True)
class Shards:
    """Rows 0..num_rows - 1, split over the workers of a group by `row_range`."""

    num_rows: int
    group: dist.ProcessGroup | None = None  # None: all workers

    @property
    def world(self) -> int:
        """Number of workers; 1 without a process group."""
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """The rank of this worker in the group."""
        return dist.get_rank(self.group) if dist.is_initialized() else 0

    @property
    def local(self) -> range:
        """The rows this worker holds."""
        return row_range(self.num_rows, self.rank, self.world)

    def owner(self, ids: Tensor) -> Tensor:
        """The rank of the worker that holds each row."""
        # Rank r holds the id if r <= ((id + 1) W - 1) / num_rows < r + 1: `row_range` solved for the rank.
        return torch.div((ids + 1) * self.world - 1, self.num_rows, rounding_mode="floor")

    def exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """All-to-all of slices of `x` in rank order: `sent[r]` rows to rank r, `received[r]` rows from it."""
        if self.world == 1:
            return x
        result = x.new_empty(sum(received), *x.shape[1:])
        with COLLECTIVES.call("exchange of rows"):
            dist.all_to_all_single(result, x.contiguous(), received, sent, group=self.group)
        return result

    def gather(self, x: Tensor) -> Tensor:
        """All-gather of tensors of equal shape: `[W, *x.shape]`."""
        if self.world == 1:
            return x[None]
        result = x.new_empty(self.world, *x.shape)
        with COLLECTIVES.call("gathering of values"):
            dist.all_gather(list(result.unbind()), x.contiguous(), group=self.group)
        return result

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """All-reduce `x` in place and return it; the ring adds in the same order every time."""
        if self.world > 1:
            with COLLECTIVES.call("reduction of values"):
                dist.all_reduce(x, op, group=self.group)
        return x

    def lengths(self, *local: int, device: torch.device) -> list[list[int]]:
        """For each of the numbers, its values on all workers in rank order."""
        if self.world == 1:
            return [[value] for value in local]
        values: list[list[int]] = self.gather(copy_to(torch.tensor(local), device)).t().tolist()
        return values

    def gather_uneven(self, x: Tensor, lengths: list[int]) -> Tensor:
        """All-gather of `lengths[r]` rows from each rank r: `[sum(lengths), ...]` in rank order."""
        if self.world == 1:
            return x
        padded = x.new_zeros(max(lengths), *x.shape[1:])
        padded[: len(x)] = x
        parts = self.gather(padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def scatter_sum(self, x: Tensor, lengths: list[int]) -> Tensor:
        """Reduce-scatter of uneven parts, from `[sum(lengths), ...]` to `[lengths[rank], ...]`.

        Adds in rank order, so that results are reproducible bit for bit.
        """
        length = lengths[self.rank]
        parts = self.exchange(x, lengths, [length] * self.world)
        return parts.view(self.world, length, *x.shape[1:]).sum(0)

    def total(self, value: Tensor) -> float:
        """The sum of `value` `[]` over all workers, in float64."""
        return float(self.gather(value.double()).sum())


class Route:
    """Routes requests for rows to the workers that hold them; construction is a collective call."""

    def __init__(self, shards: Shards, ids_U: Tensor) -> None:
        self._shards = shards
        owner_U, self._order_U = shards.owner(ids_U).sort(stable=True)
        sent = torch.searchsorted(owner_U, torch.arange(shards.world + 1, device=owner_U.device)).diff()
        each = [1] * shards.world
        counts = torch.stack([sent, shards.exchange(sent, each, each)])
        self._sent: list[int]
        self._received: list[int]
        self._sent, self._received = counts.tolist()  # where the host waits for a GPU, once
        self.index_R = self.to_owners(ids_U) - shards.local.start  # local indices of the requested rows

    def to_owners(self, x_U: Tensor) -> Tensor:
        """Send values `[U, ...]` of the requested ids to their owners; receive `[R, ...]` in rank order."""
        return self._shards.exchange(x_U[self._order_U], self._sent, self._received)

    def to_requesters(self, x_R: Tensor) -> Tensor:
        """Send values `[R, ...]` of local rows to the workers that requested them; receive `[U, ...]`."""
        received = self._shards.exchange(x_R, self._received, self._sent)
        result = torch.empty_like(received)
        result[self._order_U] = received
        return result
