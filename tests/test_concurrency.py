"""Commands that share a machine, a run or a data set while they work, and machines that lack something."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from clusters import (
    UNTRACKED,
    Cluster,
    Run,
    command_of,
    environment,
    free_port,
    kill_node,
    wait_until,
    weights,
)
from planted import planted_folder, planted_home
from small_recipe import contents

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster]

CLI = [sys.executable, "-m", "findrec.cli"]
RECIPE = """
name: shop
title: A shop
licence: none
source: made here
sources:
  files: [{path: ., files: {log: {member: log.csv}}}]
events: SELECT * FROM {log}
"""
OTHER_RAY = """
import sys
import ray
ray.__version__ = "2.1.0"
from ray.scripts.scripts import main
sys.argv[0] = "ray"
main()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a configuration, and the finished run `calm`."""
    home = planted_home(tmp_path_factory.mktemp("home"), UNTRACKED, save_steps=5)
    done = subprocess.run(command_of(home, "name=calm"), env=environment(home), cwd=home, timeout=300)
    assert done.returncode == 0
    return Path(home)


def start(home: Path, *overrides: str) -> Run:
    """A run on a local Ray cluster of its own."""
    name, *others = overrides
    return Run(Cluster(home, "local", "", {}, {}), name, *others)


def findrec(home: Path, *arguments: str, prefix: Sequence[str] = (), **more: str) -> tuple[int, str]:
    """Exit code and output of a command."""
    done = subprocess.run(
        [*prefix, *CLI, *arguments],
        env=environment(home, **more),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def figures(run: Path) -> object:
    """The measured rows of a run."""
    return json.loads((run / "metrics.json").read_text())["test"]


def changed_mounts(script: str) -> list[str]:
    """The start of a command that sees mounts of its own, which `script` changes."""
    prefix = ["unshare", "--mount", "sh", "-ec", script + '\nexec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mounts can only be changed by root")
    return prefix


def test_two_runs_at_once_end_as_alone(home: Path) -> None:
    runs = [start(home, name) for name in ("one", "two")]
    for run in runs:
        run.end(seconds=500)
        assert weights(run.folder) == weights(home / "runs" / "calm")


def test_evaluating_a_run_that_trains_disturbs_nothing(home: Path) -> None:
    run = start(home, "watched")
    run.reach(6)
    codes = set()
    while run.process.poll() is None:
        code, said = findrec(home, "evaluate", "watched")
        assert code == 0 or said.splitlines()[-1].startswith("error: ")
        codes.add(code)
    run.end()
    assert 0 in codes
    calm = home / "runs" / "calm"
    assert weights(run.folder) == weights(calm)
    assert figures(run.folder) == figures(calm)


def test_data_written_again_under_a_run(home: Path) -> None:
    """The same data changes nothing; other data ends the run with an error or not at all."""
    run = start(home, "again")
    run.reach(5)
    planted_folder(home / "data" / "planted", num_users=80)
    run.end()
    assert weights(run.folder) == weights(home / "runs" / "calm")

    other = home / "data" / "other"
    planted_folder(other, num_users=80)
    run = start(home, "exchanged", "data.folder=data/other", "training.epochs=12")
    run.reach(5)
    planted_folder(other, num_users=80, seed=1)
    code = run.process.wait(300)
    assert code == 2, run.output[-3000:]
    assert "Traceback" not in run.output
    assert "data" in run.output.splitlines()[-1]
    assert not (run.folder / "metrics.json").exists()


def test_two_prepares_of_one_folder_do_the_work_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [f"u{rng.integers(3000)},{rng.integers(400)},{1_700_000_000 + n}" for n in range(300_000)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,timestamp", *rows]) + "\n")
    (tmp_path / "shop.yaml").write_text(RECIPE)
    command = [*CLI, "prepare", "shop.yaml", "--folder", "out"]
    both = [
        subprocess.Popen(
            command, env=environment(tmp_path), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=200)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(" events/s" in text for text in said) == 1
    assert all("ready: " in text for text in said)
    (waiting,) = [text for text in said if " events/s" not in text]
    working = both[said.index(waiting) - 1]
    assert "waiting for process" not in waiting or f"waiting for process {working.pid}" in waiting
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_small_shared_memory_is_enough(home: Path) -> None:
    prefix = changed_mounts("mount -t tmpfs -o size=64m tmpfs /dev/shm")
    done = subprocess.run(
        [*prefix, *command_of(home, "name=small")],
        env=environment(home),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert weights(home / "runs" / "small") == weights(home / "runs" / "calm")


def test_a_disk_that_became_read_only_is_one_error(home: Path) -> None:
    prefix = changed_mounts(f"mount --bind {home} {home}\nmount -o remount,ro,bind {home}")
    np.save(home / "vectors.npy", np.ones((60, 3), np.float32))
    (home / "shop.yaml").write_text(RECIPE)
    (home / "log.csv").write_text("user,item,timestamp\nu,i,3\n")
    before = contents(home / "runs" / "calm") | contents(home / "data" / "planted")
    for command in (
        ["train", "run.yaml", "name=calm", "training.epochs=9"],
        ["train", "run.yaml", "name=new"],
        ["evaluate", "calm"],
        ["report", "calm"],
        ["index", "calm"],
        ["inspect", "calm", "--user", "0"],
        ["features", "planted", "--vectors", "vectors.npy", "--modality", "audio"],
        ["prepare", "shop.yaml"],
    ):
        code, said = findrec(home, *command, prefix=prefix)
        assert code == 2, (command, said)
        assert "Read-only file system" in said.splitlines()[-1], (command, said)
    after = contents(home / "runs" / "calm") | contents(home / "data" / "planted")
    assert after == before


def test_a_disk_that_is_full_at_a_restart_is_one_error(home: Path, tmp_path: Path) -> None:
    run, copy = home / "runs" / "calm", tmp_path / "calm"
    shutil.copytree(run, copy)
    prefix = changed_mounts(
        f"mount -t tmpfs -o size=16m tmpfs {run}\n"
        f"cp -r {copy}/. {run}\n"
        f"dd if=/dev/zero of={run}/other bs=1k 2>/dev/null || true"
    )
    code, said = findrec(home, "train", "run.yaml", "name=calm", prefix=prefix)
    assert code == 2, said
    assert "No space left on device" in said.splitlines()[-1], said


def test_a_home_that_cannot_be_written_is_enough(home: Path, tmp_path: Path) -> None:
    prefix = changed_mounts(f"mount -t tmpfs -o ro tmpfs {tmp_path}")
    code, said = findrec(
        *(home, "train", "run.yaml", "name=homeless", "tracking.enabled=true"),
        prefix=prefix,
        HOME=str(tmp_path),
    )
    assert code == 0, said
    assert weights(home / "runs" / "homeless") == weights(home / "runs" / "calm")


def test_a_head_of_another_ray_version_is_refused(home: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-c", OTHER_RAY, "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=1", "--include-dashboard=false", "--disable-usage-stats"]
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(
            command, env=environment(tmp_path, RAY_AUTH_MODE="disabled"), stdout=log, stderr=log
        )
    try:
        wait_until(lambda: os.path.getsize(tmp_path / "head.log") > 0, 60, "the head does not start")
        wait_until(lambda: "Ray runtime started" in (tmp_path / "head.log").read_text(), 90, "no head")
        code, said = findrec(
            *(home, "train", "run.yaml", "name=versions"),
            RAY_ADDRESS=f"127.0.0.1:{port}",
            RAY_AUTH_MODE="disabled",
        )
    finally:
        kill_node(head)
    assert code == 2
    assert "2.1.0" in said.splitlines()[-1]
