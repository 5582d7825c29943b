"""The specification of a table, from which replicated and sharded tables are built."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from findrec.config import LossConfig, OptimConfig
from findrec.tables.base import ITEMS
from findrec.tables.initial_rows import initial_rows
from findrec.tables.local_rows import LocalRows
from findrec.tables.negatives import Negatives


@dataclass(frozen=True)
class TableSpec:
    """The size of a table (`num_items` rows of width `dim`, plus the padding row) and how it is trained.

    `train_count` `[V + 1]` is the popularity used to draw negatives (sampled loss). With `only_trained` the
    loss is over the items with a positive count, and the rows of all others are zero.
    """

    num_items: int
    dim: int
    seed: int
    loss: LossConfig
    optim: OptimConfig
    train_count: Tensor | None = None
    only_trained: bool = False
    name: str = ITEMS
    device: torch.device | str = "cpu"

    @property
    def num_rows(self) -> int:
        """V + 1."""
        return self.num_items + 1

    @property
    def lazy(self) -> bool:
        """Whether a step updates only the rows that were looked up in it (findrec/tables/local_rows.py)."""
        return self.loss.kind != "exact"

    @property
    def _row_seed(self) -> int:
        """A different seed for each table of a run."""
        if self.name == ITEMS:
            return self.seed
        digest = hashlib.blake2b(f"{self.seed}/{self.name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1

    def classes(self) -> Tensor | None:
        """The classes of the loss as bool `[V + 1]` (entry 0 is ignored); None: all items."""
        if not self.only_trained:
            return None
        if self.train_count is None:
            raise ValueError("only_trained needs train_count")
        return self.train_count > 0

    def negatives(self) -> Negatives | None:
        """The sampler of negatives; None for the exact loss."""
        if self.loss.kind == "exact" or (self.name != ITEMS and self.train_count is None):
            return None  # a table without a catalogue loss
        return Negatives(
            self.loss,
            self.num_items,
            train_count=self.train_count,
            classes=self.classes(),
            device=self.device,
        )

    def local_rows(self, part: range) -> LocalRows:
        """Initialise the rows in the range `part`."""
        weight = initial_rows(self.num_rows, self.dim, seed=self._row_seed, part=part)
        classes = self.classes()
        if classes is not None:
            weight[~classes[part.start : part.stop]] = 0.0
        return LocalRows(
            weight.to(self.device), first=part.start, num_rows=self.num_rows, lazy=self.lazy, optim=self.optim
        )
