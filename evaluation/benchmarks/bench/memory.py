"""Measures the peak memory of a function: resident set of a fresh process, or the CUDA allocator's peak."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from findrec.errors import FindRecError

_STATUS = Path("/proc/self/status")


def peak_rss_bytes() -> int:
    """The largest resident set of this process in bytes since its start or the last `reset_peak_rss`."""
    if _STATUS.is_file():
        # Not getrusage: on Linux a process inherits the peak of its parent.
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_rss() -> None:
    """Reset the peak of `peak_rss_bytes` (on Linux only)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def tree_rss_bytes(pid: int) -> int:
    """Resident bytes of a process and all its descendants; 0 without `/proc`."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                total = int(line.split()[1]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(tree_rss_bytes(int(child)) for child in (task / "children").read_text().split())
    except OSError:  # the process has ended
        pass
    return total


def _measure(pipe: Connection, make: Callable[..., Callable[[], object]], args: tuple[object, ...]) -> None:
    try:
        function = make(*args)
        reset_peak_rss()
        before = peak_rss_bytes()
        function()
        pipe.send(peak_rss_bytes() - before)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def peak_bytes(make: Callable[..., Callable[[], object]], *args: object) -> int:
    """Growth in bytes of the peak resident set when the function returned by `make(*args)` runs once.

    Measured in a fresh process, because a used one would first fill its freed memory; `make` must be
    importable and its arguments picklable. Inputs, which `make` creates, are not counted; libraries loaded by
    the first call (about 20 MiB) are. Raises `FindRecError` if the function fails.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(theirs, make, args), daemon=True)
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = "the process was killed (out of memory?)"
    process.join()
    if not isinstance(answer, int):
        raise FindRecError(f"measuring the memory of {make.__name__}{args} failed: {answer}")
    return answer


def peak_cuda_bytes(function: Callable[[], object]) -> int:
    """Growth in bytes of the allocator's peak on the current CUDA device during one run."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
