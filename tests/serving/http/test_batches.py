"""Concurrent tasks share batches; each gets its own answer, and too many are refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from findrec.errors import FindRecError
from findrec.serving.http.batches import Batcher, BusyError


class Work:
    """Squares numbers; 13 is an error and 666 a bug. `hold` stops the thread until `go`."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, tasks: Sequence[int]) -> list[int | FindRecError]:
        self.batches.append(list(tasks))
        assert self.go.wait(10)
        if 666 in tasks:
            raise ZeroDivisionError("bug")
        return [FindRecError("unlucky") if task == 13 else task * task for task in tasks]


async def begun(work: Work, count: int) -> None:
    async with asyncio.timeout(10):
        while len(work.batches) < count:
            await asyncio.sleep(0.001)


def test_tasks_that_come_while_the_thread_works_share_the_next_batches():
    async def go() -> None:
        work = Work()
        batcher = Batcher(work, most=4, wait_s=0, waiting=100)
        batcher.start()
        work.go.clear()
        first = asyncio.create_task(batcher.submit([0]))
        await begun(work, 1)
        others = [asyncio.create_task(batcher.submit([n, n + 100])) for n in range(1, 6)]
        await asyncio.sleep(0)
        assert batcher.num_waiting == 10
        work.go.set()
        assert await first == [0]
        assert [await other for other in others] == [[n * n, (n + 100) ** 2] for n in range(1, 6)]
        assert [len(batch) for batch in work.batches] == [1, 4, 4, 2]
        await batcher.close()

    asyncio.run(go())


def test_a_batch_waits_for_others_no_longer_than_its_deadline():
    async def go() -> None:
        work = Work()
        batcher = Batcher(work, most=3, wait_s=60, waiting=100)
        batcher.start()
        async with asyncio.timeout(10):  # the batch is full, so nobody waits for the minute
            assert await asyncio.gather(*(batcher.submit([n]) for n in (1, 2, 3))) == [[1], [4], [9]]
        assert work.batches == [[1, 2, 3]]
        alone = asyncio.create_task(batcher.submit([4]))
        await asyncio.sleep(0.05)
        assert work.batches == [[1, 2, 3]]
        async with asyncio.timeout(10):
            await batcher.close()  # nor does an end wait for it
        assert await alone == [16]

        short = Batcher(work, most=3, wait_s=0.05, waiting=100)
        short.start()
        async with asyncio.timeout(10):
            assert await short.submit([5]) == [25]
        await short.close()

    asyncio.run(go())


def test_too_many_are_refused_and_all_others_are_answered_before_it_closes():
    async def go() -> None:
        work = Work()
        batcher = Batcher(work, most=2, wait_s=0, waiting=3)
        batcher.start()
        work.go.clear()
        first = asyncio.create_task(batcher.submit([0]))
        await begun(work, 1)
        waiting = asyncio.create_task(batcher.submit([1, 2]))
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await batcher.submit([3, 4])
        last = asyncio.create_task(batcher.submit([5]))
        await asyncio.sleep(0)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await batcher.submit([6])
        assert not closing.done()
        work.go.set()
        await closing
        assert (await first, await waiting, await last) == ([0], [1, 4], [25])

    asyncio.run(go())


def test_an_error_reaches_only_its_own_task_and_a_bug_all_of_its_batch():
    async def go() -> None:
        work = Work()
        batcher = Batcher(work, most=10, wait_s=0.01, waiting=100)
        batcher.start()
        answers = await asyncio.gather(*(batcher.submit([n]) for n in (1, 13, 2)), return_exceptions=True)
        assert answers[0] == [1]
        assert isinstance(answers[1], FindRecError)
        assert answers[2] == [4]
        answers = await asyncio.gather(*(batcher.submit([n]) for n in (1, 666)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [ZeroDivisionError] * 2
        assert await batcher.submit([3]) == [9]
        await batcher.close()

    asyncio.run(go())


def test_nothing_is_computed_for_those_who_went_away():
    async def go() -> None:
        work = Work()
        batcher = Batcher(work, most=10, wait_s=0, waiting=100)
        batcher.start()
        work.go.clear()
        first = asyncio.create_task(batcher.submit([0]))
        await begun(work, 1)
        gone, stays = (asyncio.create_task(batcher.submit([n])) for n in (1, 2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        work.go.set()
        assert (await first, await stays) == ([0], [4])
        assert work.batches == [[0], [2]]
        await batcher.close()

    asyncio.run(go())
