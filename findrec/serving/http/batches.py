"""Collects the calls of concurrent requests into batches, which one thread works on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

from findrec.errors import FindRecError

Task = TypeVar("Task")
Answer = TypeVar("Answer")


class BusyError(Exception):
    """Too many tasks are waiting; the caller should come again later."""


class Batcher(Generic[Task, Answer]):
    """Passes tasks to `work` in batches, in the order in which they came.

    A batch begins when a task waits and the thread is free. It is closed when it has `most` tasks or when its
    first task has waited for `wait_s`, so that a single caller is not delayed by more than that.

    Args:
        work: called in a thread of its own with 1 to `most` tasks; returns an answer or an error for each.
        most: the largest number of tasks of a batch.
        wait_s: how long a batch waits for more tasks, seconds.
        waiting: the largest number of waiting tasks of several callers; more are refused with `BusyError`.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Task]], Sequence[Answer | FindRecError]],
        *,
        most: int,
        wait_s: float,
        waiting: int,
    ) -> None:
        self._work, self._most, self._wait_s, self._waiting = work, most, wait_s, waiting
        self._queue: list[tuple[Task, asyncio.Future[Answer], float]] = []
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._closing = False
        self._thread = ThreadPoolExecutor(1)
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work; called in the event loop."""
        self._loop = asyncio.create_task(self._run())

    @property
    def num_waiting(self) -> int:
        """Tasks that no batch has taken yet."""
        return len(self._queue)

    async def submit(self, tasks: Sequence[Task]) -> list[Answer]:
        """The answers to some tasks, which may be worked on in several batches.

        Raises `BusyError` if the tasks do not fit among the waiting ones, and the first error of a task.
        Where nothing waits, any number of tasks is accepted: it would not fit later either.
        """
        if self._closing or (self._queue and len(self._queue) + len(tasks) > self._waiting):
            raise BusyError
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Answer]] = [loop.create_future() for _ in tasks]
        self._queue += [(task, future, loop.time()) for task, future in zip(tasks, futures, strict=True)]
        self._arrived.set()
        if len(self._queue) >= self._most:
            self._full.set()
        return await asyncio.gather(*futures)

    async def close(self) -> None:
        """Finish all waiting tasks, then stop."""
        self._closing = True
        self._arrived.set()
        self._full.set()
        if self._loop is not None:
            await self._loop
        self._thread.shutdown()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            if self._queue and not self._closing:
                left_s = self._queue[0][2] + self._wait_s - loop.time()
                if len(self._queue) < self._most and left_s > 0:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._full.wait(), left_s)
            batch, self._queue = self._queue[: self._most], self._queue[self._most :]
            if not self._closing:
                if len(self._queue) < self._most:
                    self._full.clear()
                if not self._queue:
                    self._arrived.clear()
            # Nobody waits any more for the tasks of clients that went away.
            batch = [(task, future, since) for task, future, since in batch if not future.done()]
            if batch:
                await self._answer(batch)
            if self._closing and not self._queue:
                return

    async def _answer(self, batch: Sequence[tuple[Task, asyncio.Future[Answer], float]]) -> None:
        loop = asyncio.get_running_loop()
        answers: Sequence[Answer | BaseException]
        try:
            answers = await loop.run_in_executor(self._thread, self._work, [task for task, _, _ in batch])
        except Exception as error:
            answers = [error] * len(batch)
        for (_, future, _), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, BaseException):
                future.set_exception(answer)
            else:
                future.set_result(answer)
