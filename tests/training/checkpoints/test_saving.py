"""Checkpoints of workers with rows of their own: on one disk, on two, and on one that is full."""

import pytest
import torch
from forked import forked
from saving_on_workers import SPEC, work

from findrec.tables.initial_rows import initial_rows
from findrec.training.checkpoints.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint


@pytest.mark.parametrize("disks", [1, 2])
def test_rows_of_all_workers_are_saved_once(tmp_path, disks):
    roots = [str(tmp_path / f"disk{rank % disks}") for rank in range(3)]
    with forked(work, 3, str(tmp_path / "meeting"), roots, 0):
        pass
    path = latest_checkpoint(tmp_path / "disk0")
    assert torch.equal(load_checkpoint(path).table["weight"], initial_rows(21, 4, seed=SPEC.seed))
    assert len(list(path.glob("table-*"))) == (3 if disks == 1 else 6)
    assert not (path / ".probe").exists()
    assert disks == 1 or not list_checkpoints(tmp_path / "disk1")


@pytest.mark.parametrize(("disks", "full"), [(1, 1), (1, 3), (2, 1)])
def test_a_full_disk_is_an_error_for_all_and_leaves_nothing(tmp_path, disks, full):
    roots = [str(tmp_path / f"disk{rank % disks}") for rank in range(3)]
    with forked(work, 3, str(tmp_path / "meeting"), roots, full):
        pass
