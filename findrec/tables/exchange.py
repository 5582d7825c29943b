"""Which worker holds which rows of a table, and the exchanges between them.

Ranges are contiguous: a worker then saves, initialises and reads features of one piece, and a checkpoint is
row-range files that any other number of workers reads its own ranges from. Dealing rows round robin would
spread frequent items more evenly, but their lookups are a small part of a step: the catalogue loss costs the
same for every row.

Shape letters: U ids that are asked for, R rows that are asked for here, W workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def row_range(num_rows: int, rank: int, world: int) -> range:
    """The rows of `num_rows` that worker `rank` of `world` holds; sizes differ by one at most."""
    return range(rank * num_rows // world, (rank + 1) * num_rows // world)


@dataclass(frozen=True)
class Shards:
    """Rows 0..num_rows - 1 in one range for each worker of a group (`row_range`)."""

    num_rows: int
    group: dist.ProcessGroup | None = None  # None: all workers

    @property
    def world(self) -> int:
        """Number of workers; 1 without a process group."""
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """This worker's place among them."""
        return dist.get_rank(self.group) if dist.is_initialized() else 0

    @property
    def own(self) -> range:
        """This worker's rows."""
        return row_range(self.num_rows, self.rank, self.world)

    def owner(self, ids: Tensor) -> Tensor:
        """The rank that holds each row."""
        # r holds id where r <= ((id + 1) W - 1) / num_rows < r + 1: `row_range`, solved for the rank.
        return torch.div((ids + 1) * self.world - 1, self.num_rows, rounding_mode="floor")

    def exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """All-to-all of slices of `x`: `sent[r]` go to rank r, `received[r]` come from it, in rank order."""
        if self.world == 1:
            return x
        result = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(result, x.contiguous(), received, sent, group=self.group)
        return result

    def gather(self, x: Tensor) -> Tensor:
        """`[W, *x.shape]` from tensors of one shape."""
        if self.world == 1:
            return x[None]
        result = x.new_empty(self.world, *x.shape)
        dist.all_gather(list(result.unbind()), x.contiguous(), group=self.group)
        return result

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """`x` of all workers put together, in its place; a ring adds in the same order every time."""
        if self.world > 1:
            dist.all_reduce(x, op, group=self.group)
        return x

    def lengths(self, *own: int, device: torch.device) -> list[list[int]]:
        """For each number given here, what it is on every worker."""
        found: list[list[int]] = self.gather(torch.tensor(own, device=device)).t().tolist()
        return found

    def gather_uneven(self, x: Tensor, lengths: list[int]) -> Tensor:
        """`[sum(lengths), ...]` in rank order, where rank r gives `lengths[r]`."""
        if self.world == 1:
            return x
        padded = x.new_zeros(max(lengths), *x.shape[1:])
        padded[: len(x)] = x
        parts = self.gather(padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def scatter_sum(self, x: Tensor, lengths: list[int]) -> Tensor:
        """The own part `[lengths[rank], ...]` of the sum of all workers' `x` `[sum(lengths), ...]`.

        A reduce-scatter of uneven parts that adds up in rank order, so that bits repeat.
        """
        own = lengths[self.rank]
        parts = self.exchange(x, lengths, [own] * self.world)
        return parts.view(self.world, own, *x.shape[1:]).sum(0)

    def total(self, value: float, device: torch.device) -> float:
        """The sum of a number over workers."""
        return float(self.gather(torch.tensor(value, dtype=torch.float64, device=device)).sum())


class Route:
    """Where the rows of distinct ids lie: made by all workers together, each for ids of its own."""

    def __init__(self, shards: Shards, ids_U: Tensor) -> None:
        self._shards = shards
        owner_U = shards.owner(ids_U)
        self._order_U = owner_U.argsort(stable=True)
        sent = torch.bincount(owner_U, minlength=shards.world)
        each = [1] * shards.world
        self._sent: list[int] = sent.tolist()
        self._received: list[int] = shards.exchange(sent, each, each).tolist()
        self.place_R = self.to_owners(ids_U) - shards.own.start  # rows of this worker that are asked for

    def to_owners(self, x_U: Tensor) -> Tensor:
        """`[R, ...]`: what belongs to the rows this worker holds, by rank of the asker."""
        return self._shards.exchange(x_U[self._order_U], self._sent, self._received)

    def to_askers(self, x_R: Tensor) -> Tensor:
        """`[U, ...]`: what the holders of the asked-for ids say of them."""
        answer = self._shards.exchange(x_R, self._received, self._sent)
        result = torch.empty_like(answer)
        result[self._order_U] = answer
        return result
