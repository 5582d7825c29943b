"""Whether workers hold the whole item table each, or a range of its rows each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.tables.exchange import row_range

# A replicated table of this size is no burden for a worker, and looking rows up costs it no exchange.
SHARD_ABOVE_BYTES = 1 << 30


@dataclass(frozen=True)
class Placement:
    """Where the rows of a run's item table are, and why."""

    mode: Literal["replicated", "sharded"]
    why: str
    rows: int  # held by one worker (the one with most of them), padding included
    bytes: int  # of those: weights, moments and, for the exact loss, the gradient


def place_table(config: RunConfig, num_items: int, workers: int, *, content: bool) -> Placement:
    """What `training.table` means for a catalogue on so many workers; `content`: whether items are scored by
    it too. `auto` shards where there are several workers and a whole table with its optimizer takes more than
    `SHARD_ABOVE_BYTES`.

    Raises `FindRecError` where `training.table=sharded` cannot train what is configured.
    """
    num_rows = num_items + 1
    exact = config.training.loss.kind == "exact"
    row_bytes = 4 * config.model.dim * (4 if exact else 3)
    whole = num_rows * row_bytes
    size = f"{whole / 2**30:.2f} GiB with its optimizer"
    limit = f"{SHARD_ABOVE_BYTES / 2**30:g} GiB"
    problem = ""
    if num_rows < workers:
        problem = f"{num_items:,} items are too few to be split over {workers} workers"
    elif exact and content and config.model.items.id_dropout > 0:
        # A round of the sharded loss ranks the microbatches of all workers against one set of vectors.
        problem = (
            "model.items.id_dropout drops other items in each microbatch, the exact loss needs all of them"
        )
    asked = config.training.table
    if asked == "sharded" and problem:
        raise FindRecError(
            f"training.table=sharded is not possible: {problem}. Set training.table=replicated (or, for the "
            "latter, model.items.id_dropout=0 or training.loss.kind=sampled)"
        )
    if asked != "auto":
        mode, why = asked, f"{size}; training.table={asked}"
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
    return Placement(mode, why, rows, rows * row_bytes)
