"""The run folder: what lies where, which trainings it holds, and what may change when it is continued."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from findrec.config import ModelConfig, RunConfig, dump_config, parse_config
from findrec.errors import FindRecError
from findrec.paths import resolve
from findrec.training.checkpoint import list_checkpoints

TRAINED_BASELINES = ("sasrec",)
BASELINES = "baselines"  # folder of a run that holds theirs
# A run goes on unchanged when only these differ: they do not touch what is learnt.
FREE_KEYS = (
    "cluster.",
    "tracking.",
    "evaluation.",
    "runs",
    "training.save_every",
    "training.save_steps",
    "training.keep",
    "training.checkpoint_store",
    "training.table",
    "training.profile_steps",
    "training.checkpoint_activations",
)


@dataclass(frozen=True)
class TrainingJob:
    """One model to be trained: the run's own, or a baseline with the same loss, width and budget."""

    name: str
    config: RunConfig
    folder: Path


def run_folder(config: RunConfig) -> Path:
    """The absolute folder of a run."""
    return resolve(config.runs) / config.name


def checkpoint_folder(folder: Path) -> Path:
    """Where a training's checkpoints lie."""
    return folder / "checkpoints"


def training_jobs(config: RunConfig, folder: Path) -> list[TrainingJob]:
    """The run's own model first, then its trained baselines, each in a folder of its own."""
    jobs = [TrainingJob(config.model.name, config, folder)]
    for name in TRAINED_BASELINES:
        if name in config.evaluation.baselines and name != config.model.name:
            model = ModelConfig(**{**config.model.model_dump(), "name": name})
            start = config.training.warm_start
            warm = None if start is None else f"{start}/{BASELINES}/{name}"
            training = config.training.model_copy(update={"warm_start": warm})
            changed = config.model_copy(update={"model": model, "training": training})
            jobs.append(TrainingJob(name, changed, folder / BASELINES / name))
    return jobs


def flatten(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.")
    return flat


def open_run_folder(config: RunConfig) -> Path:
    """Make the run folder with its resolved `config.yaml`, or open one that this configuration continues.

    Raises `FindRecError` when the folder holds checkpoints of another configuration or cannot be written.
    """
    folder = run_folder(config)
    saved = folder / "config.yaml"
    started = [j for j in training_jobs(config, folder) if list_checkpoints(checkpoint_folder(j.folder))]
    if saved.is_file() and started:
        old = flatten(read_run_config(folder).model_dump(mode="json"))
        new = flatten(config.model_dump(mode="json"))
        changed = [k for k in new if old.get(k) != new[k] and not k.startswith(FREE_KEYS)]
        if changed:
            listed = "; ".join(f"{k}: {old.get(k)!r} there, {new[k]!r} now" for k in changed[:5])
            raise FindRecError(
                f"{folder} holds a run with another configuration ({listed}). Give this run another name "
                "(name=...), or pass --fresh to delete it and start anew."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for job in training_jobs(config, folder):
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / "config.yaml").write_text(dump_config(job.config))
    except OSError as error:
        raise FindRecError(
            f"cannot write the run folder {folder}: {error}. Set `runs` (or FINDREC_HOME) to a folder you "
            "may write to."
        ) from None
    return folder


def read_run_config(folder: Path) -> RunConfig:
    """The resolved configuration a run folder was made with."""
    path = folder / "config.yaml"
    try:
        return parse_config(yaml.safe_load(path.read_text()), source=str(path))
    except FileNotFoundError:
        raise FindRecError(f"{folder} is no run folder: it has no config.yaml") from None
