"""Finds the NVIDIA driver of this machine, and the build of PyTorch that it can run.

Standard library only, and no other module of FindRec: the set-up (`.ci/setup_env.py`) loads this file before
anything is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CUDA_HOME = "/usr/local/cuda"
_ANSWER_S = 60  # a machine with many GPUs whose driver is not kept loaded takes some ten seconds


@dataclass(frozen=True)
class Driver:
    """What `nvidia-smi` says: version and GPUs, or the `problem` why it says nothing."""

    version: str = ""  # such as 580.65.06
    gpus: tuple[str, ...] = ()  # names
    capabilities: tuple[float, ...] = ()  # compute capabilities, such as 9.0; none if the driver is too old
    problem: str = ""

    @property
    def branch(self) -> int:
        """The first number of the version, by which CUDA's requirements are stated; 0 if unknown."""
        return int(self.version.split(".")[0]) if self.version else 0


@dataclass(frozen=True)
class CudaBuild:
    """A build of the PyTorch version in constraints.txt: what it needs to run."""

    name: str  # of its index below https://download.pytorch.org/whl/
    cuda: int  # major version of CUDA
    oldest_driver: int  # branch
    capabilities: tuple[float, float]  # the least and the greatest that it has kernels for


# Newest first; the first one is what PyPI has for Linux. A driver of 525 or newer runs every CUDA 12, one of
# 580 or newer every CUDA 13 (CUDA's minor version compatibility).
BUILDS = (CudaBuild("cu130", 13, 580, (7.5, 12.9)), CudaBuild("cu126", 12, 525, (5.0, 9.0)))


@dataclass(frozen=True)
class Choice:
    """The build for a driver, None for the CPU build; `reason` says why no build with CUDA fits."""

    build: CudaBuild | None
    reason: str = ""


def find_driver() -> Driver | None:
    """The driver of this machine; None if `nvidia-smi` is not installed."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    lines, problem = _query(program, "driver_version,name")
    found = [match.groups() for line in lines if (match := re.fullmatch(r"(\d+\.[\d.]+),\s*(.+)", line))]
    if not found:
        return Driver(problem=problem or " ".join(lines)[:200] or "it lists no GPU")
    # Drivers before 510 do not know this field.
    capabilities = [line for line in _query(program, "compute_cap")[0] if re.fullmatch(r"\d+\.\d+", line)]
    return Driver(found[0][0], tuple(name for _, name in found), tuple(map(float, capabilities)))


def gpu_memory() -> int | None:
    """Bytes of the smallest GPU of this machine by `nvidia-smi`; None if it does not say.

    All GPUs of the machine count, also those that CUDA_VISIBLE_DEVICES hides from this process.
    """
    program = shutil.which("nvidia-smi")
    lines = [] if program is None else _query(program, "memory.total")[0]
    sizes = [int(match[1]) << 20 for line in lines if (match := re.fullmatch(r"(\d+) MiB", line))]
    return min(sizes, default=None)


def _query(program: str, fields: str) -> tuple[list[str], str]:
    """The lines of an answer of `nvidia-smi`, or why there is none."""
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_ANSWER_S,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return [], f"it does not answer within {_ANSWER_S} s"
    except OSError as error:
        return [], f"it does not start ({error.strerror})"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        return [], " ".join(lines)[:200] or f"it exits with code {done.returncode}"
    return lines, ""


def choose_build(driver: Driver) -> Choice:
    """The newest build of PyTorch that runs on the driver and has kernels for its GPUs.

    Kernels for every GPU are preferred to kernels for the newest one only. Unknown compute capabilities fit.
    """
    if not driver.version:
        return Choice(None, f"nvidia-smi lists no GPU: {driver.problem}")
    runs = [build for build in BUILDS if driver.branch >= build.oldest_driver]
    if not runs:
        needs = ", ".join(f"{b.oldest_driver} or newer for CUDA {b.cuda}" for b in reversed(BUILDS))
        return Choice(None, f"its driver {driver.version} is too old for PyTorch, which needs {needs}")
    for capabilities in (driver.capabilities, sorted(driver.capabilities)[-1:]):
        for build in runs:
            least, greatest = build.capabilities
            if all(least <= capability <= greatest for capability in capabilities):
                return Choice(build)
    newest = max(driver.capabilities)
    for build in BUILDS:
        if build.capabilities[0] <= newest <= build.capabilities[1]:
            needed = f"a driver of {build.oldest_driver} or newer, but {driver.version} is installed"
            return Choice(None, f"its compute capability {newest} needs {needed}")
    return Choice(None, f"PyTorch has no kernels for its compute capability {newest}")


def driver_problem(driver: Driver, cuda: str) -> str:
    """Why a PyTorch built for `cuda` (such as "13.0") cannot run on a driver; empty if it should.

    Versions of CUDA that `BUILDS` does not know are not judged.
    """
    major = int(cuda.split(".")[0])
    needed = next((build.oldest_driver for build in BUILDS if build.cuda == major), 0)
    if driver.version and driver.branch < needed:
        return f"CUDA {cuda} needs a driver of {needed} or newer, but {driver.version} is installed"
    return ""


def find_nvcc() -> tuple[str, int] | None:
    """The compiler that extensions for CUDA are built with, and its major version; None without one."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))  # in torch's order
    beside = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    for path in (*beside, shutil.which("nvcc"), f"{DEFAULT_CUDA_HOME}/bin/nvcc"):
        if path is None or not Path(path).is_file():
            continue
        try:
            shown = subprocess.run(
                [path, "--version"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=60,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if match := re.search(rb"release (\d+)\.", shown.stdout):
            return path, int(match.group(1))
    return None
