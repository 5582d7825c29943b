"""A lock is held by one at a time, names its holder, and is released when its holder dies."""

import os
import subprocess
import sys
import threading

import pytest

from findrec.errors import FindRecError
from findrec.locks import holding

HOLD = """
import sys, time
from pathlib import Path
from findrec.errors import FindRecError
from findrec.locks import holding
with holding(Path(sys.argv[1]), "writing x", wait=True, on_error=FindRecError):
    print("held", flush=True)
    time.sleep(300)
"""


def hold(folder, *, wait):
    return holding(folder, "writing x", wait=wait, on_error=FindRecError)


def test_another_process_is_named_until_it_is_killed(tmp_path, capsys):
    folder, lock = tmp_path / "x", tmp_path / ".x.lock"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(FindRecError, match=rf"process {other.pid} on \S+ \(since .*\) is writing x"),
            hold(folder, wait=False),
        ):
            pass
        threading.Timer(0.3, other.kill).start()
        with hold(folder, wait=True):
            assert f"process {os.getpid()} " in lock.read_text()
        assert f"waiting for process {other.pid} on" in capsys.readouterr().out
    finally:
        other.kill()
        other.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_thread_may_hold_it_several_times(tmp_path):
    folder, lock = tmp_path / "x", tmp_path / ".x.lock"
    with hold(folder, wait=False):
        with hold(folder, wait=False):
            pass
        assert lock.exists()
        with pytest.raises(RuntimeError), hold(folder, wait=False):
            raise RuntimeError
        assert lock.exists()
    assert not lock.exists()


def test_one_at_a_time_among_threads(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(20):
            with hold(tmp_path / "x", wait=True):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(most), set(most)) == (80, {1})


def test_a_lock_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FindRecError, match="file"), hold(tmp_path / "file" / "x", wait=True):
        pass
