"""User-item edges with sampled negatives as examples, for models of users and items without an order.

Shape letters: n edges, N negatives per edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from findrec.config import RunConfig
from findrec.datasets.batches.examples import EqualSizeExamples
from findrec.datasets.batches.training_pairs import TrainingPairs, negatives_rng
from findrec.datasets.batches.windows import describe_users
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.splits import Int64Array
from findrec.devices import copy_to


@dataclass(frozen=True)
class Edges:
    """Edges of one microbatch; `user` indexes the table `users` (user row + 1, 0 is padding)."""

    user: Tensor  # [n] int64, 1-based
    item: Tensor  # [n] int64, 1-based
    negative: Tensor  # [n, N] int64, items that the user has no training event with

    def to(self, device: torch.device | str) -> Edges:
        """The same on another device."""
        return Edges(*(copy_to(x, device) for x in (self.user, self.item, self.negative)))


class EdgeExamples(EqualSizeExamples):
    """Each distinct user-item pair of the training events is an example once an epoch (`ExampleSource`).

    Negatives are drawn as described in `TrainingPairs`. Pairs of a user who has a training event with every
    trained item are omitted, as they have no negatives.
    """

    def __init__(self, config: RunConfig, folder: DataFolder, *, negatives: int = 1) -> None:
        """`negatives` is the number of negative items per edge."""
        self._pairs = TrainingPairs.read(folder)
        self._edges = np.flatnonzero(self._pairs.has_negatives[self._pairs.user])
        self._negatives = negatives
        super().__init__(config, folder, len(self._edges))

    def read(self, epoch: int, parts: Sequence[Int64Array]) -> list[Edges]:
        """See `ExampleSource`."""
        return [self._examples(epoch, chosen) for chosen in parts]

    def _examples(self, epoch: int, chosen: Int64Array) -> Edges:
        edge = self._edges[chosen]
        user, item = self._pairs.user[edge], self._pairs.item[edge]
        rng = negatives_rng(self._training.seed, epoch, chosen)
        negative = self._pairs.draw(rng, user, self._negatives)
        return Edges(torch.from_numpy(user + 1), torch.from_numpy(item), torch.from_numpy(negative))

    def describe(self, chosen: Int64Array) -> str:
        """See `ExampleSource`: the raw ids of the users."""
        return describe_users(self._folder, self._pairs.user[self._edges[chosen]])

    def dummy_examples(self, chosen: Int64Array) -> Edges:
        """See `ExampleSource`: real examples, as the pairs are in memory."""
        return self._examples(0, chosen)

    def num_shards(self, chosen: Int64Array) -> int:
        """See `ExampleSource`: every worker reads all pairs."""
        return len(self._folder.manifest.shards)

    def identity(self) -> list[object]:
        """See `ExampleSource`."""
        return ["edges", self._negatives, self.num_examples]
