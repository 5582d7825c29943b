"""`findrec evaluate` writes what later steps read, and mirrors every row to MLflow."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import data, run, trained

from findrec.config import dump_config
from findrec.evaluation.run import evaluate_run
from findrec.training.runs import read_run_config

__all__ = ["data", "run", "trained"]


def test_every_model_and_baseline_has_an_mlflow_run(run: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/m.db"
    config = read_run_config(run)
    tracking = config.tracking.model_copy(update={"enabled": True, "uri": uri})
    tree = config.model_copy(update={"tracking": tracking}).model_dump(mode="json")
    tree["evaluation"]["baselines"] = ["popularity", {"name": "cooccurrence", "label": "near"}]
    (run / "config.yaml").write_text(dump_config(type(config).model_validate(tree)))
    for _ in range(2):  # a second evaluation adds to the same runs
        rows = {row["model"]: row for row in evaluate_run(run, show=False)["test"]}
    client = MlflowClient(tracking_uri=uri)
    found = {one.info.run_name: one for one in client.search_runs(["1"])}
    assert set(found) == {f"{config.name}: {name}" for name in (config.model.title, "popularity", "near")}
    for name, row in rows.items():
        stored = found[f"{config.name}: {name}"].data.metrics
        assert stored["test/ndcg_at_10"] == pytest.approx(row["ndcg@10"])
