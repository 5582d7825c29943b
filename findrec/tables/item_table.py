"""The item table: its rows, catalogue loss and optimizer, outside every `nn.Module` and outside DeepSpeed.

DeepSpeed would broadcast a table, gather it whole under ZeRO-3 or refuse its sparse gradients. A step is
`lookup` (a leaf) -> tower -> `catalogue_loss` -> backward through the tower -> `push` -> `step`. This is the
replicated placement: every worker holds all rows, gradients are summed over workers, and every worker makes
the same step (findrec/tables/held_rows.py), so replicas stay equal bit for bit. The other placement is
findrec/tables/sharded_table.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from findrec.ops.linear_cross_entropy import OwnBonus, linear_cross_entropy
from findrec.tables.base import CatalogueLoss, SavedRows, Scored, Transform
from findrec.tables.exchange import Shards
from findrec.tables.negatives import estimated_loss
from findrec.tables.parts import TableSpec


class ItemTable:
    """All rows on this worker (`Table`)."""

    sharded = False
    first_row = 0

    def __init__(self, spec: TableSpec) -> None:
        """The rows that the spec's seed gives."""
        classes = spec.classes()
        self._classes = None if classes is None else classes.to(spec.device)
        self._held = spec.held_rows(range(spec.num_rows))
        self.weight = self._held.weight
        self._tile_bytes = spec.loss.tile_mib << 20
        self._negatives = spec.negatives()

    def lookup(self, ids_U: Tensor) -> Tensor:
        """See `Table`."""
        rows: Tensor = self.weight[ids_U]
        return rows.requires_grad_()

    def push(self, ids_U: Tensor | None, grad_Ud: Tensor) -> None:
        """See `Table`."""
        self._held.add(ids_U, grad_Ud)

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
        """See `Table`."""
        if self._negatives is not None:
            return estimated_loss(
                *(self, self._negatives, h_Td, target_T, num_targets),
                own=own,
                generator=generator,
                transform=transform,
            )
        h = h_Td.detach().requires_grad_()
        bonus = None
        if own is not None:
            bonus = own.bonus_TN.detach().requires_grad_()
            own = replace(own, bonus_TN=bonus)
        rows = vectors = self.weight.detach()
        if transform is not None:
            rows.requires_grad_()
            vectors = transform(range(len(rows)), rows)
        leaf = vectors.detach().requires_grad_()
        loss = linear_cross_entropy(
            h, leaf, target_T, own=own, allowed_V=self._classes, tile_bytes=self._tile_bytes
        )
        loss = loss / num_targets
        loss.backward()  # type: ignore[no-untyped-call]
        assert h.grad is not None
        assert leaf.grad is not None
        scored = None
        if transform is None:
            self.push(None, leaf.grad)
        else:
            scored = Scored(None, rows, vectors, leaf.grad)
        return CatalogueLoss(loss.detach(), h.grad, None if bonus is None else bonus.grad, scored)

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """See `Table`."""
        place_p, grad_pd = self._held.gradient()
        shards = Shards(len(self.weight))
        if place_p is None and shards.world > 1:
            dist.all_reduce(grad_pd)
        elif place_p is not None and shards.world > 1:
            (lengths,) = shards.lengths(len(place_p), device=grad_pd.device)
            places, grads = (shards.gather_uneven(x, lengths) for x in (place_p, grad_pd))
            self._held.clear()
            self._held.add(places, grads)
            place_p, grad_pd = self._held.gradient()
        norm = float(torch.linalg.vector_norm(grad_pd))
        self._held.update(place_p, grad_pd, lr=lr, norm=norm)
        return norm

    def state(self) -> dict[str, Tensor]:
        """See `Table`."""
        return self._held.state()

    def start_from(self, saved: SavedRows) -> None:
        """See `Table`."""
        self._held.start_from(saved)

    def load_state(self, saved: SavedRows, steps: int) -> None:
        """See `Table`."""
        self._held.load_state(saved, steps)
