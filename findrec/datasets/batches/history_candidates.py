"""Histories with one candidate item and a label as examples, for models that score a given item.

Shape letters: n examples, L padded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from findrec.config import RunConfig
from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.plan import Windows, cut_prefixes
from findrec.datasets.batches.training_pairs import TrainingPairs, negatives_rng
from findrec.datasets.batches.windows import HistoryExamples
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.splits import Int64Array
from findrec.devices import copy_to


@dataclass(frozen=True)
class Candidates:
    """Examples of one microbatch: `label[i]` is the label of `candidate[i]` after row i of `history`."""

    history: Batch  # [n, L]; `position` is the last event of each row, `target` is empty
    candidate: Tensor  # [n] int64, 1-based item ids
    label: Tensor  # [n] float32, 1 if the candidate is the next event, else 0

    def to(self, device: torch.device | str) -> Candidates:
        """The same on another device."""
        return Candidates(
            self.history.to(device), copy_to(self.candidate, device), copy_to(self.label, device)
        )


class CandidateExamples(HistoryExamples):
    """Training events with their histories and sampled negatives, once an epoch (`ExampleSource`).

    Each training event except a user's first is a positive after the up to `data.max_length` events before
    it, and the same history has `negatives` other candidates, drawn as described in `TrainingPairs`. Events
    of a user who has a training event with every trained item are omitted, as they have no negatives. Example
    k belongs to event `k // (1 + negatives)`; it is the positive if `k % (1 + negatives)` is 0.
    """

    def __init__(self, config: RunConfig, folder: DataFolder, *, negatives: int = 1) -> None:
        """`negatives` is the number of negative items per positive."""
        self._negatives = negatives
        self._pairs = TrainingPairs.read(folder)
        prefixes = cut_prefixes(folder, config.data.max_length)
        kept = np.repeat(np.flatnonzero(self._pairs.has_negatives[prefixes.user]), 1 + negatives)
        windows = Windows(
            user=prefixes.user[kept],
            start=prefixes.start[kept],
            first_target=prefixes.first_target[kept],
            stop=prefixes.stop[kept],
        )
        super().__init__(config, folder, windows)

    def read(self, epoch: int, parts: Sequence[Int64Array]) -> list[Candidates]:
        """See `ExampleSource`."""
        batches = self._read_batches(epoch, parts)
        return [self._examples(epoch, chosen, batch) for chosen, batch in zip(parts, batches, strict=True)]

    def _examples(self, epoch: int, chosen: Int64Array, batch: Batch) -> Candidates:
        rng = negatives_rng(self._config.training.seed, epoch, chosen)
        negative = self._pairs.draw(rng, self.windows.user[chosen], 1)[:, 0]
        positive = torch.from_numpy(chosen % (1 + self._negatives) == 0)
        candidate = torch.where(positive, batch.target, torch.from_numpy(negative))
        return Candidates(replace(batch, target=batch.target[:0]), candidate, positive.float())

    def dummy_examples(self, chosen: Int64Array) -> Candidates:
        """See `ExampleSource`."""
        return self._examples(0, chosen, self._dummy_batch(chosen))

    def identity(self) -> list[object]:
        """See `ExampleSource`."""
        return ["candidates", self._negatives, *super().identity()]
