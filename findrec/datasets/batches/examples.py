"""The protocol of example sources, which define what a model is trained on, and their loader.

A source plans an epoch from the data and (seed, epoch) alone, and builds the examples of the plan. The
training loop uses examples only through this protocol. Sources in this folder: windows of histories
(`windows.py`), user-item edges with sampled negatives (`edges.py`), single items (`single_items.py`) and
histories with a candidate item and a label (`history_candidates.py`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from findrec.config import RunConfig
from findrec.datasets.batches.plan import EpochPlan, plan_examples, share
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.splits import Int64Array

PREFETCHED_STEPS = 2


class OnDevice(Protocol):
    """The examples of one microbatch."""

    def to(self, device: torch.device | str) -> Any:
        """The same on another device."""


E = TypeVar("E", bound=OnDevice)
E_co = TypeVar("E_co", bound=OnDevice, covariant=True)


class ExampleSource(Protocol[E_co]):
    """All examples of a training run, numbered 0, 1, ..."""

    @property
    def num_targets(self) -> int:
        """Number of targets of an epoch, in which the progress of training is counted."""

    def plan(self, epoch: int) -> EpochPlan:
        """Which examples make up each microbatch of each step, whatever the number of workers."""

    def read(self, epoch: int, parts: Sequence[Int64Array]) -> Sequence[E_co]:
        """The examples of each of `parts`, which are arrays of example numbers."""

    def prefetch(self, chosen: Int64Array) -> None:
        """Prefetch remote data of these examples, in this order."""

    def describe(self, chosen: Int64Array) -> str:
        """Describe the users or items of these examples for an error message."""

    @property
    def num_examples(self) -> int:
        """Number of examples, which are numbered 0, 1, ..."""

    def size(self, chosen: Int64Array) -> int:
        """Size of a microbatch of these examples that determines its memory, such as its padded positions."""

    def dummy_examples(self, chosen: Int64Array) -> E_co:
        """Artificial examples of the same sizes, to measure memory without reading data."""

    def num_shards(self, chosen: Int64Array) -> int:
        """Number of shards from which these examples are read."""

    def identity(self) -> Sequence[object]:
        """Settings that determine the plan, besides the data, the seed and the sizes of steps.

        Training is resumed only if their `repr` is unchanged.
        """


class EqualSizeExamples:
    """Base of sources whose examples have equal size and one target each.

    An example counts as one position of `training.tokens`.
    """

    def __init__(self, config: RunConfig, folder: DataFolder, num_examples: int) -> None:
        self._training, self._folder, self.num_examples = config.training, folder, num_examples

    @property
    def num_targets(self) -> int:
        """See `ExampleSource`."""
        return self.num_examples

    def plan(self, epoch: int) -> EpochPlan:
        """See `ExampleSource`."""
        training = self._training
        return plan_examples(
            self.num_examples,
            seed=training.seed,
            epoch=epoch,
            microbatches=training.microbatches,
            size=training.num_tokens,
        )

    def prefetch(self, chosen: Int64Array) -> None:
        """See `ExampleSource`: the examples are in memory."""

    def size(self, chosen: Int64Array) -> int:
        """See `ExampleSource`: the number of examples."""
        return len(chosen)


Step = tuple[int, list[tuple[int, E]]]


class ExampleLoader(Generic[E]):
    """Iterates over `(step, [(microbatch, examples), ...])` of one rank, prefetched by a thread.

    `first_step` resumes inside an epoch. Use it as a context manager, or call `close`, if the iteration may
    end early. An exception of the thread is raised in the caller.
    """

    def __init__(
        self,
        source: ExampleSource[E],
        plan: EpochPlan,
        *,
        epoch: int = 0,
        rank: int,
        world: int,
        first_step: int = 0,
        prepare: Callable[[E], Any] | None = None,
    ) -> None:
        """`prepare` is applied to each microbatch's examples in the thread."""
        self._source, self._plan, self._epoch = source, plan, epoch
        self._rank, self._world, self._first_step = rank, world, first_step
        self._queue: queue.Queue[Step[E] | BaseException | None] = queue.Queue(PREFETCHED_STEPS)
        self._prepare = prepare
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def _put(self, value: Step[E] | BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(value, timeout=0.1)
            except queue.Full:
                continue

    def _own(self, step: list[Int64Array]) -> list[tuple[int, Int64Array]]:
        return share(step, self._rank, self._world)

    def _work(self) -> None:
        try:
            steps = self._plan.steps[self._first_step :]
            chosen = [part for step in steps for _, part in self._own(step)]
            if chosen:
                self._source.prefetch(np.concatenate(chosen))
            for index, step in enumerate(steps, start=self._first_step):
                own = self._own(step)
                examples = self._source.read(self._epoch, [part for _, part in own])
                if self._prepare is not None:
                    examples = [self._prepare(each) for each in examples]
                if self._stopped.is_set():
                    return
                microbatches = [m for m, _ in own]
                self._put((index, list(zip(microbatches, examples, strict=True))))
            self._put(None)
        except BaseException as error:
            self._put(error)

    def __iter__(self) -> Iterator[Step[E]]:
        if self._thread is not None:
            raise RuntimeError("an ExampleLoader is iterated once; make a new one for each epoch")
        self._thread = threading.Thread(target=self._work, name="findrec-loader", daemon=True)
        self._thread.start()
        try:
            while (value := self._queue.get()) is not None:
                if isinstance(value, BaseException):
                    raise value
                yield value
        finally:
            self.close()

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> ExampleLoader[E]:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
