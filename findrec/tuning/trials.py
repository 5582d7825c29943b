"""The trials of a tuning as files: each is a run folder with the values that were tried.

A trial is named by its values, so a trial that was interrupted is found again and continues from its
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from findrec.config import RunConfig, parse_config
from findrec.errors import FindRecError
from findrec.files import read_json, replacing
from findrec.training.checkpoints.validations import SELECTS
from findrec.training.logs.metrics_log import read_lines
from findrec.tuning.space import with_values

TRIALS = "trials"
_FILE = "trial.json"
_VALID = f"valid/{SELECTS}"


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        name: the name of its run folder below `trials/`.
        values: what was tried, by dotted key.
        started: when it was first started, in Unix seconds.
        ended: how it ended: `trained`, `stopped` early, `diverged` or `failed`; None while it has not.
        best: the best validation metric; None before the first validation.
        epochs: the epochs that were trained and validated.
    """

    name: str
    values: Mapping[str, Any]
    started: float
    ended: str | None
    best: float | None
    epochs: int


def trial_name(values: Mapping[str, Any]) -> str:
    """The name of the trial of these values."""
    text = json.dumps(dict(values), sort_keys=True)
    return f"trial-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def trial_config(tree: Mapping[str, Any], values: Mapping[str, Any], tuning: Path) -> RunConfig:
    """The configuration of a trial of the configuration `tree`, whose folder is below `tuning`.

    A trial is trained by one process, as results do not depend on the number of workers, and validated
    between its epochs. Raises `FindRecError` if the values cannot be combined.
    """
    own = {
        "name": trial_name(values),
        "runs": str(tuning / TRIALS),
        "cluster.workers": 1,
        "cluster.min_workers": None,
        "evaluation.evaluator": "inline",
        "evaluation.baselines": [],
        "tracking.enabled": False,
        "training.checkpoint_store": None,  # where all tunings would share the folder of a trial's values
    }
    return parse_config(with_values(with_values(tree, values), own), source="a trial")


def write_trial(folder: Path, values: Mapping[str, Any], ended: str | None = None) -> None:
    """Record the values of a trial in its folder, and how it ended."""
    path = folder / _FILE
    folder.mkdir(parents=True, exist_ok=True)
    started = read_json(path)["started"] if path.is_file() else time.time()
    with replacing(path) as part:
        part.write_text(json.dumps({"values": dict(values), "started": started, "ended": ended}, indent=1))


def read_ended(folder: Path) -> str | None:
    """How the trial in a folder ended; None if it has not, or was not started."""
    path = folder / _FILE
    ended: str | None = read_json(path)["ended"] if path.is_file() else None
    return ended


def read_trials(tuning: Path) -> list[Trial]:
    """All trials below `tuning`, in the order in which they were started."""
    trials = []
    for path in (tuning / TRIALS).glob(f"*/{_FILE}"):
        try:
            tree = read_json(path)
            values, started, ended = dict(tree["values"]), float(tree["started"]), tree["ended"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FindRecError(f"{path} cannot be read ({error}). Delete {path.parent}") from None
        lines = [line for line in read_lines(path.parent / "metrics.jsonl") if line.get(_VALID) is not None]
        best = max((float(line[_VALID]) for line in lines), default=None)
        epochs = max((int(line["epoch"]) for line in lines), default=0)
        trials.append(Trial(path.parent.name, values, started, ended, best, epochs))
    return sorted(trials, key=lambda trial: trial.started)
