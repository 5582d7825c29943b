"""Worker processes for tests, forked from one process that has the libraries loaded already."""

import multiprocessing
from contextlib import contextmanager


@contextmanager
def forked(target, world, *arguments):
    """`target(rank, world, *arguments)` on each of `world` workers while the body runs; all must end well."""
    context = multiprocessing.get_context("forkserver")
    # By names that are installed: the server does not know where tests lie.
    context.set_forkserver_preload(["findrec.training.build", "findrec.evaluation.ranking.distributed"])
    workers = [context.Process(target=target, args=(rank, world, *arguments)) for rank in range(world)]
    for worker in workers:
        worker.start()
    try:
        yield
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0] * world
    finally:
        for worker in workers:
            worker.kill()
