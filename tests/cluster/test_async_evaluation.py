"""The evaluator beside training on a real cluster: killed, it changes no digit and stops nothing."""

import os
import signal
from pathlib import Path

import pytest
from clusters import Run, processes_of, running_cluster, wait_until
from planted import planted_home

from findrec.cluster.plan.machines import Machine
from findrec.config import parse_config
from findrec.training.checkpoints.validations import read_validations

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    baselines = "evaluation.baselines=[popularity, sasrec]"
    home = planted_home(tmp_path_factory.mktemp("home"), baselines, epochs=12, keep=1)
    with running_cluster(home) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def inline(cluster):
    run = Run(cluster, "inline")
    run.end()
    return run


def results(run):
    return (run.folder / "metrics.json").read_bytes()


def test_it_is_killed_and_changes_no_digit(cluster, inline):
    run = Run(cluster, "killed", "evaluation.evaluator=async")
    run.wait_for("validation of findrec, epoch 1:")
    (victim,) = processes_of(cluster.home, "ray::Evaluator")
    os.kill(victim, signal.SIGKILL)
    output = run.end()
    assert output.count("WARNING: the evaluator was lost") == 1
    assert "restart 1" not in output  # of the workers
    assert results(run) == results(inline)
    for training in (run.folder, run.folder / "baselines" / "sasrec"):
        assert [one.epoch for one in read_validations(training)] == list(range(1, 13))


def test_a_run_that_is_stopped_goes_on_with_what_is_due(cluster, inline):
    run = Run(cluster, "stopped", "evaluation.evaluator=async")
    run.wait_for("validation of findrec, epoch 2:")
    run.process.send_signal(signal.SIGTERM)
    run.end(code=75)
    wait_until(lambda: not processes_of(cluster.home, "ray::Evaluator"), 30, "the evaluator stays")
    again = Run(cluster, "stopped", "evaluation.evaluator=async")
    again.end()
    assert results(again) == results(inline)


def test_its_validations_are_in_mlflow(cluster, inline):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{cluster.home}/mlflow.db")
    runs = {run.info.run_name.removesuffix(": findrec"): run for run in client.search_runs(["1"])}
    assert runs["killed"].info.status == "FINISHED"
    histories = {
        name: {m.step: m.value for m in client.get_metric_history(runs[name].info.run_id, "valid/ndcg_at_10")}
        for name in ("inline", "killed")
    }
    assert histories["killed"] == histories["inline"]
    assert len(histories["killed"]) == 12


@pytest.mark.parametrize(
    ("gpus", "overrides", "training", "unused"),
    [
        (0, [], True, False),
        (3, [], True, True),  # two for the workers
        (2, [], True, False),
        (2, [], False, True),  # they have done with them
        (1, [], True, True),  # too few for the workers, who take none
        (3, ["cluster.gpu=false"], True, False),
    ],
)
def test_it_takes_a_gpu_that_no_worker_needs(monkeypatch, gpus, overrides, training, unused):
    import ray

    from findrec.cluster import async_evaluation
    from findrec.cluster.plan import machines

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": float(gpus)})
    for module in (machines, async_evaluation):
        monkeypatch.setattr(module, "built_for_gpus", lambda: True)
    monkeypatch.setattr(
        async_evaluation, "cluster_machines", lambda: [Machine("here", 8, 1 << 34, gpus=gpus)]
    )
    evaluation = async_evaluation.AsyncEvaluation(
        parse_config({"cluster": {"workers": 2}}, overrides), "data", Path("run")
    )
    evaluation._training = training
    assert evaluation._has_unused_gpu() is unused
