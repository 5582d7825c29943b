"""The replicated embedding table: its rows, catalogue loss and optimizer.

Tables are outside every `nn.Module` and outside DeepSpeed, which would broadcast a table, gather all of it
under ZeRO-3 or refuse its sparse gradients. A step is `lookup` (a leaf) -> tower -> `catalogue_loss` ->
backward through the tower -> `push` -> `step`. Every worker holds all rows and makes the same step with the
gradients summed over workers, so replicas stay equal bit for bit. The alternative is
findrec/tables/sharded_table.py.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from findrec.ops.losses.linear_cross_entropy import RepeatBonus, linear_cross_entropy
from findrec.tables.base import CatalogueLoss, Transform
from findrec.tables.collectives import COLLECTIVES
from findrec.tables.exchange import Shards
from findrec.tables.local_table import LocalTable
from findrec.tables.table_spec import TableSpec


class ItemTable(LocalTable):
    """A `Table` with all rows on this worker."""

    sharded = False

    @property
    def first_row(self) -> int:
        """See `Table`."""
        return 0

    def __init__(self, spec: TableSpec) -> None:
        """Initialise the rows from the seed of `spec`."""
        super().__init__(spec, range(spec.num_rows))
        classes = spec.classes()
        self._classes = None if classes is None else classes.to(spec.device)

    def lookup(self, ids_U: Tensor) -> Tensor:
        """See `Table`."""
        rows: Tensor = self.weight[ids_U]
        return rows.requires_grad_()

    def push(self, ids_U: Tensor | None, grad_Ud: Tensor) -> None:
        """See `Table`."""
        self._local.add(ids_U, grad_Ud)

    def _exact_loss(
        self,
        h_Td: Tensor,
        target_T: Tensor,
        num_targets: int,
        repeat: RepeatBonus | None,
        transform: Transform | None,
    ) -> CatalogueLoss:
        def loss(h: Tensor, vectors: Tensor, repeat: RepeatBonus | None) -> Tensor:
            total = linear_cross_entropy(
                h, vectors, target_T, repeat=repeat, allowed_V=self._classes, tile_bytes=self._tile_bytes
            )
            return total / num_targets

        rows = self.weight.detach().requires_grad_()
        return self._differentiate(loss, h_Td, rows, None, repeat, transform)

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """See `Table`."""
        index_p, grad_pd = self._local.gradient()
        shards = Shards(len(self.weight))
        if index_p is None:
            with COLLECTIVES.call(f"sum of the gradients of table {self.name!r}"):
                shards.all_reduce(grad_pd, dist.ReduceOp.SUM)
        elif shards.world > 1:
            with COLLECTIVES.call(f"gathering of the gradients of table {self.name!r}"):
                (lengths,) = shards.lengths(len(index_p), device=grad_pd.device)
                index_A = shards.gather_uneven(index_p, lengths)
                grad_Ad = shards.gather_uneven(grad_pd, lengths)
            self._local.clear()
            self._local.add(index_A, grad_Ad)
            index_p, grad_pd = self._local.gradient()
        norm = float(torch.linalg.vector_norm(grad_pd))
        self._local.update(index_p, grad_pd, lr=lr, norm=norm)
        return norm
