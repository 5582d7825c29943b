"""Profiles a few training steps: records a trace of every operator for a trace viewer.

The file is Chrome's trace format, which https://ui.perfetto.dev and chrome://tracing open locally, without
an upload. Recording slows the recorded steps down and keeps some thousand events per step in memory, so
record only a few steps, and measure speed on others.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from findrec.progress import say

FOLDER = "profile"  # below the run folder
# The first steps load libraries and fill the allocator; one more warms the profiler up before it records.
_SKIPPED, _WARM_UP = 2, 1


class StepTrace:
    """Records steps of a training loop into `<folder>/profile/steps-FIRST-LAST.json`; a context manager.

    With `num_steps` 0 nothing is recorded, at no cost. A training that ends earlier leaves a trace of the
    steps recorded so far, or no file if there are none.
    """

    def __init__(self, folder: Path, num_steps: int, device: torch.device | str = "cpu") -> None:
        self._folder, self._num_steps = folder / FOLDER, num_steps
        self._device = torch.device(device)
        self._profile: profile | None = None
        self._recorded: list[int] = []
        self._passed = 0
        self.path: Path | None = None  # of the trace file, once written

    def __enter__(self) -> StepTrace:
        if self._num_steps > 0:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(
                activities=activities,
                schedule=schedule(wait=_SKIPPED, warmup=_WARM_UP, active=self._num_steps, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
            )
            self._profile.__enter__()  # type: ignore[no-untyped-call]
        return self

    def done(self, step: int) -> None:
        """Report that training step `step` (counted from 1) is complete."""
        if self._profile is None:
            return
        if self._passed >= _SKIPPED + _WARM_UP:
            self._recorded.append(step)
        self._passed += 1
        self._profile.step()
        if self.path is not None:
            self._end()

    def _write(self, recorded: profile) -> None:
        if not self._recorded:  # training ended before a complete step was recorded
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._recorded[0]}-{self._recorded[-1]}.json"
        recorded.export_chrome_trace(str(path))
        self.path = path
        say(f"trace of steps {self._recorded[0]} to {self._recorded[-1]}: {path} (open in ui.perfetto.dev)")

    def _end(self) -> None:
        if self._profile is not None:
            self._profile.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._profile = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
