"""The common part of replicated and sharded tables: local rows, sampled losses and checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from findrec.ops._tiles import tile_bytes
from findrec.ops.losses.linear_cross_entropy import RepeatBonus
from findrec.tables.base import CatalogueLoss, SavedRows, Scored, Table, Transform
from findrec.tables.table_spec import TableSpec


class LocalTable(Table):
    """A `Table` that holds a range of the rows of `spec`."""

    def __init__(self, spec: TableSpec, part: range) -> None:
        self.name = spec.name
        self._local = spec.local_rows(part)
        self.weight = self._local.weight
        self._tile_bytes = tile_bytes(spec.device, spec.loss.tile_mib << 20)
        self._negatives = spec.negatives()

    def catalogue_loss(
        self,
        h_Td: Tensor,
        target_T: Tensor,
        num_targets: int,
        *,
        repeat: RepeatBonus | None = None,
        generator: torch.Generator | None = None,
        transform: Transform | None = None,
    ) -> CatalogueLoss:
        """See `Table`."""
        negatives = self._negatives
        if negatives is None:
            return self._exact_loss(h_Td, target_T, num_targets, repeat, transform)
        drawn = negatives.draw(generator)
        candidates = [] if repeat is None else [repeat.ids_BN.flatten()]
        ids = torch.unique(torch.cat([drawn[0], target_T, *candidates]))

        def loss(h: Tensor, vectors: Tensor, repeat: RepeatBonus | None) -> Tensor:
            return negatives.loss(h, vectors, ids, target_T, drawn, repeat) / num_targets

        return self._differentiate(loss, h_Td, self.lookup(ids), ids, repeat, transform)

    @abstractmethod
    def _exact_loss(
        self,
        h_Td: Tensor,
        target_T: Tensor,
        num_targets: int,
        repeat: RepeatBonus | None,
        transform: Transform | None,
    ) -> CatalogueLoss:
        """`catalogue_loss` over all items."""

    def _differentiate(
        self,
        loss: Callable[[Tensor, Tensor, RepeatBonus | None], Tensor],
        h_Td: Tensor,
        rows_nd: Tensor,
        ids_n: Tensor | None,
        repeat: RepeatBonus | None,
        transform: Transform | None,
    ) -> CatalogueLoss:
        """`loss(h, vectors, repeat)` with gradients; `rows_nd` is a leaf, the rows of `ids_n` or all."""
        h = h_Td.detach().requires_grad_()
        if repeat is not None:
            repeat = replace(repeat, bonus_TN=repeat.bonus_TN.detach().requires_grad_())
        vectors = rows_nd
        if transform is not None:
            vectors = transform(range(len(rows_nd)) if ids_n is None else ids_n, rows_nd)
        leaf = vectors.detach().requires_grad_()
        value = loss(h, leaf, repeat)
        value.backward()  # type: ignore[no-untyped-call]
        assert h.grad is not None
        assert leaf.grad is not None
        scored = None
        if transform is None:
            self.push(ids_n, leaf.grad)
        else:
            scored = Scored(ids_n, rows_nd, vectors, leaf.grad)
        return CatalogueLoss(value.detach(), h.grad, None if repeat is None else repeat.bonus_TN.grad, scored)

    def state(self) -> dict[str, Tensor]:
        """See `Table`."""
        return self._local.state()

    def load_weights(self, saved: SavedRows) -> None:
        """See `Table`; reads only the local rows."""
        self._local.load_weights(saved)

    def load_state(self, saved: SavedRows, steps: int) -> None:
        """See `Table`; reads only the local rows."""
        self._local.load_state(saved, steps)
