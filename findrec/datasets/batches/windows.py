"""Windows of training histories as examples, the default of sequence models."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from findrec.config import RunConfig
from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.padding import padded_batch
from findrec.datasets.batches.plan import (
    EpochPlan,
    Windows,
    cut_prefixes,
    cut_windows,
    microbatch_seed,
    plan_epoch,
)
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.histories import Histories
from findrec.datasets.folder.splits import Int64Array

_NAMED_USERS = 3


def build_windows(config: RunConfig, folder: DataFolder) -> Windows:
    """Cut the training histories into windows as `training.objective` requires."""
    if config.training.objective == "all":
        return cut_windows(folder, config.data.max_length, config.data.overlap)
    return cut_prefixes(folder, config.data.max_length)


class HistoryExamples:
    """Base of sources whose examples have windows of training histories."""

    def __init__(self, config: RunConfig, folder: DataFolder, windows: Windows | None = None) -> None:
        """`windows` are by default those of the configuration."""
        self._config, self._folder = config, folder
        self.windows = build_windows(config, folder) if windows is None else windows
        self.num_examples = len(self.windows)

    @property
    def num_targets(self) -> int:
        """See `ExampleSource`."""
        return int(self.windows.targets.sum())

    def plan(self, epoch: int) -> EpochPlan:
        """See `ExampleSource`: windows of similar length share a microbatch."""
        training = self._config.training
        return plan_epoch(
            self.windows,
            seed=training.seed,
            epoch=epoch,
            microbatches=training.microbatches,
            tokens=training.num_tokens,
        )

    def _read_batches(self, epoch: int, parts: Sequence[Int64Array]) -> list[Batch]:
        """Batches of windows; with `data.shuffle_ties` the order of ties depends on the epoch."""
        tie_seed = None
        if self._config.data.shuffle_ties:
            tie_seed = microbatch_seed(self._config.training.seed, epoch, -1)
        return train_batches(self._folder, self.windows, parts, tie_seed=tie_seed)

    def _dummy_batch(self, chosen: Int64Array) -> Batch:
        """A batch of the same sizes, with as many distinct items as possible."""
        events = self.windows.inputs[chosen] + 1
        offset = np.concatenate([[0], np.cumsum(events)])
        item = np.arange(offset[-1]) % self._folder.num_items + 1
        histories = Histories(item, np.zeros_like(item), offset)
        skip = self.windows.first_target[chosen] - 1 - self.windows.start[chosen]
        return padded_batch(histories, self.windows.user[chosen], self._folder.num_items, skip=skip)

    def prefetch(self, chosen: Int64Array) -> None:
        """See `ExampleSource`."""
        if self._folder.remote:
            self._folder.read_ahead(self.windows.user[chosen])

    def describe(self, chosen: Int64Array) -> str:
        """See `ExampleSource`: the raw ids of the users."""
        return describe_users(self._folder, self.windows.user[chosen])

    def size(self, chosen: Int64Array) -> int:
        """See `ExampleSource`: padded positions."""
        return len(chosen) * int(self.windows.inputs[chosen].max())

    def num_shards(self, chosen: Int64Array) -> int:
        """See `ExampleSource`."""
        return self._folder.num_shards_of(self.windows.user[chosen])

    def identity(self) -> list[object]:
        """See `ExampleSource`."""
        data = self._config.data
        objective = self._config.training.objective
        return [data.max_length, data.overlap, data.shuffle_ties, objective, len(self.windows)]


class WindowExamples(HistoryExamples):
    """Each training event except a user's first is a target once an epoch (`ExampleSource` of `Batch`)."""

    def read(self, epoch: int, parts: Sequence[Int64Array]) -> list[Batch]:
        """See `ExampleSource`."""
        return self._read_batches(epoch, parts)

    def dummy_examples(self, chosen: Int64Array) -> Batch:
        """See `ExampleSource`."""
        return self._dummy_batch(chosen)


def describe_users(folder: DataFolder, users: Int64Array) -> str:
    """Raw ids of the first of these user rows, and the number of the others."""
    rows = list(dict.fromkeys(users.tolist()))
    names = ", ".join(repr(folder.user_ids[row]) for row in rows[:_NAMED_USERS])
    more = f" and {len(rows) - _NAMED_USERS} more" if len(rows) > _NAMED_USERS else ""
    return f"users {names}{more}"


def train_batch(
    folder: DataFolder, windows: Windows, chosen: Int64Array, *, tie_seed: int | None = None
) -> Batch:
    """The batch of the windows `chosen`.

    Every event of `[first_target, stop)` is a target at the position of the event before it. With `tie_seed`,
    events of one timestamp are shuffled by this seed.
    """
    return train_batches(folder, windows, [chosen], tie_seed=tie_seed)[0]


def train_batches(
    folder: DataFolder, windows: Windows, parts: Sequence[Int64Array], *, tie_seed: int | None = None
) -> list[Batch]:
    """The batch of each of `parts`, read together; see `train_batch`."""
    chosen = np.concatenate(parts)
    user, start, stop = windows.user[chosen], windows.start[chosen], windows.stop[chosen]
    events = folder.histories(user, start, stop, tie_seed=tie_seed)  # the last event is only a target
    skip = windows.first_target[chosen] - 1 - start
    batches, begin = [], 0
    for end in itertools.accumulate(len(part) for part in parts):
        rows = slice(begin, end)
        part = events.rows(begin, end)
        batches.append(padded_batch(part, user[rows], folder.num_items, skip=skip[rows]))
        begin = end
    return batches
