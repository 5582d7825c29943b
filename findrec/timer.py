"""Measures the wall time of functions in alternating runs, so that other load affects all of them equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of each run of one function, in order."""

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """The median run: what a user should expect."""
        return statistics.median(self.seconds)

    @property
    def p10_s(self) -> float:
        """The 10th percentile: close to the time on an idle machine."""
        ordered = sorted(self.seconds)
        return ordered[int(0.1 * (len(ordered) - 1))]


def time_alternating(
    functions: Mapping[str, Callable[[], object]],
    *,
    runs: int = 11,
    warmup: int = 1,
    wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Run every function `runs` times, in turn, after `warmup` runs that are not measured.

    `wait` is called before each reading of the clock; on a GPU pass `torch.cuda.synchronize`. Raises
    ValueError for fewer than one run.
    """
    if runs < 1:
        raise ValueError(f"runs={runs}: at least one is needed")
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(runs):
        names: Sequence[str] = list(functions)
        # Every other run in reverse order, as a function that follows a heavy one finds colder caches.
        for name in names if run % 2 == 0 else reversed(names):
            wait()
            start = clock()
            functions[name]()
            wait()
            seconds[name].append(clock() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
