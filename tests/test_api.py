"""FindRec from Python: tables in, a trained run, lists out, as the example in `findrec.api` shows."""

import datetime
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import findrec
from findrec import train_dist
from findrec.config import RunConfig
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    return tmp_path


def sales(times: str = "seconds") -> pd.DataFrame:
    """40 customers who buy along a ring of 12 products."""
    rows = []
    for customer in range(40):
        for step in range(8):
            product = (customer + step) % 12
            rows.append((f"c{customer}", f"SKU-{product}", 1_700_000_000 + 3600 * step))
    table = pd.DataFrame(rows, columns=["user", "item", "timestamp"])
    if times == "times":
        table["timestamp"] = pd.to_datetime(table["timestamp"], unit="s")
    return table


def products() -> pd.DataFrame:
    rows = [(f"SKU-{v}", f"product {v}", 1.5 * v) for v in range(12)]
    return pd.DataFrame(rows, columns=["item", "title", "price"])


def test_importing_it_is_light():
    code = (
        "import sys, findrec; findrec.load; findrec.train; "
        "heavy = {'ray', 'deepspeed', 'mlflow', 'torch'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'recommend'"):
        findrec.recommend  # noqa: B018


def test_tables_of_all_kinds_give_the_same_data(home: Path):
    by_seconds = findrec.prepare(sales(), products(), name="one")
    assert (by_seconds.num_users, by_seconds.num_items, by_seconds.manifest.num_events) == (40, 12, 320)
    assert by_seconds.path == home / "data" / "one"
    assert by_seconds.items.column("title").to_pylist()[0].startswith("product")
    assert "price" in by_seconds.items.column_names
    arrow = pa.Table.from_pandas(sales("times"))
    by_times = findrec.prepare(arrow, pa.Table.from_pandas(products()), name="two")
    assert by_times.manifest.events_sha256 == by_seconds.manifest.events_sha256
    again = findrec.prepare(sales(), products(), name="one")
    assert again.manifest == by_seconds.manifest
    with pytest.raises(FindRecError, match="made from another recipe"):
        findrec.prepare(sales().iloc[:-1], products(), name="one")
    fewer = findrec.prepare(sales().iloc[:-1], products(), name="one", force=True)
    assert fewer.manifest.num_events == 319
    without_first = sales().iloc[1:]
    assert findrec.prepare(without_first, name="three", min_events=8).num_users == 39


@pytest.mark.parametrize(
    ("events", "keys", "message"),
    [
        (
            sales().rename(columns={"item": "items"}),
            {"name": "x"},
            "events: no column 'item'; did you mean 'items'",
        ),
        (sales().assign(item=1.5), {"name": "x"}, "'item' has floating-point numbers, which are no ids"),
        (sales().assign(timestamp="noon"), {"name": "x"}, "'timestamp' of type .* has no times"),
        (sales().assign(timestamp=[datetime.date(2024, 1, 1)] * 320), {}, "give the data set a name"),
        ([("u", "i", 1)], {"name": "x"}, "expected a table of pandas, polars or pyarrow, not list"),
        (sales(), {"name": "x", "splits": {}}, "splits"),
        ("ml-100k", {"name": "x"}, "a recipe is complete"),
        ("ml-100", {}, "no datasets file called 'ml-100'"),
    ],
)
def test_mistakes_are_named(home: Path, events: object, keys: dict, message: str):
    with pytest.raises(FindRecError, match=message):
        findrec.prepare(events, **keys)
    assert not (home / "data" / "x").exists()


def test_the_model_of_a_file_may_be_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained = []

    def train_run(config: RunConfig, fresh: bool) -> Path:
        trained.append(config)
        return tmp_path

    monkeypatch.setattr(train_dist, "train_run", train_run)
    (tmp_path / "run.yaml").write_text("model: sasrec\n")
    findrec.train(tmp_path / "run.yaml", model={"dim": 32})
    assert (trained[0].model.name, trained[0].model.dim) == ("sasrec", 32)


@pytest.mark.ray
def test_a_run_from_tables_to_lists(home: Path):
    data = findrec.prepare(sales(), products(), name="ring")
    run = findrec.train(
        "shop",
        data=data,
        name="ring",
        model={"name": "sasrec", "dim": 16},
        training={"epochs": 30, "tokens": 400, "microbatches": 1, "optim": {"lr": 0.01}},
        cluster={"workers": 1, "threads": 1},
        evaluation={"baselines": ["popularity"]},
        **{"tracking.enabled": False},
    )
    assert (run.folder, run.config.model.name) == (home / "runs" / "ring", "sasrec")
    rows = {row["model"]: row for row in run.metrics()}
    assert rows["sasrec"]["ndcg@10"] > 0.9 > rows["popularity"]["ndcg@10"]
    assert run.report.is_file()
    ring = findrec.load("ring")
    (listed,) = ring.recommend(histories=[["SKU-3", "SKU-4", "SKU-5"]], k=1)
    assert (listed.items, listed.titles) == (["SKU-6"], ["product 6"])
    assert ring.recommend("c3", k=1, at=1_700_000_000 + 3600 * 3)[0].items == ["SKU-7"]
    assert isinstance(ring.folder, DataFolder)
    np.testing.assert_array_equal(findrec.load(run.folder).item_vectors(), run.recommender().item_vectors())
    with pytest.raises(FindRecError, match="has no metrics of the split 'tests'"):
        run.metrics("tests")
    with pytest.raises(FindRecError, match="epoch"):
        findrec.train("shop", data=data, training={"epoch": 3})
    assert json.loads((run.folder / "metrics.json").read_text())["test"] == run.metrics()
