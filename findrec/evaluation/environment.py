"""Where results were written: versions, machine, source revision."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess

from findrec.bench.rows import machine
from findrec.paths import checkout

_PACKAGES = ("numpy", "deepspeed", "ray", "faiss-cpu", "faiss-gpu", "mamba-ssm")


def describe_environment() -> list[tuple[str, str]]:
    """Pairs of a name and a value; what is not there is left out. Holds no date: pages stay comparable."""
    known = {name: value for name, value in machine().items() if name != "date" and value is not None}
    for package in _PACKAGES:
        try:
            known[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    known["system"] = platform.platform()
    if (revision := source_revision()) is not None:
        known["source revision"] = revision
    return [(name, str(value)) for name, value in known.items()]


def source_revision() -> str | None:
    """The commit of the checkout this runs from, `-dirty` where files differ from it; None without git."""
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
