"""`metrics.jsonl`: whole lines on disk at once, whatever is killed."""

import json
import time
from pathlib import Path

import pytest
import torch

from findrec.training.logs.metrics_log import MetricsLog


def read(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class TestMetricsLog:
    def test_lines_are_on_disk_at_once(self, tmp_path: Path) -> None:
        log = MetricsLog(tmp_path / "run")
        before = time.time()
        log.write(3, 1, {"loss": torch.tensor(0.5), "ndcg@10": 0.25, "bad": float("nan"), "best": True})
        (line,) = read(tmp_path / "run")
        assert line.pop("time") == pytest.approx(before, abs=5)
        assert line == {"step": 3, "epoch": 1, "loss": 0.5, "ndcg@10": 0.25, "bad": None, "best": True}

    def test_resume_drops_later_steps_and_continues(self, tmp_path: Path) -> None:
        log = MetricsLog(tmp_path)
        for step in range(6):
            log.write(step, 0, {"loss": step / 2})
        log.truncate_after(3)
        log.write(4, 0, {"loss": 9.0})
        log.close()
        assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [
            (0, 0.0),
            (1, 0.5),
            (2, 1.0),
            (3, 1.5),
            (4, 9.0),
        ]
        assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]

    @pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2}'])
    def test_a_line_without_its_end_is_dropped_or_completed(self, tmp_path: Path, torn: str) -> None:
        log = MetricsLog(tmp_path)
        log.write(1, 0, {"loss": 1.0})
        log.close()
        with log.path.open("a") as file:
            file.write(torn)
        log = MetricsLog(tmp_path)
        log.write(3, 0, {"loss": 3.0})
        steps = [line["step"] for line in read(tmp_path)]
        assert steps == ([1, 2, 3] if torn.endswith("}") else [1, 3])
