"""ZeRO-3 gathers weights that a model's loss uses itself, outside of any module, in both passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import forked
from zero_on_workers import plain, work


def test_weights_used_by_the_loss_itself_train_as_without_deepspeed(tmp_path: Path) -> None:
    wanted = plain()
    with forked(work, 2, str(tmp_path / "meeting"), str(tmp_path / "steps")):
        pass
    for stage in (1, 3):
        made = [json.loads((tmp_path / f"steps.{stage}.{rank}").read_text()) for rank in (0, 1)]
        (first, buffer), (second, other) = made
        assert buffer == other == [0.0, 1.0, 2.0]
        for step, (loss, norm) in enumerate(wanted):
            assert first[step][0] + second[step][0] == pytest.approx(loss, rel=1e-5)
            assert first[step][1] == second[step][1] == pytest.approx(norm, rel=1e-5)
