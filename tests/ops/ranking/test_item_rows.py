"""Vectors in a file give the ranks of vectors in memory, whatever the tiles; other files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from findrec.ops.ranking.item_rows import FileRows
from findrec.ops.ranking.rules import Rules
from findrec.ops.ranking.target_rank import target_rank


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    torch.manual_seed(0)
    items = torch.randn(1501, 12)
    items[700:800] = items[:100]
    np.save(tmp_path / "items.npy", items.numpy())
    return tmp_path / "items.npy", items


@pytest.mark.parametrize(("rows_a_tile", "held"), [(1, 0), (64, 0), (1499, 0), (1500, 0), (64, 1 << 20)])
def test_a_file_ranks_as_memory_does(
    stored: tuple[Path, torch.Tensor], rows_a_tile: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, items = stored
    monkeypatch.setattr("findrec.ops.ranking.item_rows._TILE_BYTES", 4 * 12 * rows_a_tile)
    users, row, target = torch.randn(9, 12), torch.randint(0, 9, (40,)), torch.randint(1, 1501, (40,))
    own, bonus, seen = torch.randint(0, 1501, (9, 4)), torch.randn(9, 4), torch.randint(0, 1501, (9, 6))
    extra = {"own_ids_BN": own, "own_bonus_BN": bonus, "exclude_ids_BN": seen}
    extra |= {"since_V": torch.randint(0, 5, (1501,)), "time_C": torch.randint(0, 5, (40,))}
    expected = target_rank(users, items, row, target, rules=Rules(**extra))
    found = target_rank(users, FileRows(path, held_bytes=held), row, target, rules=Rules(**extra))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_parts_of_a_file_add_up(stored: tuple[Path, torch.Tensor]) -> None:
    path, items = stored
    users, row, t = torch.randn(5, 12), torch.arange(5), torch.randn(5).double()
    asked: dict[str, Any] = {"since_V": None, "time_C": None, "impl": "auto", "tile_mib": 64}
    whole = FileRows(path).count(users, row, t, **asked)
    parts = [
        FileRows(path, lo, hi).count(users, row, t, **asked) for lo, hi in [(1, 2), (2, 901), (901, 1501)]
    ]
    assert torch.equal(whole.greater, torch.stack([part.greater for part in parts]).sum(0))
    assert torch.equal(whole.greater, ((users.double() @ items[1:].double().T) > t[:, None]).sum(1))
    empty = FileRows(path, 7, 7).count(users, row, t, **asked)
    assert int(empty.greater.sum()) == 0


def test_other_files_are_refused(tmp_path: Path, stored: tuple[Path, torch.Tensor]) -> None:
    np.save(tmp_path / "double.npy", np.ones((3, 4)))
    np.save(tmp_path / "turned.npy", np.asfortranarray(np.ones((3, 4), np.float32)))
    np.save(tmp_path / "flat.npy", np.ones(4, np.float32))
    for name in ("double", "turned", "flat"):
        with pytest.raises(ValueError, match="float32"):
            FileRows(tmp_path / f"{name}.npy")
    for lo, hi in ((0, 5), (5, 4), (1, 1502)):
        with pytest.raises(ValueError, match="are not in"):
            FileRows(stored[0], lo, hi)
    cut = tmp_path / "cut.npy"
    cut.write_bytes(stored[0].read_bytes()[:-40])
    with pytest.raises(OSError, match="ends early"):
        FileRows(cut, held_bytes=1 << 20)
