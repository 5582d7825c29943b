"""Trains a run, kills it with all its processes after a checkpoint, and starts it again to the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from bench.gpu.setting import Figures, Setting, kill_tree, row

from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.paths import checkout
from findrec.training.checkpoints.checkpoint import checkpoint_folder, list_checkpoints
from findrec.training.checkpoints.manifest import MANIFEST

POLL_S = 0.2
NAME = "resumed"


def bench_resume(setting: Setting) -> Iterator[Figures]:
    """A small run with planted answers: the next item follows from the last one, so NDCG must become high."""
    with tempfile.TemporaryDirectory(prefix="findrec-") as folder:
        home = Path(folder)
        _plant(home, setting)
        checkpoints = checkpoint_folder(home / "runs" / NAME)
        start = time.monotonic()
        with (setting.out / "run-1.log").open("w") as log:
            process = _start(home, log)
            while not (committed := _committed(checkpoints)):
                if process.poll() is not None:
                    raise FindRecError(f"the run ended before its first checkpoint: see {log.name}")
                time.sleep(POLL_S)
            kill_tree(process.pid)
            process.wait()
        begun = _first_line(home)
        seconds = time.monotonic() - start
        yield row("to the first checkpoint, then killed", "", seconds, "s", note=committed[-1])
        start = time.monotonic()
        with (setting.out / "run-2.log").open("w") as log:
            code = _start(home, log).wait()
        text = (setting.out / "run-2.log").read_text(errors="replace")
        if code:
            raise FindRecError(f"the second start ended with code {code}: see {log.name}")
        metrics = json.loads((home / "runs" / NAME / "metrics.json").read_text())
        device = "cuda" if "on cuda" in text else "cpu"
        if device != setting.device:
            raise FindRecError(f"the run trained on {device}, not on {setting.device}: see {log.name}")
        if _first_line(home) != begun:  # it has times, so a run from the start would write another
            raise FindRecError(f"the second start did not continue from {committed[-1]}: see {log.name}")
        yield row("continued to the end", "", time.monotonic() - start, "s", note=f"on {device}")
        yield row("NDCG@10 of the resumed run", "", _ndcg(metrics), "")


def _plant(home: Path, setting: Setting) -> None:
    rng = np.random.default_rng(0)
    num_items, num_users = (60, 150) if setting.small else (2000, 4000)
    follows = rng.permutation(num_items)
    histories = []
    for _ in range(num_users):
        items = [int(rng.integers(num_items))]
        for _ in range(int(rng.integers(8, 40))):
            items.append(int(follows[items[-1]]))
        histories.append(np.array(items) + 1)
    data = write_data_folder(
        home / "data", histories, features={"text": rng.normal(size=(num_items, 16)).astype(np.float32)}
    )
    tree: dict[str, Any] = {
        "name": NAME,
        "data": {"folder": str(data.path), "max_length": 40},
        "model": {"dim": 32 if setting.small else 64},
        "training": {"epochs": 3 if setting.small else 6, "microbatches": 2, "optim": {"lr": 5e-3}}
        | {"tokens": 512 if setting.small else 8192},
        "evaluation": {"baselines": ["popularity"], "samples": 0},
        "tracking": {"enabled": False},
    }
    if setting.device == "cpu":
        tree["cluster"] = {"workers": 1, "threads": 1, "gpu": False}
    (home / "run.yaml").write_text(yaml.safe_dump(tree))


def _start(home: Path, log: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "FINDREC_HOME": str(home), "PYTHONPATH": str(checkout())}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "findrec.train_dist", "--config", str(home / "run.yaml")]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
    )


def _committed(checkpoints: Path) -> list[str]:
    if not checkpoints.is_dir():
        return []
    return [path.name for path in list_checkpoints(checkpoints) if (path / MANIFEST).is_file()]


def _first_line(home: Path) -> str:
    return (home / "runs" / NAME / "metrics.jsonl").read_text().splitlines()[0]


def _ndcg(metrics: Any) -> float:
    return float(next(one for one in metrics["test"] if one["model"] == "findrec")["ndcg@10"])
