"""Validation inside of a training: in full float32, however the steps are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import make_config, planted_folder

from findrec.evaluation import validation
from findrec.evaluation.validation import validate
from findrec.training.build import build_catalogue, build_tables, build_tower_model
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker


def test_the_precision_of_the_steps_does_not_reach_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = planted_folder(tmp_path / "data", num_users=40)
    config = make_config(precision="bfloat16")
    torch.manual_seed(0)
    tower = PlainTower(build_tower_model(config, folder), config.training.optim)
    parts = (build_tables(config, folder), build_catalogue(config, folder), Worker())
    seen, results = [], []
    for name in ("make_scorer", "rank_split"):  # item vectors are made in one, user vectors in the other
        real = getattr(validation, name)

        def noted(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            result = real(*args, **kwargs)
            results.append(result)
            return result

        monkeypatch.setattr(validation, name, noted)
    want = validate(config, folder, tower, *parts)
    torch.set_float32_matmul_precision("medium")
    try:
        tower.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            got = validate(config, folder, tower, *parts)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("highest", False)] * 4
    assert torch.equal(results[0].items_Vd, results[2].items_Vd)
    assert got == want
