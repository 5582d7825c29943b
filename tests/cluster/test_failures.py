"""Workers, machines and disks that fail under a run: it goes on and ends the same, or says why it cannot.

A run that is disturbed must end with the very weights of a calm one, unless its workers became fewer.
"""

import json
import os
import random
import signal
import subprocess
import time
from contextlib import contextmanager

import pytest
import torch
from clusters import UNTRACKED, Run, free_port, kill_node, running_cluster, weights
from planted import planted_folder, planted_home

from findrec.config import load_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.validation import validate
from findrec.training.build import build_tables, build_tower_model
from findrec.training.checkpoints.checkpoint import latest_checkpoint
from findrec.training.loop import run_training
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker

pytestmark = [pytest.mark.ray, pytest.mark.slow]
more = pytest.mark.cluster  # of the larger tier; the rest is torture


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster of one machine with two cores, and data and a configuration in its home."""
    home = planted_home(tmp_path_factory.mktemp("home"), UNTRACKED, save_steps=5)
    with running_cluster(home) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def calm(cluster):
    """The weights of an undisturbed run."""
    run = Run(cluster, "calm")
    run.end()
    return weights(run.folder)


def steps(run):
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if "train/loss" in line]


@more
def test_a_killed_worker_is_replaced(cluster, calm):
    run = Run(cluster, "killed")
    run.reach(12)
    os.kill(run.workers()[0], signal.SIGKILL)
    output = run.end()
    assert "of 2 was lost: restart 1 of 3, from the checkpoint step-000000" in output
    assert weights(run.folder) == calm
    assert steps(run) == list(range(1, len(steps(run)) + 1))


@more
def test_a_hung_worker_is_named_and_replaced(cluster, calm):
    run = Run(cluster, "hung", "cluster.hang_s=5")
    run.reach(12)
    begun = time.monotonic()
    victim = run.workers()[1]
    os.kill(victim, signal.SIGSTOP)
    run.wait_for("WARNING: hung: rank ", 40)
    assert time.monotonic() - begun < 40
    output = run.end()
    assert f"(process {victim} on " in output
    assert "restart 1 of 3" in output
    assert weights(run.folder) == calm


@more
def test_terminated_it_saves_the_step_and_continues(cluster):
    options = [
        "training.save_steps=0",
        "training.save_every=30",
        "training.epochs=30",
    ]  # longer than a stop takes
    undisturbed = Run(cluster, "undisturbed", *options)
    undisturbed.end()
    run = Run(cluster, "terminated", *options)
    run.reach(12)
    run.process.send_signal(signal.SIGTERM)
    output = run.end(code=75)
    step = latest_checkpoint(run.folder / "checkpoints").name.removeprefix("step-").lstrip("0")
    assert f"stopped by SIGTERM: step {step} is done and saved; the same command continues" in output
    assert int(step) == steps(run)[-1]
    again = Run(cluster, "terminated", *options)
    again.end()
    assert weights(again.folder) == weights(undisturbed.folder)


@more
def test_a_machine_is_lost_another_comes_and_is_taken_away(cluster, calm):
    """Started on two, it goes on with one worker while there is no more room, and returns to two. Told that a
    machine will go it leaves that one before.
    """
    with running_cluster(cluster.home, cpus=1) as small:
        node = small.add_node(cpus=1)
        run = Run(small, "elastic", "cluster.min_workers=1", "cluster.wait_s=60", "training.epochs=60")
        run.wait_for("placing 2 workers")
        run.reach(12)
        kill_node(node)
        run.wait_for("placing 1 workers", 150)
        small.add_node(cpus=1)
        run.wait_for("there is room for 2 workers: the 1 that run stop at the next step", 150)
        run.wait_for("placing 2 workers", 150, times=2)
        reached = run.step()
        run.reach(reached + 5)
        small.drain_node()
        run.wait_for("will be taken away: the workers stop at the next step and move", 30)
        run.wait_for("placing 1 workers", 150, times=2)
        reached = run.step()
        run.reach(reached + 5)
        run.process.send_signal(signal.SIGTERM)
        output = run.end(code=75)
    assert output.count(": restart ") == 1  # after the loss; a drained machine loses no step
    assert steps(run) == list(range(1, len(steps(run)) + 1))
    want = reference_losses(cluster.home, ["training.epochs=60"], len(steps(run)))
    got = losses(run)
    assert got[:30] == pytest.approx(want[:30], rel=1e-4)
    assert got == pytest.approx(want, rel=0.02)  # hundreds of steps let rounding grow


@more
def test_a_full_disk_gives_a_warning_and_training_resumes(cluster, calm):
    run_folder = cluster.home / "runs" / "full"
    with tiny_disk(run_folder / "checkpoints", mib=1):
        run = Run(cluster, "full")
        run.wait_for("WARNING: the checkpoint of step 10 could not be written")
        output = run.end(code=2)
        assert "No space left on device" in output
        assert "Make room there, then start the same command again" in output
        assert latest_checkpoint(run_folder / "checkpoints").name == "step-00000005"
        subprocess.run(["mount", "-o", "remount,size=64m", str(run_folder / "checkpoints")], check=True)
        again = Run(cluster, "full")
        again.end()
        assert weights(again.folder) == calm


@more
def test_a_shard_that_breaks_under_way_is_named(cluster):
    folder = cluster.home / "data" / "breaking"
    planted_folder(folder, num_users=80)
    run = Run(cluster, "breaking", "data.folder=data/breaking", "training.epochs=200")
    run.reach(3)
    shard = sorted((folder / "shards").glob("*.tar"))[0]
    os.truncate(shard, 1000)
    output = run.end(code=2)
    assert f"{shard.name} was altered" in output.splitlines()[-1]


@more
def test_a_dead_tracking_server_stops_nothing(cluster, calm):
    server = f"http://127.0.0.1:{free_port()}"
    run = Run(cluster, "untold", "tracking.enabled=true", f"tracking.uri={server}")
    output = run.end()
    assert output.count(f"MLflow at {server} cannot be written") >= 1
    assert weights(run.folder) == calm


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_twenty_random_kills_end_in_the_same_weights(cluster):
    longer = "training.epochs=40"
    calm = Run(cluster, "long-calm", longer)
    calm.end()
    draw = random.Random(0)
    run = Run(cluster, "long", longer)
    for kill in range(20):
        run.reach(run.step() + draw.randrange(1, 12))
        if kill % 5 == 4:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()
            run = Run(cluster, "long", longer)
        else:
            os.kill(draw.choice(run.workers()), draw.choice([signal.SIGKILL, signal.SIGTERM]))
            run.wait_for("placing 2 workers", times=2 + kill % 5)
    run.end()
    assert weights(run.folder) == weights(calm.folder)
    assert steps(run) == list(range(1, len(steps(run)) + 1))


@contextmanager
def tiny_disk(path, mib):
    path.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(path)])
    if mounted.returncode:
        pytest.skip("a disk to fill can only be mounted by root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def losses(run):
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [result["train/loss"] for line in lines if "train/loss" in (result := json.loads(line))]


class EnoughError(Exception):
    pass


def reference_losses(home, overrides, count):
    """Those of the first steps in one process, without Ray or DeepSpeed."""
    config = load_config(home / "run.yaml", overrides)
    folder = DataFolder.open(home / "data" / "planted")
    result = []

    class Log:
        def log(self, step, epoch, values):
            if "train/loss" in values:
                result.append(values["train/loss"])
            if len(result) == count:
                raise EnoughError

    torch.manual_seed(config.training.seed)
    tower = PlainTower(build_tower_model(config, folder), config.training.optim)
    with pytest.raises(EnoughError):
        run_training(
            config,
            folder,
            home / "reference",
            tower,
            build_tables(config, folder),
            worker=Worker(),
            validate=validate,
            log=Log(),
        )
    return result
