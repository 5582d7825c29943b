"""The item table with its rows split over the workers, for catalogues that one worker does not hold.

A worker holds a range of rows (`Shards`) with their gradient and moments. Rows of distinct ids come by
all-to-all and their gradients go back the same way; the exact loss is `sharded_cross_entropy`, the sampled
ones look rows up; the optimizer is the replicated table's. So the placement changes results by rounding
alone.

TorchRec shards embeddings too, but not this: its `fbgemm-gpu` updates rows inside the backward pass, where a
gradient can neither be clipped by its norm over all workers nor meet an exact loss that touches every row;
on a CPU it is a wheel of its own, tied to one torch version.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from findrec.ops.linear_cross_entropy import OwnBonus
from findrec.tables.base import CatalogueLoss, SavedRows, Scored, Transform
from findrec.tables.exchange import Route, Shards
from findrec.tables.negatives import estimated_loss
from findrec.tables.parts import TableSpec
from findrec.tables.sharded_loss import sharded_cross_entropy


class ShardedItemTable:
    """The rows `shards.own` on this worker (`Table`); `lookup`, `push` of ids, loss and step are collectives.

    With the exact loss, `catalogue_loss` takes a round of microbatches, one of each worker, against one set
    of vectors: a `transform` must be the same for all of them (no dropout of its own).
    """

    sharded = True

    def __init__(self, spec: TableSpec, group: dist.ProcessGroup | None = None) -> None:
        """The spec's rows, the same as of `ItemTable`; `group` are the workers (None: all).

        Raises `ValueError` where there are more workers than rows.
        """
        self.shards = Shards(spec.num_rows, group)
        if self.shards.world > spec.num_rows:
            raise ValueError(
                f"item table: {spec.num_rows} rows (padding included) cannot be split over "
                f"{self.shards.world} workers; set training.table=replicated"
            )
        part = self.shards.own
        self._held = spec.held_rows(part)
        self.weight = self._held.weight
        classes = spec.classes()
        allowed = torch.ones(len(part), dtype=torch.bool)
        if classes is not None:
            allowed = classes[part.start : part.stop].clone()
        if part.start == 0:
            allowed[0] = False
        self._blocked = (~allowed).nonzero()[:, 0].to(spec.device)
        self._tile_bytes = spec.loss.tile_mib << 20
        self._negatives = spec.negatives()

    @property
    def first_row(self) -> int:
        """See `Table`."""
        return self.shards.own.start

    def lookup(self, ids_U: Tensor) -> Tensor:
        """See `Table`."""
        assert len(self.weight) == len(self.shards.own), "the table was made before the process group"
        route = Route(self.shards, ids_U)
        return route.to_askers(self.weight[route.place_R]).requires_grad_()

    def push(self, ids_U: Tensor | None, grad_Ud: Tensor) -> None:
        """See `Table`. Only with ids it is a collective."""
        if ids_U is None:
            self._held.add(None, grad_Ud)
            return
        route = Route(self.shards, ids_U)
        self._held.add(route.place_R, route.to_owners(grad_Ud))

    def catalogue_loss(
        self,
        h_Td: Tensor,
        target_T: Tensor,
        num_targets: int,
        *,
        own: OwnBonus | None = None,
        generator: torch.Generator | None = None,
        transform: Transform | None = None,
    ) -> CatalogueLoss:
        """See `Table`. In the exact loss `transform` is given this worker's rows, and `Scored` holds the
        gradient of the tokens of all workers in them.
        """
        if self._negatives is not None:
            return estimated_loss(
                *(self, self._negatives, h_Td, target_T, num_targets),
                own=own,
                generator=generator,
                transform=transform,
            )
        rows = vectors = self.weight.detach()
        gradient = self._held.dense_gradient
        assert gradient is not None
        if transform is not None:
            rows.requires_grad_()
            vectors = transform(self.shards.own, rows)
            gradient = torch.zeros_like(rows)
        with torch.no_grad():
            found = sharded_cross_entropy(
                *(self.shards, h_Td, vectors.detach().float(), target_T, gradient),
                share=1.0 / num_targets,
                blocked=self._blocked,
                own=None if own is None else replace(own, bonus_TN=own.bonus_TN.detach()),
                tile_bytes=self._tile_bytes,
            )
        scored = None if transform is None else Scored(None, rows, vectors, gradient)
        return CatalogueLoss(found.loss, found.dh_Td, found.dbonus_TN, scored)

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """See `Table`."""
        place_p, grad_pd = self._held.gradient()
        own = float(torch.linalg.vector_norm(grad_pd))
        norm = math.sqrt(self.shards.total(own * own, grad_pd.device))
        self._held.update(place_p, grad_pd, lr=lr, norm=norm)
        return norm

    def state(self) -> dict[str, Tensor]:
        """See `Table`."""
        return self._held.state()

    def start_from(self, saved: SavedRows) -> None:
        """See `Table`; reads this worker's rows alone."""
        self._held.start_from(saved)

    def load_state(self, saved: SavedRows, steps: int) -> None:
        """See `Table`; reads this worker's rows alone."""
        self._held.load_state(saved, steps)
