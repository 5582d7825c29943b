"""Gives the loss of one microbatch access to the tables of a run.

A model reads rows and computes its loss from them. The view records which rows were read, and
`push_gradients` passes their gradients to the tables after the backward pass. So a model does not depend on
how rows are distributed over workers.

Shape letters: n rows, d width, T target positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.ops.losses.linear_cross_entropy import RepeatBonus
from findrec.tables.base import CatalogueLoss, Table, Transform


class TableView:
    """A table in one microbatch."""

    def __init__(self, table: Table, num_targets: int, seed: int) -> None:
        """`num_targets` counts the targets of the step on all workers; `seed` is that of the negatives."""
        self._table, self._num_targets, self._seed = table, num_targets, seed
        self._read: list[tuple[Tensor | None, Tensor]] = []  # ids and the leaves read

    def rows(self, ids_n: Tensor) -> Tensor:
        """The rows `[n, d]` of distinct ids, whose gradient is passed to the table's optimizer."""
        rows_nd = self._table.lookup(ids_n)
        self._read.append((ids_n, rows_nd))
        return rows_nd

    def embed(self, ids: Tensor) -> Tensor:
        """The rows `[..., d]` of `ids` `[...]`, which need not be distinct."""
        distinct, index = torch.unique(ids, return_inverse=True)
        return F.embedding(index, self.rows(distinct))

    def catalogue_loss(
        self,
        h_Td: Tensor,
        target_T: Tensor,
        *,
        repeat: RepeatBonus | None = None,
        transform: Transform | None = None,
    ) -> CatalogueLoss:
        """The loss of `training.loss` over the catalogue, with its gradients; see `Table.catalogue_loss`.

        `attach_gradients` turns the result into a loss that autograd can differentiate.
        """
        loss = self._table.catalogue_loss(
            h_Td,
            target_T,
            self._num_targets,
            repeat=repeat,
            generator=torch.Generator().manual_seed(self._seed),
            transform=transform,
        )
        if loss.scored is not None:
            self._read.append((loss.scored.ids, loss.scored.rows))
        return loss

    def push_gradients(self, factor: float) -> None:
        """Pass the gradients of all rows read, divided by `factor`, to the table.

        A collective call for a sharded table.
        """
        if not self._read:
            return
        leaves = [rows for _, rows in self._read]
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        gradients = list(torch._foreach_div(gradients, factor))
        for (ids, _), gradient in zip(self._read, gradients, strict=True):
            self._table.push(ids, gradient)


class Tables(Mapping[str, TableView]):
    """The tables of a run by name in one microbatch; `items` is the item table."""

    def __init__(self, tables: Mapping[str, Table], num_targets: int, seed: int) -> None:
        """See `TableView`."""
        self._views = {name: TableView(table, num_targets, seed) for name, table in tables.items()}

    def __getitem__(self, name: str) -> TableView:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def push_gradients(self, factor: float) -> None:
        """See `TableView`; all workers process the tables in the same order."""
        for view in self._views.values():
            view.push_gradients(factor)


def attach_gradients(value: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A loss `value` `[]` whose gradients in `tensors` are already known: `gradients`, of the same shapes."""
    loss: Tensor = _Attached.apply(value, len(tensors), *tensors, *gradients)  # type: ignore[no-untyped-call]
    return loss


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, num: int, *given: Tensor) -> Tensor:
        ctx.save_for_backward(*given[num:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return (None, None, *torch._foreach_mul(gradients, grads[0]), *(None for _ in gradients))
