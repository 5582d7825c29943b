"""Libraries are compiled once, whoever asks for them, and a killed build blocks nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import findrec
from findrec.ops._build import BuildError, load_library

ROOT = Path(findrec.__file__).resolve().parents[1]
COUNTED = (
    "import findrec.ops._build as b; real = b._compile\n"
    "def counted(*args):\n    print('built', flush=True)\n    {during}\n    real(*args)\n"
    "b._compile = counted; print(b.load_library('selective_scan').scan_chunk())"
)


def start(cache: Path, during: str) -> subprocess.Popen[str]:
    """A process that loads a library, and does `during` while it holds the lock."""
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(cache)}
    command = [sys.executable, "-c", COUNTED.format(during=during)]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_workers_that_start_at_once_build_once(tmp_path: Path) -> None:
    workers = [start(tmp_path, "pass") for _ in range(3)]
    printed = [worker.communicate(timeout=120)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers)
    assert sum("built" in text for text in printed) == 1
    assert len(list(tmp_path.rglob("*.so"))) == 1


def test_a_killed_builder_releases_its_lock(tmp_path: Path) -> None:
    killed = start(tmp_path, "import time; time.sleep(300)")
    assert killed.stdout is not None
    assert killed.stdout.readline() == "built\n"  # it holds the lock
    waiting = start(tmp_path, "pass")
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.communicate(timeout=3)
    killed.kill()
    assert "built" in waiting.communicate(timeout=120)[0]
    assert (killed.wait(), waiting.returncode) == (-9, 0)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="set TORCH_EXTENSIONS_DIR to a folder that can be written"):
        load_library("selective_scan")
