"""A file of a run or of its data is damaged at random: commands succeed or raise `FindRecError`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import planted_folder, planted_run

from findrec.config import dump_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.verify import check_folder
from findrec.errors import FindRecError
from findrec.evaluation.compare.compare import compare_runs
from findrec.evaluation.index.curve import measure_indexes
from findrec.evaluation.run import evaluate_run
from findrec.serving.recommender import Recommender
from findrec.training.checkpoints.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint
from findrec.training.checkpoints.validations import best_checkpoint_path, read_validations
from findrec.training.runs import read_run_config

TRIES = 20  # damages of each file


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, and `run` with two checkpoints, results and an index."""
    home = tmp_path_factory.mktemp("damage")
    folder = planted_folder(home / "data", num_users=30)
    planted_run(home / "run", folder, {"dim": 16}, {"epochs": 2}, baselines=["popularity"])
    evaluate_run(home / "run", show=False)
    with suppress(FindRecError):  # FAISS is optional
        measure_indexes(home / "run", ["Flat"], users=5)
    return home


def damages(rng: np.random.Generator, content: bytes) -> Iterator[bytes]:
    """Flipped bits, missing and repeated parts, zeros, and other content."""
    yield from (b"", b"\0" * len(content), b"[" * 5000, b"null", b"\xff\xfe{}")
    for _ in range(TRIES):
        changed = bytearray(content)
        kind, at = rng.integers(4), int(rng.integers(len(content)))
        size = int(rng.integers(1, 64))
        if kind == 0:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del changed[at:]
        elif kind == 2:
            changed[at : at + size] = rng.bytes(size)
        else:
            changed[at:at] = changed[at : at + size]
        yield bytes(changed)


def check_damages(file: Path, actions: list[Callable[[], object]], seed: int) -> None:
    content = file.read_bytes()
    for number, damaged in enumerate(damages(np.random.default_rng(seed), content)):
        file.write_bytes(damaged)
        for act in actions:
            try:
                act()
            except FindRecError:
                pass
            except BaseException as error:
                pytest.fail(f"damage {number} of {file.name}: {type(error).__name__}: {error}")
    file.write_bytes(content)


DATA_FILES = ["manifest.json", "items.parquet", "users.parquet", "features/text.safetensors"]
CHECKPOINT_FILES = ["manifest.json", "state.json", "tower.safetensors", "table-0-60.safetensors"]


def read_everything(data: Path) -> None:
    folder = DataFolder.open(data, verify=False)
    for modality in folder.modalities:
        folder.feature(modality).rows(torch.arange(folder.num_items + 1))
    for column in ("raw", "title", "available_from", "train_count"):
        folder.item_column(column)
    _ = folder.train_count, folder.available_from, folder.gone, folder.user_ids, folder.items
    folder.histories(np.arange(folder.num_users))


@pytest.mark.parametrize("name", [*DATA_FILES, "shards/events-00000.tar"])
def test_a_damaged_data_folder(home: Path, tmp_path: Path, name: str) -> None:
    data = shutil.copytree(home / "data", tmp_path / "data")
    check_damages(data / name, [lambda: check_folder(data), lambda: read_everything(data)], seed=1)


@pytest.mark.parametrize("name", DATA_FILES)
def test_recommending_from_a_damaged_data_folder(home: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(home, tmp_path / "home")
    move(tmp_path / "home")
    check_damages(
        tmp_path / "home/data" / name,
        [lambda: Recommender.load(tmp_path / "home/run").recommend(["3"])],
        seed=2,
    )


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
@pytest.mark.parametrize("which", [0, -1])
def test_a_damaged_checkpoint(home: Path, tmp_path: Path, name: str, which: int) -> None:
    root = shutil.copytree(home / "run" / "checkpoints", tmp_path / "checkpoints")
    path, other = list_checkpoints(root)[which], list_checkpoints(root)[-1 - which]

    def latest() -> None:
        newest = latest_checkpoint(root)
        assert newest in (path, other)

    actions = [latest, lambda: best_checkpoint_path(root), lambda: load_checkpoint(path)]
    check_damages(path / name, [*actions, lambda: load_checkpoint(path, verify=False)], seed=3)


RUN_FILES = ["config.yaml", "metrics.json", "ranks.parquet"]
INDEX_FILES = ["index/Flat/index.json", "index/Flat/index.faiss"]


@pytest.mark.parametrize("name", RUN_FILES + INDEX_FILES)
def test_a_damaged_run(home: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(home, tmp_path / "home")
    move(tmp_path / "home")
    run = tmp_path / "home/run"
    if not (run / name).exists():
        pytest.skip("FAISS is not installed")
    if name == "config.yaml":
        check_damages(run / name, [lambda: read_run_config(run)], seed=4)
    elif name in INDEX_FILES:
        check_damages(run / name, [lambda: Recommender.load(run, index="Flat").recommend(["3"])], seed=5)
    else:
        check_damages(run / name, [lambda: compare_runs([run], resamples=100)], seed=6)


def test_damaged_validations(home: Path, tmp_path: Path) -> None:
    run = shutil.copytree(home / "run", tmp_path / "run")
    line = '{"step": 2, "epoch": 1, "checkpoint": "x", "ndcg@10": 0.5, "recall@10": 0.5, "mrr": 0.5}\n'
    (run / "validations.jsonl").write_text(line * 3)
    check_damages(run / "validations.jsonl", [lambda: read_validations(run)], seed=7)


def move(home: Path) -> None:
    """Let the run in a copy of the folder read the copy of its data."""
    config = read_run_config(home / "run")
    data = config.data.model_copy(update={"folder": str(home / "data")})
    (home / "run" / "config.yaml").write_text(dump_config(config.model_copy(update={"data": data})))
