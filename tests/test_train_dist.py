"""The main job, for real: Ray, two DeepSpeed workers, evaluation, MLflow; killed, continued, submitted."""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from clusters import (
    UNTRACKED,
    Cluster,
    Run,
    environment,
    free_port,
    running_cluster,
    train,
    wait_until,
    weights,
)
from planted import planted_folder, planted_home

from findrec.datasets.folder.data_folder import DataFolder
from findrec.serving.streaming import load_streaming
from findrec.train_dist import main

pytestmark = [pytest.mark.ray, pytest.mark.slow]
more = pytest.mark.cluster  # of the larger tier


@pytest.fixture
def refused(home, monkeypatch, capsys):
    """Runs that are refused before anything starts, in this process: exit code 2 and what was said."""

    def run(*overrides: str, **variables: str) -> str:
        for name, value in {"FINDREC_HOME": str(home), **variables}.items():
            monkeypatch.setenv(name, value)
        assert main(["--config", str(home / "run.yaml"), *overrides]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return run


def metrics(home: Path, name: str) -> list[dict]:
    return json.loads((home / "runs" / name / "metrics.json").read_text())["test"]


def numbers(rows: list[dict]) -> list[float]:
    return [v for row in rows for k, v in sorted(row.items()) if isinstance(v, float)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A FINDREC_HOME with planted data and a finished run `two` of two workers."""
    home = planted_home(tmp_path_factory.mktemp("home"), "evaluation.baselines=[popularity, sasrec]")
    done = train(home, "name=two")
    assert "Traceback" not in done.stdout + done.stderr
    return home


@pytest.fixture(scope="module")
def cluster(home):
    """A head node that only those with its token may use."""
    with running_cluster(home, token=True) as cluster:
        yield cluster


def test_run_folder_is_complete_and_true(home):
    run = home / "runs" / "two"
    rows = metrics(home, "two")
    assert [row["model"] for row in rows] == ["findrec", "sasrec", "popularity"]
    assert all("full catalogue (60 items)" in row["protocol"] for row in rows)
    assert rows[0]["ndcg@10"] > 0.9 > 0.3 > rows[2]["ndcg@10"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == sorted(set(steps))
    assert "findrec" in (run / "report.html").read_text()
    ranks = pq.read_table(run / "ranks.parquet").to_pylist()
    mine = [r["rank"] for r in ranks if r["model"] == "findrec" and r["split"] == "test"]
    assert rows[0]["mrr"] == pytest.approx(sum(1 / r for r in mine) / len(mine))
    assert (run / "baselines" / "sasrec" / "checkpoints").is_dir()


def test_mlflow_mirrors_the_run(home):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "findrec"]
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    result = runs["two: findrec"]
    assert result.info.status == "FINISHED"
    assert result.data.params["training.epochs"] == "6"
    row = metrics(home, "two")[0]
    assert any(v == pytest.approx(row["ndcg@10"]) for k, v in result.data.metrics.items() if "test" in k)


@more
def test_a_warm_run_says_what_it_started_from(home):
    import mlflow

    train(
        home, "name=warm", "training.warm_start=two", "training.epochs=1", "evaluation.candidates=available"
    )
    row = metrics(home, "warm")[0]
    assert row["ndcg@10"] > 0.8
    first = json.loads((home / "runs/warm/metrics.jsonl").read_text().splitlines()[0])
    assert first["train/loss"] < 0.6 * math.log(60)  # a cold start knows nothing: log V
    assert "the items available at the target's time" in row["protocol"]
    recorded = {}
    for part in (".", "baselines/sasrec"):
        (state,) = (home / "runs/warm" / part).glob("checkpoints/step-*/state.json")
        recorded[part] = json.loads(state.read_text())["started_from"]
        assert str(home / "runs/two" / part / "checkpoints") in recorded[part]
    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    tags = [r.data.tags["started_from"] for r in runs if "started_from" in r.data.tags]
    assert sorted(tags) == sorted(recorded.values())


def test_a_start_that_cannot_be_warm_is_refused_before_ray(home, refused):
    assert "did you mean 'two'" in refused("name=cold", "training.warm_start=tow")
    assert "model.dim" in refused("name=cold", "training.warm_start=two", "model.dim=16")
    assert "this run itself" in refused("name=two", "training.warm_start=two", "--fresh")
    assert (home / "runs/two/checkpoints").is_dir()


def test_a_finished_run_serves_a_stream_of_events(home, monkeypatch):
    monkeypatch.setenv("FINDREC_HOME", str(home))
    stream = load_streaming(home / "runs" / "two")
    history = DataFolder.open(home / "data" / "planted").histories([0])
    state = stream.start(history.item[:-2].tolist(), history.timestamp[:-2].tolist())
    assert stream.recommend(state, 1)[0][0] == history.item[-2]
    stream.append(state, int(history.item[-2]), int(history.timestamp[-2]))
    assert stream.recommend(state, 1)[0][0] == history.item[-1]


def test_evaluating_again_gives_the_same_digits(home):
    run = home / "runs" / "two"
    before = (run / "metrics.json").read_bytes(), (run / "ranks.parquet").read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "findrec.cli", "evaluate", str(run)],
        env=environment(home),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (run / "metrics.json").read_bytes() == before[0]
    assert (run / "ranks.parquet").read_bytes() == before[1]


@more
def test_one_worker_gives_the_same_result_while_rays_ports_are_taken(home):
    with socket.socket() as dashboard, socket.socket() as gcs:
        for taken, port in ((dashboard, 8265), (gcs, 6379)):
            with contextlib.suppress(OSError):  # taken by somebody else already: just as well
                taken.bind(("127.0.0.1", port))
                taken.listen()
        train(home, "name=one", "cluster.workers=1", UNTRACKED)
    assert numbers(metrics(home, "one")) == pytest.approx(numbers(metrics(home, "two")), abs=1e-4)


def checkpoints(run: Run) -> set[Path]:
    """Committed ones of the run's own model."""
    return set(run.folder.glob("checkpoints/step-*/manifest.json"))


def wait_for_checkpoint(run: Run, known: set[Path]) -> None:
    def saved() -> bool:
        assert run.process.poll() is None, run.output[-4000:]
        return bool(checkpoints(run) - known)

    wait_until(saved, 200, "no new checkpoint")


def stop_at_checkpoint(cluster: Cluster, name: str, how: signal.Signals, code: int) -> str:
    """Start run `name`, send `how` to its process group at its next checkpoint; what it said."""
    run = Run(cluster, name, UNTRACKED)
    wait_for_checkpoint(run, checkpoints(run))
    os.killpg(run.process.pid, how)
    said = run.end(code, 100)
    assert not (run.folder / "metrics.json").exists()
    return said


def test_interrupted_and_killed_it_continues_and_ends_the_same(home, cluster):
    said = stop_at_checkpoint(cluster, "stopped", signal.SIGINT, 130)
    assert "the same command continues from the last checkpoint" in said
    assert "Traceback" not in said
    stop_at_checkpoint(cluster, "stopped", signal.SIGKILL, -9)
    run = Run(cluster, "stopped", UNTRACKED)
    for turn in (1, 2):  # of the workers, each at a step of its own
        run.wait_for("placing 2 workers", times=turn)
        run.reach(run.step() + 1)
        os.kill(run.workers()[turn - 1], signal.SIGKILL)
        run.wait_for("of 2 was lost: restart 1 of 3", times=turn)
        if turn == 1:
            wait_for_checkpoint(run, checkpoints(run))
    run.end()
    assert weights(run.folder) == weights(home / "runs" / "two")
    assert numbers(metrics(home, "stopped")) == pytest.approx(numbers(metrics(home, "two")), abs=1e-6)
    lines = (home / "runs" / "stopped" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "train/loss" in line]
    assert steps == sorted(set(steps))


def test_no_cluster_at_the_address_is_told(refused):
    said = refused("name=nobody", RAY_ADDRESS=f"127.0.0.1:{free_port()}")
    assert "no Ray cluster answers" in said


@more
def test_a_cluster_refuses_jobs_without_its_token(home, cluster):
    wrong = home / "wrong-token"
    wrong.write_text("0" * 64)
    stranger = cluster.join | {"RAY_AUTH_TOKEN_PATH": str(wrong)}
    done = train(home, "name=stranger", UNTRACKED, check=False, **stranger)
    assert done.returncode == 2
    assert "does not accept the token of this shell" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_configuration_under_the_same_name_is_refused(refused):
    assert "training.seed: 0 before, 5 now" in refused("name=two", "training.seed=5")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.epoch=3"], "did you mean 'training.epochs'?"),
        (["cluster.workers=3", "training.microbatches=2"], "must divide training.microbatches"),
        (["data.folder=data/nothing"], "data/nothing"),
        (["data.folder=null", "data.recipe=nothing", "name=no-recipe"], "called 'nothing'"),
        (["runs=/proc/nowhere"], "cannot write the run folder"),
    ],
)
def test_bad_input_gets_one_clear_message(refused, overrides, message):
    assert message in refused(*overrides)


@more
def test_a_placement_the_cluster_cannot_fulfil_is_refused(home, cluster):
    overrides = ["cluster.cpus_per_worker=500", "name=wide"]
    done = train(home, *overrides, check=False, **cluster.join)
    assert done.returncode == 2
    assert "the cluster has" in done.stderr
    assert "Traceback" not in done.stderr


def test_divergence_is_reported_once_and_not_retried(home, cluster):
    overrides = ["name=diverged", "training.optim.lr=1e30", "training.optim.clip_tower=0", UNTRACKED]
    done = train(home, *overrides, check=False, **cluster.join)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("is not finite at step") == 1
    assert [line[:7] for line in done.stderr.splitlines() if "is not finite" in line] == ["error: "]
    assert "Traceback" not in done.stderr
    assert "Reporting training result" not in done.stdout + done.stderr
    assert done.stdout.count("weights in the tower") == 1


def test_altered_shard_is_refused(refused, tmp_path):
    folder = planted_folder(tmp_path / "data", num_users=30)
    (shard, *_) = sorted((folder.path / "shards").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    assert shard.name in refused(f"data.folder={folder.path}", "name=altered")


@more
def test_submitted_to_a_running_cluster_as_a_job(home, cluster):
    """`ray job submit --working-dir . -- python -m findrec.train_dist ...`, from the checkout."""
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", cluster.dashboard]
    command += ["--working-dir", ".", "--", "python", "-m", "findrec.train_dist"]
    command += ["--config", str(home / "run.yaml"), "name=submitted", UNTRACKED]
    root = Path(__file__).parent.parent
    for _ in range(20):
        done = subprocess.run(
            command, cwd=root, env=cluster.environment, capture_output=True, text=True, timeout=600
        )
        if "No available agent" not in done.stderr + done.stdout:
            break
        time.sleep(3)  # the head node answers before its job agent is up
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert numbers(metrics(home, "submitted")) == pytest.approx(numbers(metrics(home, "two")), abs=1e-6)
    assert (home / "runs" / "submitted" / "checkpoints").is_dir()
