"""Weights and rows of an earlier stage, and freezing them inside another model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from findrec.errors import FindRecError
from findrec.models.parts.artifacts import artifact_rows, artifact_weights
from findrec.models.parts.frozen import freeze


def test_weights_are_those_of_a_part(tmp_path: Path) -> None:
    save_file(
        {"a.x": torch.ones(2), "a.y": torch.zeros(1), "b.x": torch.ones(3)}, tmp_path / "tower.safetensors"
    )
    assert sorted(artifact_weights(tmp_path, "a.")) == ["x", "y"]
    assert len(artifact_weights(tmp_path)) == 3


def test_rows_are_joined_in_order(tmp_path: Path) -> None:
    rows = torch.arange(24.0).view(12, 2)
    for first, last in ((0, 1), (2, 9), (10, 11)):
        part = {"weight": rows[first : last + 1].clone(), "exp_avg": torch.zeros(1)}
        save_file(part, tmp_path / f"table-{first}-{last}.safetensors")
        save_file({"weight": part["weight"] + 1}, tmp_path / f"table_users-{first}-{last}.safetensors")
    assert torch.equal(artifact_rows(tmp_path), rows)
    assert torch.equal(artifact_rows(tmp_path, "users"), rows + 1)
    (tmp_path / "table-2-9.safetensors").unlink()
    with pytest.raises(FindRecError, match="rows of the table 'items' are missing"):
        artifact_rows(tmp_path)


def test_damaged_and_missing_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(FindRecError, match="train that stage again"):
        artifact_rows(tmp_path)
    with pytest.raises(FindRecError, match="cannot be read"):
        artifact_weights(tmp_path)
    (tmp_path / "tower.safetensors").write_bytes(b"no weights")
    with pytest.raises(FindRecError, match="Train that stage again"):
        artifact_weights(tmp_path)


def test_frozen_weights_are_buffers_with_the_same_names_and_values() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(2, 3)
    wanted = module(x)
    freeze(module)
    assert not list(module.parameters())
    assert list(module.state_dict()) == list(before)
    assert torch.equal(module(x), wanted)
    assert not module(x).requires_grad
    module.load_state_dict({name: value + 1 for name, value in before.items()})
    assert not torch.equal(module(x), wanted)
