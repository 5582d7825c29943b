"""What an item table looks like from the outside, whichever way its rows are placed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from findrec.ops.linear_cross_entropy import OwnBonus

# How rows become the vectors that are scored: `transform(ids, rows)`, ids as a tensor or as a range of them.
Transform = Callable[[Tensor | range, Tensor], Tensor]


@dataclass(frozen=True)
class Scored:
    """Vectors made of table rows by a `Transform`, and what the loss says about them."""

    ids: Tensor | None  # [n] distinct; None: all rows this worker holds
    rows: Tensor  # [n, d] leaf; after the backward pass its gradient goes to `push`
    vectors: Tensor  # [n, d]
    gradient: Tensor  # [n, d] of the loss in `vectors`


@dataclass(frozen=True)
class CatalogueLoss:
    """Loss of one microbatch and what flows back into the tower."""

    loss: Tensor  # [] sum of token losses divided by the step's global target count
    dh: Tensor  # [T, d]
    dbonus: Tensor | None  # [T, N], when a bonus was given
    scored: Scored | None  # when a transform was given


class SavedRows(Protocol):
    """A saved table: `weight`, `exp_avg` and `exp_avg_sq`, each `[num_rows, width]`."""

    @property
    def num_rows(self) -> int:
        """V + 1."""

    @property
    def width(self) -> int:
        """d."""

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows `first` to `end - 1`, `[end - first, d]`."""


class Table(Protocol):
    """Rows, catalogue loss and optimizer of `V` items; row 0 (padding) is zero and stays zero.

    Where several workers train, `lookup`, `catalogue_loss`, `push` of ids and `step` may be collectives:
    every worker calls them in the same order, the n-th call on one meets the n-th on the others.
    """

    sharded: bool  # workers hold different rows, and each saves its own
    weight: Tensor  # [n, d] the rows this worker holds

    @property
    def first_row(self) -> int:
        """Id of the first of them."""

    def lookup(self, ids_U: Tensor) -> Tensor:
        """Rows `[U, d]` of distinct ids as a leaf that collects a gradient; hand that to `push`."""

    def push(self, ids_U: Tensor | None, grad_Ud: Tensor) -> None:
        """Add the gradient of rows of distinct ids, or of all rows this worker holds (None)."""

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
        """Cross-entropy of a microbatch, over `num_targets` = all targets of the step on all workers.

        `h_Td` and `own.bonus_TN` are taken detached; their gradients are returned. The table's own
        gradient is added here, or, with a `transform`, returned on its way there (`Scored`).
        `generator` draws the sampled negatives (CPU).
        """

    def step(self, lr: float) -> float:
        """One AdamW step with what all workers pushed; returns the norm of that gradient before clipping."""

    def state(self) -> Mapping[str, Tensor]:
        """Weights and moments of the rows this worker holds, for a checkpoint."""

    def start_from(self, saved: SavedRows) -> None:
        """Take over the rows of the first items; later ones and the optimizer stay as new."""

    def load_state(self, saved: SavedRows, steps: int) -> None:
        """Take over weights and moments of a checkpoint; raises `ValueError` on another shape."""
