"""The embedding table sharded by rows over the workers, for catalogues too large for one worker.

A worker holds a range of rows (`Shards`) with their gradient and optimizer moments. Rows and their gradients
are exchanged by all-to-all. The exact loss is `sharded_cross_entropy`, sampled losses look up rows, and the
optimizer is that of the replicated table, so results differ from it only by rounding.

TorchRec is not used: its `fbgemm-gpu` updates rows inside the backward pass, which allows neither clipping by
the gradient norm over all workers nor an exact loss that touches every row; and on a CPU it needs a separate
wheel for each torch version.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from findrec.ops.losses.linear_cross_entropy import RepeatBonus
from findrec.tables.base import CatalogueLoss, Scored, Transform
from findrec.tables.collectives import COLLECTIVES
from findrec.tables.exchange import Route, Shards
from findrec.tables.local_table import LocalTable
from findrec.tables.sharded_loss import sharded_cross_entropy
from findrec.tables.table_spec import TableSpec


class ShardedItemTable(LocalTable):
    """A `Table` with the rows `shards.local` on this worker.

    `lookup`, `push` with ids, the loss and `step` are collective calls. The exact loss scores the
    microbatches of all workers against the same vectors, so a `transform` must not draw random numbers.
    """

    sharded = True

    def __init__(self, spec: TableSpec, group: dist.ProcessGroup | None = None) -> None:
        """Initialise the local rows of `spec`, equal to those of `ItemTable`; `group` None: all workers.

        Raises `ValueError` if there are more workers than rows.
        """
        self.shards = Shards(spec.num_rows, group)
        if self.shards.world > spec.num_rows:
            raise ValueError(
                f"item table: {spec.num_rows} rows (padding included) cannot be split over "
                f"{self.shards.world} workers; set training.table=replicated"
            )
        part = self.shards.local
        super().__init__(spec, part)
        # Of ids that are still in use: their gradients, pushed with the same tensor, go the same way.
        self._routes: MutableMapping[Tensor, Route] = WeakIdKeyDictionary()
        classes = spec.classes()
        allowed = torch.ones(len(part), dtype=torch.bool)
        if classes is not None:
            allowed = classes[part.start : part.stop].clone()
        if part.start == 0:
            allowed[0] = False
        self._blocked = (~allowed).nonzero()[:, 0].to(spec.device)

    @property
    def first_row(self) -> int:
        """See `Table`."""
        return self.shards.local.start

    def lookup(self, ids_U: Tensor) -> Tensor:
        """See `Table`."""
        assert len(self.weight) == len(self.shards.local), "the table was created before the process group"
        with COLLECTIVES.call(f"lookup in table {self.name!r}"):
            route = self._routes[ids_U] = Route(self.shards, ids_U)
            return route.to_requesters(self.weight[route.index_R]).requires_grad_()

    def push(self, ids_U: Tensor | None, grad_Ud: Tensor) -> None:
        """See `Table`; a collective call only with ids."""
        if ids_U is None:
            self._local.add(None, grad_Ud)
            return
        with COLLECTIVES.call(f"gradients of the rows of table {self.name!r}"):
            route = self._routes.get(ids_U) or Route(self.shards, ids_U)
            self._local.add(route.index_R, route.to_owners(grad_Ud))

    def _exact_loss(
        self,
        h_Td: Tensor,
        target_T: Tensor,
        num_targets: int,
        repeat: RepeatBonus | None,
        transform: Transform | None,
    ) -> CatalogueLoss:
        """See `LocalTable`; `Scored` has the gradient of the local rows from the tokens of all workers."""
        rows = vectors = self.weight.detach()
        gradient = self._local.dense_gradient
        assert gradient is not None
        if transform is not None:
            rows.requires_grad_()
            vectors = transform(self.shards.local, rows)
            gradient = torch.zeros_like(vectors)  # may have another width than rows
        with torch.no_grad(), COLLECTIVES.call(f"loss over table {self.name!r}"):
            result = sharded_cross_entropy(
                self.shards,
                h_Td,
                vectors.detach().float(),
                target_T,
                gradient,
                share=1.0 / num_targets,
                blocked=self._blocked,
                repeat=None if repeat is None else replace(repeat, bonus_TN=repeat.bonus_TN.detach()),
                tile_bytes=self._tile_bytes,
            )
        scored = None if transform is None else Scored(None, rows, vectors, gradient)
        return CatalogueLoss(result.loss, result.dh_Td, result.dbonus_TN, scored)

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """See `Table`."""
        index_p, grad_pd = self._local.gradient()
        norm = math.sqrt(self.shards.total(torch.linalg.vector_norm(grad_pd).double().square()))
        self._local.update(index_p, grad_pd, lr=lr, norm=norm)
        return norm
