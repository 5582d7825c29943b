"""Benchmark of training an item table: step time and memory of a single worker and of several workers.

A step looks up rows, computes the catalogue loss and updates the table; the tower is a sum of looked-up rows.
All placements have the same number of microbatches per step, so two workers each do half of the work. Each
worker is a process with one thread; memory is the kernel's high-water mark of the process, including the
creation of the table and with all optimizer moments in use.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from bench.memory import peak_rss_bytes

from findrec.config import LossConfig, OptimConfig
from findrec.errors import FindRecError
from findrec.tables.base import Table
from findrec.tables.item_table import ItemTable
from findrec.tables.sharded_table import ShardedItemTable
from findrec.tables.table_spec import TableSpec

Figures = dict[str, Any]


@dataclass(frozen=True)
class TableCase:
    """A catalogue and the training step on it."""

    loss: Literal["exact", "sampled", "gbce"]
    items: int
    dim: int = 64
    microbatches: int = 2
    tokens: int = 512  # targets of a microbatch, and rows it looks up
    negatives: int = 2048
    replicated: bool = True  # also measure workers with a replicated table


CASES = {
    "exact": TableCase("exact", 1_000_000),
    "sampled": TableCase("sampled", 20_000_000, tokens=3200, replicated=False),
}


def bench_tables(cases: Sequence[TableCase], *, workers: int = 2, steps: int = 5) -> list[Figures]:
    """Measure, for each case, one worker, then `workers` with a sharded and with a replicated table.

    `step_s` is the median of `steps` after one warm-up step; `peak_bytes` is that of the largest worker,
    including `base_bytes` of the process without a table. `peak_of_one` and `step_of_one` are relative to the
    single worker, `table_of_one` is the peak without the base. Raises `FindRecError` if a worker fails.
    """
    rows = []
    for case in cases:
        alone = _measure(case, "replicated", 1, steps)
        measured = [alone, _measure(case, "sharded", workers, steps)]
        if case.replicated:
            measured.append(_measure(case, "replicated", workers, steps))
        for row in measured:
            ratios = {
                "step_of_one": row["step_s"] / alone["step_s"],
                "peak_of_one": row["peak_bytes"] / alone["peak_bytes"],
                "table_of_one": (row["peak_bytes"] - row["base_bytes"])
                / (alone["peak_bytes"] - alone["base_bytes"]),
            }
            rows.append({"op": "item table", **asdict(case), **row, **ratios})
    return rows


def _measure(case: TableCase, placement: str, workers: int, steps: int) -> Figures:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="findrec-") as scratch:
        pipes, processes = [], []
        for rank in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (theirs, case, placement, rank, workers, steps, str(Path(scratch) / "rendezvous"))
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            results = [pipe.recv() for pipe in pipes]
        except EOFError:
            raise FindRecError(
                f"a worker of {workers} with a {placement} table of {case.items:,} items was killed (out of "
                "memory?)"
            ) from None
        finally:
            for process in processes:
                process.join(10)
                process.kill()
    if errors := [result for result in results if isinstance(result, str)]:
        raise FindRecError(f"measuring a {placement} table failed: {errors[0]}")
    seconds, peak, base = zip(*results, strict=True)
    return {
        "placement": placement,
        "workers": workers,
        "step_s": max(seconds),
        "peak_bytes": max(peak),
        "base_bytes": max(base),
    }


def _work(
    pipe: Connection, case: TableCase, placement: str, rank: int, world: int, steps: int, rendezvous: str
) -> None:
    try:
        torch.set_num_threads(1)
        if world > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{rendezvous}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=300),
            )
        base = peak_rss_bytes()
        spec = _spec(case)
        table: Table = ShardedItemTable(spec) if placement == "sharded" else ItemTable(spec)
        for values in table.state().values():
            values += 0.0  # touches the memory, so that it counts
        share = range(rank, case.microbatches, world)
        seconds = []
        for step in range(steps + 1):
            if world > 1:
                dist.barrier()
            begin = time.perf_counter()
            for microbatch in share:
                _microbatch(table, case, step * case.microbatches + microbatch)
            table.step(1e-3)
            seconds.append(time.perf_counter() - begin)
        pipe.send((statistics.median(seconds[1:]), peak_rss_bytes(), base))
        if world > 1:  # otherwise the first to exit may break the others' connections
            dist.barrier()
            dist.destroy_process_group()
    except Exception as error:
        pipe.send(f"worker {rank}: {type(error).__name__}: {error}")


def _spec(case: TableCase) -> TableSpec:
    return TableSpec(
        case.items,
        case.dim,
        seed=0,
        loss=LossConfig(kind=case.loss, negatives=case.negatives),
        optim=OptimConfig(),
        train_count=torch.arange(case.items + 1) % 50 if case.loss == "sampled" else None,
    )


def _microbatch(table: Table, case: TableCase, key: int) -> None:
    generator = torch.Generator().manual_seed(key)
    target_T, input_T = torch.randint(1, case.items + 1, (2, case.tokens), generator=generator)
    ids, index_T = torch.unique(input_T, return_inverse=True)
    rows = table.lookup(ids)
    h_Td = rows[index_T] + rows[index_T.roll(1)]
    loss = table.catalogue_loss(h_Td, target_T, case.tokens * case.microbatches, generator=generator)
    torch.autograd.backward(h_Td, loss.dh)
    assert rows.grad is not None
    table.push(ids, rows.grad)
