"""Where the rows of the item table lie: on every worker, or split over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from findrec.config import RunConfig

Mode = Literal["replicated", "sharded"]


@dataclass(frozen=True)
class Placement:
    """The mode a run uses, what made it so, and the rows one worker holds."""

    mode: Mode
    rows: int  # padding included
    why: str


def place_table(config: RunConfig, num_items: int) -> Placement:
    """The placement of a table of `num_items` rows and the padding row."""
    return Placement("replicated", num_items + 1, "the only placement there is")
