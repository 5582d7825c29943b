"""Every command refuses data that was exchanged under a finished run, before it writes anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted import NUM_ITEMS, planted_folder, planted_run

from findrec.cli.app import main
from findrec.config import dump_config, parse_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.run import evaluate_run
from findrec.evaluation.validation import validate
from findrec.files import sha256_file
from findrec.serving.recommender import Recommender
from findrec.training.build import build_tables, build_tower_model
from findrec.training.checkpoints.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from findrec.training.loop import run_training
from findrec.training.runs import read_run_config
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("identity")
    folder = planted_folder(home / "data", num_users=40)
    return Path(planted_run(home / "run", folder, training={"epochs": 1}))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run and its data that a test may change."""
    shutil.copytree(trained.parent / "data", tmp_path / "data")
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(trained.parent / "data"), str(tmp_path / "data")))
    return run


def change_manifest(data: Path, **update: object) -> None:
    tree = json.loads((data / "manifest.json").read_text()) | update
    tree["files"] = {name: sha256_file(data / name) for name in tree["files"]}
    (data / "manifest.json").write_text(json.dumps(tree))


def with_other_items(data: Path) -> None:
    """As many items with other ids."""
    items = pq.read_table(data / "items.parquet")
    raw = pa.array([f"other {v}" for v in range(NUM_ITEMS)])
    pq.write_table(items.set_column(items.column_names.index("raw"), "raw", raw), data / "items.parquet")
    change_manifest(data)


def with_more_items(data: Path) -> None:
    features = {n: np.ones((NUM_ITEMS + 5, w)) for n, w in (("text", 12), ("image", 8))}
    shutil.rmtree(data)
    write_data_folder(data, [[1, 2, 3, 4]] * 9, features=features, num_items=NUM_ITEMS + 5)


def with_other_events(data: Path) -> None:
    shutil.rmtree(data)
    planted_folder(data, num_users=40, seed=7)


def with_another_split(data: Path) -> None:
    change_manifest(data, split={"kind": "per_user_ratio", "ratio": [5, 2, 3], "unit": "event"})


def with_other_vectors(data: Path) -> None:
    file = data / "features" / "text.safetensors"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(bytes(content))
    change_manifest(data)


EXCHANGES: dict[Callable[[Path], None], str] = {
    with_other_items: "the items are others",
    with_more_items: "the model has 60 items, the data 65",
    with_other_events: "the events",
    with_another_split: "the split differ",
    with_other_vectors: "the precomputed vectors differ",
}
COMMANDS = {
    "recommend": ["--user", "3"],
    "evaluate": [],
    "suite": ["--suite", "length"],
    "inspect": ["--user", "3"],
    "index": ["--factory", "Flat"],
}


def contents(folder: Path) -> dict[str, str]:
    return {str(path): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_other_items(
    run: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "index":
        pytest.importorskip("faiss")
    (run / "metrics.json").write_text("{}")
    before = contents(run)
    with_other_items(run.parent / "data")
    name = "evaluate" if command == "suite" else command
    assert main([name, str(run), *COMMANDS[command]]) == 2
    error = capsys.readouterr().err
    assert "is not the data that" in error
    assert "the items are others" in error
    assert contents(run) == before


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_every_exchange_is_seen(run: Path, exchange: Callable[[Path], None]) -> None:
    assert len(Recommender.load(run).recommend(["3"])[0].items) == 10
    exchange(run.parent / "data")
    for act in (lambda: Recommender.load(run).recommend(["3"]), lambda: evaluate_run(run, show=False)):
        with pytest.raises(FindRecError, match=EXCHANGES[exchange]):
            act()
    assert not (run / "metrics.json").exists()


def test_a_grown_folder_with_the_same_items_is_accepted(run: Path) -> None:
    data = run.parent / "data"
    before = DataFolder.open(data)
    histories = [[*before.histories([user]).item.tolist(), 1] for user in range(before.num_users)]
    features = {n: np.ones((NUM_ITEMS, before.feature(n).dim)) for n in before.modalities}
    shutil.rmtree(data)
    write_data_folder(data, histories, features=features, num_items=NUM_ITEMS)
    change_manifest(data, parent={"manifest_sha256": "0" * 64, "num_items": NUM_ITEMS})
    assert len(Recommender.load(run).recommend(["3"])[0].items) == 10
    assert evaluate_run(run, show=False)["test"][0]["cases"] == before.num_users


def test_checkpoints_of_earlier_versions_are_compared_by_what_they_record(run: Path) -> None:
    path = list_checkpoints(run / "checkpoints")[-1]
    saved = load_checkpoint(path)
    parts = {k: v for k, v in saved.state.catalogue.items() if k in ("items", "event_types", "encoders")}
    tables = {name: dict(table) for name, table in saved.tables.items()}

    def save_with(catalogue: dict[str, object]) -> None:
        save_checkpoint(
            run / "checkpoints",
            replace(saved.state, catalogue=catalogue),
            tower=saved.tower,
            optimizer_state=saved.optimizer_state,
            tables=tables,
        )

    save_with(parts)
    with_other_events(run.parent / "data")
    assert Recommender.load(run).recommend(["3"])
    with_other_items(run.parent / "data")
    with pytest.raises(FindRecError, match="the items are others"):
        Recommender.load(run).recommend(["3"])
    save_with({})
    assert Recommender.load(run).recommend(["3"])
    with_more_items(run.parent / "data")
    with pytest.raises(FindRecError, match="the model has 60 items, the data 65"):
        Recommender.load(run).recommend(["3"])


@pytest.mark.parametrize("other", [{"dim": 16}, {"modalities": ["text"]}, {"name": "sasrec"}])
def test_the_checkpoint_of_another_model_is_refused_with_one_message(
    run: Path, other: dict[str, object]
) -> None:
    config = read_run_config(run)
    tree = config.model_dump(mode="json")
    tree["model"] = other if "name" in other else tree["model"] | other
    changed = parse_config(tree)
    folder = DataFolder.open(run.parent / "data")
    tower = PlainTower(build_tower_model(changed, folder), changed.training.optim)
    before = contents(run)

    def train() -> None:
        run_training(
            changed,
            folder,
            run / "checkpoints",
            tower,
            build_tables(changed, folder),
            worker=Worker(),
            validate=validate,
        )

    with pytest.raises(FindRecError, match="was saved by another model"):
        train()
    (run / "config.yaml").write_text(dump_config(changed))
    with pytest.raises(FindRecError, match="was saved by another model"):
        Recommender.load(run).recommend(["3"])
    assert contents(run / "checkpoints") == {
        path: digest for path, digest in before.items() if "/checkpoints/" in path
    }
