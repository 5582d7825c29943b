"""Reads what an earlier stage of a model has learned, from its checkpoint (`DataFacts.artifacts`).

The checkpoint was verified when it was chosen; its layout is described in
`findrec/training/checkpoints/checkpoint.py`, which models do not import.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from findrec.errors import FindRecError
from findrec.tables.base import ITEMS


def artifact_weights(checkpoint: Path, prefix: str = "") -> dict[str, Tensor]:
    """The weights whose names begin with `prefix`, by the rest of their names.

    Raises `FindRecError` if the file cannot be read.
    """
    weights = _load(checkpoint / "tower.safetensors")
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def artifact_rows(checkpoint: Path, table: str = ITEMS) -> Tensor:
    """All rows `[num_rows + 1, d]` of a table, row 0 being the padding.

    Raises `FindRecError` if files are missing or cannot be read.
    """
    stem = "table" if table == ITEMS else f"table_{table}"
    parts: list[Tensor] = []
    files = sorted(
        checkpoint.glob(f"{stem}-*-*.safetensors"), key=lambda path: int(path.stem.rsplit("-", 2)[1])
    )
    end = 0
    for path in files:
        first, last = (int(number) for number in path.stem.rsplit("-", 2)[1:])
        if first != end:
            break
        parts.append(_load(path)["weight"])
        end = last + 1
    if not parts or len(parts) < len(files):
        raise FindRecError(
            f"rows of the table {table!r} are missing in {checkpoint}, the checkpoint of an earlier stage "
            f"(found: {', '.join(path.name for path in files) or 'none'}): train that stage again"
        )
    return torch.cat(parts)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise FindRecError(
            f"{path}, of an earlier stage, cannot be read: {error}. Train that stage again"
        ) from None
