"""Trainings on a CPU with the code that is chosen on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from findrec.ops import repeat_bonus
from findrec.ops.ranking import item_rows
from findrec.ops.scan import selective_scan
from findrec.tables import row_sums
from findrec.training.checkpoints import manager

REASON = "the compiled kernel is left out, as on a GPU"


@contextmanager
def gpu_paths() -> Iterator[None]:
    """In the context torch computes, tables sum as on a GPU, and checkpoints are saved beside training."""
    selective_scan._best.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selective_scan, "cpp_scan_problem", lambda: REASON)
        patch.setattr(item_rows, "cpp_rank_problem", lambda: REASON)
        patch.setattr(repeat_bonus, "_library", lambda: REASON)
        patch.setattr(row_sums, "is_cpu", lambda _: False)
        patch.setattr(manager, "saves_in_background", lambda *_: True)
        assert selective_scan.scan_backend("cpu") == "torch"
        assert item_rows.choose("auto", torch.device("cpu")) == "torch"
        assert repeat_bonus._choose("auto", torch.ones(1)) == "reference"
        yield
    selective_scan._best.cache_clear()
