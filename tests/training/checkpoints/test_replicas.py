"""Copies of weights that differ between workers are found before a checkpoint is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forked import forked
from replicas_on_workers import work

from findrec.training.checkpoints import replicas
from findrec.training.checkpoints.replicas import digest


def test_a_flipped_bit_on_one_of_three_workers_is_an_error_for_all(tmp_path: Path) -> None:
    with forked(work, 3, str(tmp_path / "meeting"), str(tmp_path)):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [0, 1, 7, 16, 65])
def test_every_bit_changes_the_digest(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int) -> None:
    monkeypatch.setattr(replicas, "_BLOCK_BYTES", (64, 64))  # several blocks
    value = torch.arange(size + 1).to(dtype)[1:]  # not aligned to words
    seen = {int(digest(value))}
    assert seen == {int(digest(value.clone()))}
    flipped = value.clone()
    bits = flipped.view(torch.uint8)
    for at in range(len(bits)):
        for bit in range(8):
            bits[at] ^= 1 << bit
            seen.add(int(digest(flipped)))
            bits[at] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(bits)


def test_differences_do_not_cancel() -> None:
    value = torch.ones(100, 8)
    changed = value.clone()
    changed[3, 1] = torch.nextafter(changed[3, 1], torch.tensor(2.0))
    changed[70, 5] = torch.nextafter(changed[70, 5], torch.tensor(0.0))
    assert digest(changed) != digest(value)
    rows = torch.arange(800.0).view(100, 8)
    assert digest(rows.flip(0)) != digest(rows)
    flipped = rows.clone()
    flipped[[3, 70], 1] *= -1  # only the highest bits of two words
    assert digest(flipped) != digest(rows)
