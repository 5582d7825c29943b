"""A command killed before any change on disk completes when it is run again, and leaves nothing behind.

Its whole process group is killed (SIGKILL) at moments spread over all changes of files that it makes.
"""

from __future__ import annotations

import hashlib
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from clusters import processes_of, wait_until
from killed import hidden_files, run_until
from planted import planted_folder, planted_run
from small_recipe import contents

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

KILLS = 3
TIMED = r"/report\.html$|/index/curve\.|/index/[^/]+/index\.json"
RECIPE = """
name: shop
title: A shop
licence: none
source: made here
sources:
  files:
    - path: .
      files:
        log: {member: log.csv}
        items: {member: items.csv}
events: SELECT * FROM {log}
items: SELECT item, title, title AS text FROM {items}
features:
  ready: {image: {path: vectors.npy, ids: items.csv, id_column: item}}
"""
TRAIN = """
import sys
from pathlib import Path
import torch
from findrec.config import load_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.validation import validate
from findrec.training.build import build_tables, build_tower_model
from findrec.training.loop import run_training
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker
class Silent:
    def log(self, step, epoch, values):
        pass
run = Path("runs/tiny")
config, folder = load_config(run / "config.yaml"), DataFolder.open("data")
torch.manual_seed(0)
tower = PlainTower(build_tower_model(config, folder), config.training.optim)
tables = build_tables(config, folder)
checkpoints = run / "checkpoints"
run_training(config, folder, checkpoints, tower, tables, worker=Worker(), validate=validate, log=Silent())
"""


def shop(home: Path) -> None:
    """A recipe with events, descriptions and ready vectors of 40 items."""
    rng = np.random.default_rng(0)
    (home / "shop.yaml").write_text(RECIPE)
    rows = [f"u{rng.integers(30)},{rng.integers(40)},{1_700_000_000 + n}" for n in range(600)]
    (home / "log.csv").write_text("\n".join(["user,item,timestamp", *rows]) + "\n")
    items = [f"{n},thing {n}" for n in range(40)]
    np.save(home / "vectors.npy", rng.normal(size=(40, 5)).astype(np.float32))
    (home / "items.csv").write_text("\n".join(["item,title", *items]) + "\n")


def run_folder(home: Path) -> None:
    """A trained run and its data."""
    run = planted_run(home / "runs" / "tiny", planted_folder(home / "data", num_users=60))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(home / "data"), "data"))
    np.save(home / "vectors.npy", np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32))


def untrained(home: Path) -> None:
    """A run that has not begun, with frequent checkpoints."""
    run_folder(home)
    shutil.rmtree(home / "runs" / "tiny" / "checkpoints")
    (home / "train.py").write_text(TRAIN)


COMMANDS = {
    "prepare": (shop, ["findrec.cli", "prepare", "shop.yaml", "--folder", "data/shop"]),
    "features": (
        run_folder,
        ["findrec.cli", "features", "data", "--force", "--vectors", "vectors.npy", "--modality", "audio"],
    ),
    "evaluate": (run_folder, ["findrec.cli", "evaluate", "tiny"]),
    "index": (run_folder, ["findrec.cli", "index", "tiny"]),
    "save": (untrained, ["train.py"]),
}


def result(home: Path) -> dict[str, str]:
    """Digests of the files that a command leaves; of files with measured times only their names."""
    # Features that replace others are written under a second name.
    files = {name.replace("-2.", "."): data.replace(b"-2.", b".") for name, data in contents(home).items()}
    return {
        name: "" if re.search(TIMED, name) else hashlib.sha256(data).hexdigest()
        for name, data in files.items()
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_completes_when_it_is_run_again(name: str, tmp_path: Path) -> None:
    make, command = COMMANDS[name]
    start, home = tmp_path / "start", tmp_path / "home"
    start.mkdir()
    make(start)
    shutil.copytree(start, home)
    changes = run_until(0, home, command)
    expected = result(home)
    killed = 0
    for moment in sorted(random.Random(0).sample(range(1, changes + 1), min(KILLS, changes))):
        shutil.rmtree(home)
        shutil.copytree(start, home)
        killed += run_until(moment, home, command) == 0
        wait_until(lambda: not processes_of(home, ""), 20, "processes are left")
        run_until(0, home, command)
        assert result(home) == expected, f"killed before change {moment} of {changes}"
        assert hidden_files(home) == [], f"killed before change {moment} of {changes}"
        wait_until(lambda: not processes_of(home, ""), 20, "processes are left")
    assert killed > 0  # a busy machine may make fewer changes, and then ends before the last moment
