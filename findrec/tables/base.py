"""The interface of embedding tables, which is the same for replicated and sharded rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from findrec.ops.losses.linear_cross_entropy import RepeatBonus

ITEMS = "items"  # name of the item table
USERS = "users"  # name of the table of users, of models that have one

# `transform(ids, rows)` returns the vectors that items are scored by; `ids` is a tensor or a range.
Transform = Callable[[Tensor | range, Tensor], Tensor]


@dataclass(frozen=True)
class Scored:
    """Vectors computed from table rows by a `Transform`, with the gradient of the loss in them."""

    ids: Tensor | None  # [n] distinct; None: all local rows
    rows: Tensor  # [n, d] leaf; its gradient is passed to `push` after the backward pass
    vectors: Tensor  # [n, d]
    gradient: Tensor  # [n, d] of the loss in `vectors`


@dataclass(frozen=True)
class CatalogueLoss:
    """Loss of one microbatch with its gradients in the inputs."""

    loss: Tensor  # [] sum of token losses divided by the step's global target count
    dh: Tensor  # [T, d]
    dbonus: Tensor | None  # [T, N], if a bonus was given
    scored: Scored | None  # if a transform was given


class SavedRows(Protocol):
    """A saved table: `weight`, `exp_avg` and `exp_avg_sq`, each `[num_rows, width]`."""

    @property
    def num_rows(self) -> int:
        """V + 1."""

    @property
    def width(self) -> int:
        """The width d of a row."""

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows `first` to `end - 1`, `[end - first, d]`."""


class Table(Protocol):
    """Rows, catalogue loss and optimizer of `V` items; row 0 (padding) is zero and stays zero.

    With several workers, `lookup`, `catalogue_loss`, `push` with ids and `step` may be collective calls,
    which all workers must make in the same order.
    """

    sharded: bool  # whether workers hold different rows, which each of them saves
    weight: Tensor  # [n, d] the local rows

    @property
    def first_row(self) -> int:
        """The id of the first local row."""

    def lookup(self, ids_U: Tensor) -> Tensor:
        """Rows `[U, d]` of distinct ids, as a leaf; pass its gradient to `push`."""

    def push(self, ids_U: Tensor | None, grad_Ud: Tensor) -> None:
        """Accumulate the gradient of the rows of distinct ids, or of all local rows (None)."""

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
        """Summed cross-entropy of a microbatch, divided by `num_targets`, with its gradients.

        The gradient in the table's rows is accumulated, or returned in `Scored` if there is a `transform`.

        Args:
            h_Td: user vectors; detached, their gradient is returned.
            target_T: target ids.
            num_targets: number of targets of the step on all workers.
            repeat: bonuses added to scores; detached, the gradient of `bonus_TN` is returned.
            generator: draws the sampled negatives (CPU).
            transform: computes the vectors that items are scored by from their rows.
        """

    def step(self, lr: float) -> float:
        """One AdamW step with the gradient summed over workers; returns its norm before clipping."""

    def state(self) -> Mapping[str, Tensor]:
        """Weights and optimizer moments of the local rows, for a checkpoint."""

    def load_weights(self, saved: SavedRows) -> None:
        """Load the weights of the first items; rows of later items and the optimizer are unchanged."""

    def load_state(self, saved: SavedRows, steps: int) -> None:
        """Load the weights and moments of a checkpoint; raises `ValueError` if shapes differ."""
