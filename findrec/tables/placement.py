"""Whether workers hold the whole item table each, or a range of its rows each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from findrec.config import RunConfig


@dataclass(frozen=True)
class Placement:
    """Where the rows of a run's item table are, and why."""

    mode: Literal["replicated", "sharded"]
    why: str
    rows: int  # held by one worker (the one with most of them), padding included
    bytes: int  # of those: weights, moments and the gradient


def place_table(config: RunConfig, num_items: int, workers: int, *, content: bool) -> Placement:
    """The placement of a table on so many workers; `content`: whether items are scored by it too."""
    rows = num_items + 1
    return Placement("replicated", "the only placement there is", rows, 16 * rows * config.model.dim)
