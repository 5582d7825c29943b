"""What the training of a run took: its time, speed and memory, from the logs of its run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from findrec.config import RunConfig
from findrec.training.checkpoints.validations import SELECTS, read_validations
from findrec.training.logs.metrics_log import read_lines
from findrec.training.runs import run_folder, training_jobs

SHARE = 0.95  # of the best validation metric, for the time until it is reached


@dataclass(frozen=True)
class Cost:
    """The cost of one training with all its stages; a value that was not logged is None.

    Times are in training steps, without validations and checkpoints. They include the time before
    interruptions, except for steps that were lost and trained again.

    Attributes:
        seconds: time of all stages.
        targets_per_s: training targets per second of the last stage.
        seconds_to_share: time of the earlier stages, and of the last one until its validation metric was at
            least `SHARE` of the best.
        memory_gib: peak memory of the worker that used most.
        gpu_gib: the same of its GPU.
    """

    seconds: float
    targets_per_s: float
    seconds_to_share: float | None
    memory_gib: float | None
    gpu_gib: float | None


def cost_of(config: RunConfig) -> Cost | None:
    """The cost of a run; None if its log has no times."""
    jobs = training_jobs(config, run_folder(config))
    logs = [read_lines(job.folder / "metrics.jsonl") for job in jobs]
    stages = [_steps(lines) for lines in logs]
    if not all(stages):
        return None
    seconds, steps = [_sum(stage, "train/seconds") for stage in stages], stages[-1]
    everything = [line for lines in logs for line in lines]
    until = _seconds_to_share(steps, _validations(logs[-1], jobs[-1].folder))
    return Cost(
        seconds=sum(seconds),
        targets_per_s=_sum(steps, "train/targets") / seconds[-1],
        seconds_to_share=None if until is None else sum(seconds[:-1]) + until,
        memory_gib=_largest(everything, "memory/worker_peak_gib"),
        gpu_gib=_largest(everything, "memory/gpu_peak_gib"),
    )


def _steps(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of training steps with times; of a step that was trained again, the last one."""
    timed = {int(line["step"]): line for line in lines if "train/seconds" in line and "train/targets" in line}
    return list(timed.values())


def _sum(lines: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(float(line[key]) for line in lines)


def _largest(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return max((float(line[key]) for line in lines if line.get(key) is not None), default=None)


def _validations(lines: Sequence[Mapping[str, Any]], training: Path) -> list[tuple[int, float]]:
    """The step and the metric of each validation, inline or asynchronous, by step."""
    key = f"valid/{SELECTS}"
    inline = [(int(line["step"]), float(line[key])) for line in lines if line.get(key) is not None]
    return sorted([*inline, *((one.step, one.values[SELECTS]) for one in read_validations(training))])


def _seconds_to_share(
    steps: Sequence[Mapping[str, Any]], validations: Sequence[tuple[int, float]]
) -> float | None:
    if not validations:
        return None
    wanted = SHARE * max(value for _, value in validations)
    reached = next(step for step, value in validations if value >= wanted)
    return _sum([line for line in steps if line["step"] <= reached], "train/seconds")
