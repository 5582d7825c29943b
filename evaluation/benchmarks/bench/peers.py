"""Benchmark of training against SASRec of other libraries: targets per second, and time to a given quality.

All train on the same events with the same width, blocks, heads, dropout, length and learning rate, with AdamW
or Adam and the exact softmax loss; ours and RecTools with the same number of tokens per step. Every position
is a target, except in RecBole, which has one per prefix sample. RecTools uses a user's last L + 1 events; we
cut long histories into windows. After each epoch the validation targets are ranked among the full catalogue,
which is not timed. Items without training events are missing in RecTools' catalogue and count as misses.
Other settings are the defaults of each library. Ours has a repeat-consumption head and shuffles events of one
timestamp; "plain" has neither.

Each runs in a separate process with the same number of threads: the peers by
`evaluation/benchmarks/peers/worker.py` in their own environment, because they need older libraries.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench.memory import peak_rss_bytes
from bench.rows import UNIT, Row

from findrec.config import RunConfig, parse_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.validation import validate
from findrec.paths import checkout, home
from findrec.progress import progress, say
from findrec.timer import Timing
from findrec.training.build import build_tables, build_tower_model
from findrec.training.loop import run_training
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker

RATE_OP = f"training, {UNIT}"
PEERS = ("rectools", "recbole")
PLAIN = ("model.repeat=false", "data.shuffle_ties=false")  # features that the peers' SASRec does not have
OURS: dict[str, tuple[str, Sequence[str]]] = {
    "our sasrec": ("sasrec", ()),
    "our sasrec, plain": ("sasrec", PLAIN),
    "our findrec": ("findrec", ()),
}
BASELINE = "rectools sasrec"
NO_DEPENDENCIES = "recbole"  # pins a Ray of 2023 for its tuner, which we do not use


@dataclass(frozen=True)
class Settings:
    """Settings of all libraries."""

    width: int = 64
    length: int = 200
    blocks: int = 2
    heads: int = 2
    dropout: float = 0.2
    lr: float = 1e-3
    tokens: int = 3200  # positions of a step (ours, RecTools)
    prefix_batch: int = 256  # samples of a step (RecBole)
    level: float = 0.045  # validation NDCG@10 that ends a training
    limit_s: float = 300.0  # maximum training time
    threads: int = 2


@dataclass(frozen=True)
class Trained:
    """One training: for each epoch its seconds, targets and the validation NDCG@10 after it."""

    seconds: tuple[float, ...]
    targets: tuple[int, ...]
    ndcg: tuple[float, ...]
    peak_bytes: int  # largest resident set of the process, libraries included

    def timing(self) -> Timing:
        """Seconds per 1,000 targets of each epoch."""
        both = zip(self.seconds, self.targets, strict=True)
        return Timing(tuple(1000 * seconds / targets for seconds, targets in both))


def default_peers() -> Path:
    """`.venv-peers` in the checkout."""
    return (checkout() or home()) / ".venv-peers"


def setup_peers(peers: Path, requirements: Path) -> None:
    """Create the peers' environment from a requirements file; raises `FindRecError` if pip fails.

    PyTorch is installed first and alone: with other packages pip may choose a build with gigabytes of CUDA.
    """
    lines = [line.split("#")[0].strip() for line in requirements.read_text().splitlines()]
    wanted = [line for line in lines if line]
    first = [line for line in wanted if line.startswith("torch==")]
    bare = [line for line in wanted if line.startswith(NO_DEPENDENCIES)]
    rest = [line for line in wanted if line not in bare]
    pip = [str(_python(peers)), "-m", "pip", "install", "-q", "--progress-bar", "off"]
    steps = [[sys.executable, "-m", "venv", str(peers)], [*pip, *first], [*pip, *rest]]
    for command in [*steps, [*pip, "--no-deps", *bare]]:
        say(f"  {' '.join(command)}")
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise FindRecError(f"setting up {peers} failed at `{' '.join(command)}`:\n{done.stderr[-2000:]}")


def bench_peers(
    peers: Path, worker: Path, folder: DataFolder, settings: Settings, overrides: Sequence[str] = ()
) -> list[Row]:
    """Measure training rate and time to `settings.level` of the peers' SASRec and of our models.

    `overrides` apply to ours. In the second row of each, `median_s` is the training time until the validation
    NDCG@10 reached the level, or the total time if it did not, with the best NDCG@10 in `impl`. Without the
    peers' environment it prints a message and returns no rows.
    """
    if not _python(peers).is_file():
        say(
            f"No rows of other libraries: no environment {peers}. Create it (2 GB, some minutes) with "
            f"python evaluation/benchmarks/model.py --setup-peers --peers {peers}"
        )
        return []
    results: dict[str, Trained] = {}
    with (
        tempfile.TemporaryDirectory(prefix="findrec-peers-") as scratch,
        progress(f"trainings on {folder.path.name}", total=len(PEERS) + len(OURS), unit="systems") as bar,
    ):
        export_events(folder, Path(scratch) / "events.csv")
        for name, (model, keys) in OURS.items():
            results[name] = train_ours(model, folder.path, settings, [*keys, *overrides])
            bar.advance()
        for name in PEERS:
            results[f"{name} sasrec"] = train_peer(name, _python(peers), worker, Path(scratch), settings)
            bar.advance()
    return make_rows(results, folder.path.name, settings)


def make_rows(results: dict[str, Trained], data: str, settings: Settings) -> list[Row]:
    """The rows of `bench_peers`; ratios are relative to RecTools' SASRec."""
    shape = f"{data} L{settings.length} d{settings.width}"
    rates = {name: trained.timing() for name, trained in results.items()}
    until = {name: seconds_to(trained, settings.level) for name, trained in results.items()}
    rows = []
    for name, trained in results.items():
        best = f" (not reached: {max(trained.ndcg):.4f})" if until[name] is None else ""
        spent = until[name] or sum(trained.seconds)
        base = until[BASELINE] or sum(results[BASELINE].seconds)
        for op, impl, median_s, p10_s, ratio in (
            (RATE_OP, name, rates[name].median_s, rates[name].p10_s, rates[BASELINE].median_s),
            (f"training to NDCG@10 {settings.level}", name + best, spent, spent, base),
        ):
            peak = trained.peak_bytes
            rows.append(Row(op, shape, "float32", impl, BASELINE, median_s, p10_s, peak, ratio / median_s))
    return rows


def seconds_to(trained: Trained, level: float) -> float | None:
    """Training time until the validation NDCG@10 reached `level`; None if it never did."""
    for epoch, ndcg in enumerate(trained.ndcg):
        if ndcg >= level:
            return sum(trained.seconds[: epoch + 1])
    return None


def export_events(folder: DataFolder, path: Path) -> None:
    """Write all events as `user,item,position`, ascending; the last two of a user are its targets.

    Raises `FindRecError` for data whose targets are not the last two single events, as the peers require.
    """
    if bool((folder.test_start != folder.length - 1).any() | (folder.valid_start != folder.length - 2).any()):
        raise FindRecError(
            f"{folder.path} cannot be used: the peers hold out the last two events of every user, but some "
            "user has fewer than three events or a basket as a target; use data like ml-100k"
        )
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["user", "item", "position"])
        for user in range(folder.num_users):
            items = folder.histories([user]).item.tolist()
            writer.writerows((user, item, position) for position, item in enumerate(items))


def train_peer(name: str, python: Path, worker: Path, scratch: Path, settings: Settings) -> Trained:
    """Run a peer's training in its own environment; raises `FindRecError` with the end of its output."""
    result = scratch / f"{name}.json"
    command = [str(python), str(worker), name, str(scratch), str(result)]
    command += ["--settings", json.dumps(asdict(settings))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode or not result.is_file():
        raise FindRecError(f"{name} failed in {python}:\n{(done.stderr or done.stdout)[-2000:]}")
    return _trained(json.loads(result.read_text()))


def train_ours(name: str, data: Path, settings: Settings, overrides: Sequence[str] = ()) -> Trained:
    """Train one of our models in a separate process, like the peers."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return _trained(pool.apply(_train_ours, (name, str(data), settings, list(overrides))))


def our_config(name: str, settings: Settings, overrides: Sequence[str] = ()) -> RunConfig:
    """Our configuration with the peers' settings."""
    values = {
        "model.name": name,
        "model.dim": settings.width,
        "model.layers": settings.blocks,
        "model.heads": settings.heads,
        "model.dropout": settings.dropout,
        "data.max_length": settings.length,
        "training.microbatches": 1,
        "training.tokens": settings.tokens,
        "training.epochs": 1000,
        "training.save_every": 1000,
        "training.optim.lr": settings.lr,
        "training.optim.schedule": "constant",
        "training.optim.warmup": 0.0,
        "evaluation.mask_seen": "false",  # as the peers rank
        "cluster.workers": 1,
    }
    return parse_config({}, [*(f"{key}={value}" for key, value in values.items()), *overrides])


class _FinishedError(Exception):
    """The level or the time limit is reached."""


def _train_ours(name: str, data: str, settings: Settings, overrides: list[str]) -> dict[str, Any]:
    torch.set_num_threads(settings.threads)
    config = our_config(name, settings, overrides)
    folder = DataFolder.open(Path(data), verify=False)
    torch.manual_seed(config.training.seed)
    model = build_tower_model(config, folder)
    targets = int((folder.valid_start - 1).clip(min=0).sum())  # every training event but a user's first
    epochs: list[dict[str, float]] = []

    def after_epoch(values: dict[str, float]) -> None:
        seconds = targets / values["train/epoch_targets_per_s"]
        epochs.append({"seconds": seconds, "targets": targets, "ndcg": values["valid/ndcg@10"]})
        spent = sum(epoch["seconds"] for epoch in epochs)
        if values["valid/ndcg@10"] >= settings.level or spent > settings.limit_s:
            raise _FinishedError

    scratch = Path(tempfile.mkdtemp(prefix="findrec-bench-"))
    try:
        run_training(
            config,
            folder,
            scratch,
            PlainTower(model, config.training.optim),
            build_tables(config, folder),
            worker=Worker(),
            validate=validate,
            after_epoch=after_epoch,
        )
    except _FinishedError:
        pass
    finally:
        shutil.rmtree(scratch)
    return {"epochs": epochs, "peak_bytes": peak_rss_bytes()}


def _trained(result: dict[str, Any]) -> Trained:
    epochs = [epoch for epoch in result["epochs"] if epoch["targets"]]
    return Trained(
        seconds=tuple(epoch["seconds"] for epoch in epochs),
        targets=tuple(int(epoch["targets"]) for epoch in epochs),
        ndcg=tuple(epoch["ndcg"] for epoch in epochs),
        peak_bytes=int(result["peak_bytes"]),
    )


def _python(peers: Path) -> Path:
    return peers / "bin" / "python"
