"""Workers, machines and disks that fail under a run: it goes on and ends the same, or says why it cannot.

A run that is disturbed must end with the very weights of a calm one, unless its workers became fewer.
"""

import json
import os
import signal
import time

import pytest
import yaml
from clusters import Run, running_cluster
from planted import make_config, planted_folder

from findrec.training.checkpoint import latest_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster of one machine with two cores, and data and a configuration in its home."""
    home = tmp_path_factory.mktemp("home")
    planted_folder(home / "data" / "planted", num_users=80)
    config = make_config(epochs=6, microbatches=2, save_steps=5).model_dump(mode="json")
    config["data"] |= {"folder": "data/planted", "recipe": "planted"}
    config["cluster"] |= {"workers": 2, "threads": 1}
    config["evaluation"]["baselines"] = ["popularity"]
    config["tracking"]["enabled"] = False
    (home / "run.yaml").write_text(yaml.safe_dump(config))
    with running_cluster(home) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def calm(cluster):
    """The weights of an undisturbed run."""
    run = Run(cluster, "calm")
    run.end()
    return weights(run)


def weights(run):
    newest = latest_checkpoint(run.folder / "checkpoints")
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


def steps(run):
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines if "train/loss" in line]


def test_a_killed_worker_is_replaced(cluster, calm):
    run = Run(cluster, "killed")
    run.reach(12)
    os.kill(run.workers()[0], signal.SIGKILL)
    said = run.end()
    assert "of 2 was lost: restart 1 of 3, from the checkpoint step-000000" in said
    assert weights(run) == calm
    assert steps(run) == list(range(1, len(steps(run)) + 1))
    assert "Traceback" not in said


def test_a_hung_worker_is_named_and_replaced(cluster, calm):
    run = Run(cluster, "hung", "cluster.hang_s=5")
    run.reach(12)
    begun = time.monotonic()
    victim = run.workers()[1]
    os.kill(victim, signal.SIGSTOP)
    run.wait_for("WARNING: hung: rank ", 40)
    assert time.monotonic() - begun < 40
    said = run.end()
    assert f"(process {victim} on " in said
    assert "restart 1 of 3" in said
    assert weights(run) == calm
