"""Describes the environment of a result: package versions, machine and source revision."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

from findrec import __version__
from findrec.paths import checkout

_PACKAGES = ("numpy", "deepspeed", "ray", "faiss-cpu", "faiss-gpu", "mamba-ssm")


def machine() -> dict[str, object]:
    """The versions and hardware that a reader needs to interpret measurements."""
    import torch

    return {
        "findrec": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def describe_environment() -> list[tuple[str, str]]:
    """Pairs of a name and a value, without those that are missing and without the date, for equal pages."""
    values = {name: value for name, value in machine().items() if name != "date" and value is not None}
    for package in _PACKAGES:
        try:
            values[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    values["system"] = platform.platform()
    if (revision := source_revision()) is not None:
        values["source revision"] = revision
    return [(name, str(value)) for name, value in values.items()]


def source_revision() -> str | None:
    """The commit of the source checkout, with `-dirty` if files differ from it; None without git."""
    root = checkout()
    if root is None or not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
