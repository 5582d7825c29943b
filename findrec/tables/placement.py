"""Decides whether a table is replicated on all workers or sharded by rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.tables.exchange import row_range

# Up to this size a replicated table fits into any worker, and lookups need no communication.
SHARD_ABOVE_BYTES = 1 << 30


@dataclass(frozen=True)
class Placement:
    """How the rows of a table are distributed over workers, and why."""

    mode: Literal["replicated", "sharded"]
    why: str
    num_rows: int  # of the whole table, without the padding row
    dim: int
    rows: int  # the most that one worker holds, padding included
    bytes: int  # of these rows: weights, moments and, for the exact loss, the gradient


def place_table(config: RunConfig, num_items: int, dim: int, workers: int, *, content: bool) -> Placement:
    """Resolve `training.table`; `content` says whether items are also scored by their features.

    `auto` shards if there are several workers and the table with its optimizer takes more than
    `SHARD_ABOVE_BYTES`. Raises `FindRecError` if `training.table=sharded` is not possible.
    """
    num_rows = num_items + 1
    exact = config.training.loss.kind == "exact"
    row_bytes = 4 * dim * (4 if exact else 3)
    whole = num_rows * row_bytes
    size = f"{whole / 2**30:.2f} GiB with its optimizer"
    limit = f"{SHARD_ABOVE_BYTES / 2**30:g} GiB"
    problem = ""
    if num_rows < workers:
        problem = f"{num_items:,} items are too few to be split over {workers} workers"
    elif not config.model.has_default_scorer:
        problem = f"{config.model.scorer} needs all rows to rank items"
    elif exact and content and config.model.item_vectors_are_random:
        # The sharded loss scores the microbatches of all workers against the same item vectors.
        problem = (
            "item vectors are random in each microbatch (dropout of ids), while the exact loss scores all "
            "microbatches against the same item vectors"
        )
    setting = config.training.table
    if setting == "sharded" and problem:
        raise FindRecError(
            f"training.table=sharded is not possible: {problem}. Set training.table=replicated (or, for the "
            "latter, switch the dropout off or set training.loss.kind=sampled)"
        )
    if setting != "auto":
        mode, why = setting, f"{size}; training.table={setting}"
    elif workers == 1:
        mode, why = "replicated", f"{size}; one worker"
    elif whole <= SHARD_ABOVE_BYTES:
        mode, why = "replicated", f"{size}, at most {limit}"
    elif problem:
        mode, why = "replicated", f"{size}, more than {limit}, but {problem}"
    else:
        mode, why = "sharded", f"{size}, more than {limit}"
    rows = num_rows
    if mode == "sharded":
        rows = max(len(row_range(num_rows, rank, workers)) for rank in range(workers))
    return Placement(mode, why, num_items, dim, rows, rows * row_bytes)
