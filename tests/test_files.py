"""Files are replaced whole or not at all, and nothing temporary stays behind."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from findrec.files import beside, replacing, sha256_file


@pytest.mark.parametrize("sync", [False, True])
def test_the_new_file_takes_the_place_of_the_old_one(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "rows.json"
    for text in ("old", "new"):
        with replacing(path, sync=sync) as part:
            part.write_text(text)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), replacing(path) as part:  # noqa: PT012
        part.write_text("ne")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "rows.json"):
        pass
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_ignored_and_then_removed(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("old")
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom findrec.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as part:\n    part.write_text('ha')\n    os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=60).returncode == 9
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    with replacing(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_siblings_of_living_processes_and_other_machines_stay(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    own = beside(path, "part")
    stem = own.name.removesuffix(f"{os.getpid()}-{threading.get_native_id()}")
    stay = [f"{stem}{os.getppid()}-1", f"{stem}{os.getpid()}-0", ".rows.json.part-other.host-999999999-1"]
    for name in (own.name, f"{stem}999999999-1", *stay):
        (tmp_path / name).write_text("half")
    assert beside(path, "part") == own
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(stay)


def test_threads_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path, gate, found = tmp_path / "rows.json", threading.Barrier(4), []

    def write(number: int) -> None:
        with replacing(path) as part:
            part.write_text(str(number))
            gate.wait(timeout=30)
            found.append(part.read_text())
            gate.wait(timeout=30)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["0", "1", "2", "3"]
    assert list(tmp_path.iterdir()) == [path]


def test_sha256_file(tmp_path: Path) -> None:
    data = os.urandom((1 << 22) + 7)
    (tmp_path / "data").write_bytes(data)
    assert sha256_file(tmp_path / "data") == hashlib.sha256(data).hexdigest()
