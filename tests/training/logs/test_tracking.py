"""`metrics.jsonl` survives kills and resumes; the MLflow mirror is real sqlite and never stops a run."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from findrec.baseline_configs import PopularityConfig
from findrec.config import RunConfig, parse_config
from findrec.errors import FindRecError
from findrec.models.configs import choose_model
from findrec.paths import home
from findrec.train_dist import main
from findrec.training.logs import tracking
from findrec.training.logs.tracking import (
    Tracker,
    check_tracking,
    metric_name,
    refuse_split_tracking,
    tracking_uri,
)
from findrec.training.runs import open_run_folder, read_run_config


def make_config(uri: str | None, **training: int) -> RunConfig:
    return parse_config({"name": "t", "tracking": {"uri": uri, "experiment": "e@x"}, "training": training})


class TestUri:
    def test_everything_becomes_absolute(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
        assert tracking_uri(None) == f"sqlite:///{home()}/mlflow.db"
        assert tracking_uri("sqlite:///a/b.db") == f"sqlite:///{home()}/a/b.db"
        assert tracking_uri("c.db") == f"sqlite:///{home()}/c.db"
        assert tracking_uri("sqlite:////x/b.db") == "sqlite:////x/b.db"
        assert tracking_uri("http://host:5000") == "http://host:5000"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other:1")
        assert tracking_uri(None) == "http://other:1"

    def test_folder_store_is_refused(self) -> None:
        with pytest.raises(FindRecError, match=r"folder store.*sqlite"):
            tracking_uri("file:///tmp/mlruns")

    def test_sqlite_is_refused_on_two_machines(self, tmp_path: Path) -> None:
        config = make_config(f"sqlite:///{tmp_path}/m.db")
        with pytest.raises(FindRecError, match=r"2 machines.*tracking.uri=http"):
            refuse_split_tracking(config, 2)
        refuse_split_tracking(config, 1)
        refuse_split_tracking(make_config("http://host:5000"), 2)
        refuse_split_tracking(parse_config({"tracking": {"enabled": False}}), 2)


def test_metric_names() -> None:
    assert metric_name("valid/ndcg@10 (full)") == "valid/ndcg_at_10 _full_"


def test_disabled_tracker_writes_nothing(tmp_path: Path) -> None:
    config = parse_config({"tracking": {"enabled": False}})
    tracker = Tracker.start(config, tmp_path)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_sqlite_mirror_and_resume(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/store/m.db"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("name: t\n")

    tracker = Tracker.start(make_config(uri, epochs=3), run)
    for step in range(1500):  # more than one MLflow batch
        tracker.log(step, {"loss": torch.tensor(1.0 / (step + 1)), "note": "words are not metrics"})
    tracker.finish("KILLED")
    note = json.loads((run / "mlflow.json").read_text())
    client = MlflowClient(tracking_uri=uri)
    first = client.get_run(note["run_id"])
    assert first.info.status == "KILLED"
    assert first.data.params["training.epochs"] == "3"
    assert first.data.params["model.align.kind"] == "conditional"
    assert first.data.tags["run_folder"] == str(run)
    assert set(first.data.metrics) == {"loss"}
    history = client.get_metric_history(note["run_id"], "loss")
    assert {m.step: m.value for m in history} == pytest.approx({s: 1 / (s + 1) for s in range(1500)})

    (run / "metrics.json").write_text("{}")
    tracker = Tracker.start(make_config(uri, epochs=5), run)
    tracker.log(1500, {"ndcg@10": 0.5})
    tracker.tag("checkpoint", "elsewhere")
    tracker.finish()
    assert json.loads((run / "mlflow.json").read_text()) == note
    again = client.get_run(note["run_id"])
    assert again.info.status == "FINISHED"
    assert again.data.metrics["ndcg_at_10"] == 0.5
    assert again.data.tags["checkpoint"] == "elsewhere"
    assert again.data.tags["changed.training.epochs"] == "5"
    assert {a.path for a in client.list_artifacts(note["run_id"])} == {"config.yaml", "metrics.json"}
    assert len(client.search_runs([note["experiment_id"]])) == 1
    assert (tmp_path / "store" / "mlruns").is_dir()  # never below the working directory

    (run / "mlflow.json").write_text(json.dumps(note | {"run_id": "0" * 32}))
    tracker = Tracker.start(make_config(uri), run)  # the store was cleaned: a new run, no error
    tracker.finish()
    renewed = json.loads((run / "mlflow.json").read_text())["run_id"]
    assert client.get_run(renewed).info.status == "FINISHED"


def test_names_tell_models_apart_and_results_do_not_change_durations(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/m.db"
    client = MlflowClient(tracking_uri=uri)
    config = make_config(uri).model_copy(update={"name": "mine"})
    sasrec = config.model_copy(update={"model": choose_model({"name": "sasrec", "label": "small"})})
    run = tmp_path / "mine"
    folders = {
        run: config,
        run / "baselines" / "small": sasrec,
        run / "stages" / "first": config,
    }

    def saved(folder: Path) -> Any:
        return client.get_run(json.loads((folder / "mlflow.json").read_text())["run_id"])

    for folder, one in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        Tracker.start(one, folder).finish()
    names = [saved(folder).info.run_name for folder in folders]
    assert names == ["mine: findrec", "mine: small", "mine: findrec/first"]

    before = saved(run).info
    time.sleep(0.05)
    tracker = Tracker.add_results(config, run)
    tracker.log(7, {"test/mrr": 0.5})
    tracker.finish()
    after = saved(run)
    assert after.data.metrics == {"test/mrr": 0.5}
    assert (after.info.start_time, after.info.end_time) == (before.start_time, before.end_time)
    assert after.info.status == "FINISHED"

    popular = run / "baselines" / "popularity"
    popular.mkdir()
    tracker = Tracker.add_results(config, popular, PopularityConfig())
    tracker.log(0, {"test/mrr": 0.25})
    tracker.finish()
    found = saved(popular)
    assert (found.info.run_name, found.info.status) == ("mine: popularity", "FINISHED")
    assert found.data.metrics == {"test/mrr": 0.25}
    assert found.data.params["model.name"] == "popularity"
    assert not any(key.startswith("training.") for key in found.data.params)


def test_system_metrics_of_the_machine_are_mirrored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    uri = f"sqlite:///{tmp_path}/m.db"
    client = MlflowClient(tracking_uri=uri)

    def measured() -> dict[str, float]:
        note = tmp_path / "mlflow.json"
        if not note.is_file():
            return {}
        result: dict[str, float] = client.get_run(json.loads(note.read_text())["run_id"]).data.metrics
        return result

    tracker = Tracker.start(make_config(uri), tmp_path, watch=True)
    end = time.monotonic() + 30
    while "system/cpu_utilization_percentage" not in measured() and time.monotonic() < end:
        time.sleep(0.2)
    tracker.finish()
    assert measured()["system/system_memory_usage_megabytes"] > 0


def test_one_who_joins_adds_to_a_run_and_does_not_end_it(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/m.db"
    early = Tracker.join(make_config(uri), tmp_path)  # there is nothing to join yet
    early.log(1, {"lost": 1.0})
    early.finish()
    assert not (tmp_path / "mlflow.json").exists()
    tracker = Tracker.start(make_config(uri), tmp_path)
    tracker.finish("KILLED")
    joined = Tracker.join(make_config(uri), tmp_path)
    joined.log(7, {"valid/ndcg@10": 0.25})
    joined.finish()
    run = MlflowClient(tracking_uri=uri).get_run(json.loads((tmp_path / "mlflow.json").read_text())["run_id"])
    assert run.data.metrics == {"valid/ndcg_at_10": 0.25}
    assert run.info.status == "KILLED"


def test_dead_server_costs_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = time.monotonic()
    tracker = Tracker.start(make_config(f"http://127.0.0.1:{port}"), tmp_path)
    for step in range(200):
        tracker.log(step, {"loss": 1.0})
    assert time.monotonic() - start < 1
    tracker.finish()
    assert time.monotonic() - start < tracking.FINISH_S
    lines = [line for line in capsys.readouterr().out.splitlines() if "MLflow" in line]
    assert len(lines) == 1
    assert "The run goes on" in lines[0]


def test_hanging_server_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "FINISH_S", 1.0)
    with socket.socket() as silent:  # accepts connections, never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        tracker = Tracker.start(make_config(f"http://127.0.0.1:{silent.getsockname()[1]}"), tmp_path)
        tracker.log(1, {"loss": 1.0})
        tracker.finish()
        assert time.monotonic() - start < 3
    assert "no answer within" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["a?b.db", "a%20b/m.db", "folder"])
def test_a_store_that_mlflow_cannot_open_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(FindRecError, match=r"the MLflow store .* Set tracking.uri"):
        check_tracking(make_config(f"sqlite:///{tmp_path}/{path}"))
    check_tracking(make_config(f"sqlite:///{tmp_path}/100%.db"))


def test_a_folder_store_of_the_environment_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///tmp/mlruns")
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    for more in ([], ["--dry-run"]):
        assert main(["--config", "demo", *more]) == 2
        said = capsys.readouterr().err
        assert "MLFLOW_TRACKING_URI='file:///tmp/mlruns' is a folder store" in said


def test_credentials_are_not_mirrored(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri, run = f"sqlite:///{tmp_path}/m.db", tmp_path / "run"
    config = parse_config(
        {"runs": str(tmp_path), "name": "run", "tracking": {"uri": uri}}
        | {"data": {"folder": "https://ann:pass@host/d?token=abc"}}
    )
    assert open_run_folder(config) == run
    assert (run / "config.yaml").stat().st_mode & 0o777 == 0o600
    assert read_run_config(run).data.folder == "https://ann:pass@host/d?token=abc"
    tracker = Tracker.start(config, run)
    tracker.tag("started_from", "s3://key:pass@bucket/x")
    tracker.finish()
    client = MlflowClient(tracking_uri=uri)
    found = client.get_run(json.loads((run / "mlflow.json").read_text())["run_id"])
    assert found.data.params["data.folder"] == "https://***@host/d?token=***"
    assert found.data.tags["started_from"] == "s3://***@bucket/x"
    (copy,) = (tmp_path / "mlruns").rglob("config.yaml")
    assert "https://***@host/d?token=***" in copy.read_text()
