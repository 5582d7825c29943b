"""Runs a command that kills its whole process group before the n-th change of files below a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from clusters import environment

_WRAPPER = """
import atexit, os, runpy, signal, sys
root, limit, counted = sys.argv[1], int(sys.argv[2]), sys.argv[3]
del sys.argv[:4]
changes = 0

def is_change(event, args):
    if event == "open":
        path, _, flags = args
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
    elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
        path = args[0]
    else:
        return False
    return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(root)

def hook(event, args):
    global changes
    if is_change(event, args):
        changes += 1
        if changes == limit:
            os.killpg(0, signal.SIGKILL)

sys.addaudithook(hook)
atexit.register(lambda: open(counted, "w").write(str(changes)))
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run_until(change: int, home: Path, command: Sequence[str]) -> int:
    """Run a module or script, `command[0]`, in a process group that dies before its n-th change in `home`.

    Returns:
        The number of changes that it made; 0 if it was killed.
    """
    counted = home.parent / f"{home.name}.changes"
    counted.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", _WRAPPER, str(home), str(change), str(counted), *command],
        env=environment(home),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )
    if change and not counted.exists():
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        return 0
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return int(counted.read_text())


def hidden_files(folder: Path) -> list[str]:
    """Paths below a folder of which a part begins with a dot: temporary files, scratch folders and locks."""
    names = (os.path.join(root, name) for root, folders, files in os.walk(folder) for name in folders + files)
    return sorted(name for name in names if os.path.basename(name).startswith("."))
