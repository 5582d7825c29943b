"""What every item table is made of, whichever rows of it a worker holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from findrec.config import LossConfig, OptimConfig
from findrec.tables.held_rows import HeldRows
from findrec.tables.initial import initial_rows
from findrec.tables.negatives import Negatives


@dataclass(frozen=True)
class TableSpec:
    """A table of `num_items` rows of width `dim` and the padding row, and how it is trained.

    `train_count` `[V + 1]` is the popularity that negatives are drawn by (sampled loss). With `only_trained`
    the loss runs over items of positive count, and the rows of all others are zero.
    """

    num_items: int
    dim: int
    seed: int
    loss: LossConfig
    optim: OptimConfig
    train_count: Tensor | None = None
    only_trained: bool = False
    device: torch.device | str = "cpu"

    @property
    def num_rows(self) -> int:
        """V + 1."""
        return self.num_items + 1

    @property
    def lazy(self) -> bool:
        """Whether a step touches the rows alone that were looked up in it (findrec/tables/held_rows.py)."""
        return self.loss.kind != "exact"

    def classes(self) -> Tensor | None:
        """`[V + 1]` bool, the items the loss runs over; None: all. Entry 0 says nothing."""
        if not self.only_trained:
            return None
        if self.train_count is None:
            raise ValueError("only_trained: which items are trained is told by train_count")
        return self.train_count > 0

    def negatives(self) -> Negatives | None:
        """What a loss by sampling draws from; None for the exact one."""
        if self.loss.kind == "exact":
            return None
        return Negatives(
            self.loss,
            self.num_items,
            train_count=self.train_count,
            classes=self.classes(),
            device=self.device,
        )

    def held_rows(self, part: range) -> HeldRows:
        """The rows `part`, as a function of the seed."""
        weight = initial_rows(self.num_rows, self.dim, seed=self.seed, part=part)
        classes = self.classes()
        if classes is not None:
            weight[~classes[part.start : part.stop]] = 0.0
        return HeldRows(
            weight.to(self.device), first=part.start, num_rows=self.num_rows, lazy=self.lazy, optim=self.optim
        )
