"""The run folder: its layout, the trainings of a run, and which settings may change when it is resumed.

A run is a list of trainings: the stages of its model (usually one), then those of each trained baseline. All
are trained by the same loop on the same workers, each in a folder with its own checkpoints, so that an
interrupted run resumes in the stage it had reached.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from findrec.baseline_configs import BASELINES as UNTRAINED
from findrec.config import RunConfig, dump_config, parse_config
from findrec.errors import FindRecError
from findrec.locks import holding
from findrec.models.config import ModelConfig
from findrec.models.configs import CONFIGS, DEFAULT
from findrec.paths import resolve
from findrec.schema import changes, read_mapping
from findrec.text import redacted
from findrec.training.checkpoints.checkpoint import checkpoint_folder, list_checkpoints, refuse_newer

BASELINES = "baselines"  # subfolder of a run for its trained baselines
STAGES = "stages"  # subfolder of a training for the stages before the last


@dataclass(frozen=True)
class TrainingJob:
    """One training: a stage of the run's model or of a trained baseline.

    Attributes:
        name: name in results; stages before the last are called `<model>/<stage>`.
        config: the configuration of the run, with the model of this training.
        folder: folder of its checkpoints and metrics.
        needs: folders of the earlier stages whose best checkpoints it reads, by stage name.
        continues: the one of `needs` from whose weights and item rows it starts.
    """

    name: str
    config: RunConfig
    folder: Path
    needs: dict[str, Path] = field(default_factory=dict)
    continues: str | None = None

    @property
    def ranked(self) -> bool:
        """Whether the model ranks items, and so is validated and evaluated."""
        return self.config.model.ranked


def run_folder(config: RunConfig) -> Path:
    """The absolute folder of a run."""
    return resolve(config.runs) / config.name


def training_jobs(config: RunConfig, folder: Path) -> list[TrainingJob]:
    """All trainings of a run in order: each after those it needs."""
    jobs = _stages_of(config, folder)
    for baseline in config.baselines:
        if isinstance(baseline, ModelConfig):
            start = config.training.warm_start
            warm = None if start is None else f"{start}/{BASELINES}/{baseline.title}"
            training = config.training.model_copy(update={"warm_start": warm})
            changed = config.model_copy(update={"model": baseline, "training": training})
            jobs += _stages_of(changed, folder / BASELINES / baseline.title)
    return jobs


def _stages_of(config: RunConfig, folder: Path) -> list[TrainingJob]:
    folders: dict[str, Path] = {}
    jobs = []
    for spec in config.model.stages():
        here = folder / STAGES / spec.name if spec.name else folder
        name = f"{config.model.title}/{spec.name}" if spec.name else config.model.title
        training: dict[str, Any] = {
            key: getattr(config.training, key).model_copy(update=value) if isinstance(value, dict) else value
            for key, value in spec.training.items()
        }
        if spec.name:
            training["warm_start"] = None
        changed = config.model_copy(
            update={"model": spec.model, "training": config.training.model_copy(update=training)}
        )
        needs = {need: folders[need] for need in spec.needs}
        jobs.append(TrainingJob(name, changed, here, needs, spec.continues))
        folders[spec.name] = here
    return jobs


def main_job(config: RunConfig, folder: Path) -> TrainingJob:
    """The training of the run's model, whose folder is the run folder."""
    return next(job for job in training_jobs(config, folder) if job.folder == folder)


def only_training_of(config: RunConfig, *, wait: bool = False) -> AbstractContextManager[None]:
    """Hold the lock of a run.

    If another process trains this run, wait until it ends, or raise `FindRecError` with its name.
    """
    folder = run_folder(config)
    error = partial(_cannot_write, folder)
    return holding(folder, f"training the run {folder}", wait=wait, on_error=error)


def _cannot_write(folder: Path, error: OSError) -> FindRecError:
    return FindRecError(
        f"cannot write the run folder {folder}: {error}. Set `runs` (or FINDREC_HOME) to a writable folder."
    )


def with_tokens(config: RunConfig, tokens: int) -> RunConfig:
    """The run with another number for `training.tokens`."""
    return config.model_copy(update={"training": config.training.model_copy(update={"tokens": tokens})})


def with_saved_tokens(config: RunConfig) -> RunConfig:
    """The run with the tokens of its checkpoints in place of `training.tokens=auto`, if it has checkpoints.

    The steps of a run depend on them, so that a resumed run keeps them on any hardware.
    """
    folder = run_folder(config)
    if config.training.tokens != "auto" or not _has_checkpoints(config, folder):
        return config
    return with_tokens(config, read_run_config(folder).training.num_tokens)


def _has_checkpoints(config: RunConfig, folder: Path) -> bool:
    jobs = training_jobs(config, folder)
    saved = any(list_checkpoints(checkpoint_folder(job.folder)) for job in jobs)
    return saved and (folder / "config.yaml").is_file()


def open_run_folder(config: RunConfig) -> Path:
    """Create the run folder with the resolved `config.yaml`, or open it to resume the run.

    Raises `FindRecError` if it has checkpoints of another configuration or of a newer version, if it cannot
    be written, or if it is new and `training.tokens` is still `auto`.
    """
    config = with_saved_tokens(config)
    config = with_tokens(config, config.training.num_tokens)
    folder = run_folder(config)
    jobs = training_jobs(config, folder)
    for job in jobs:
        refuse_newer(checkpoint_folder(job.folder))
    if _has_checkpoints(config, folder):
        old = read_run_config(folder)
        changed = changes(old, config, "resume")
        if changed:
            listed = "; ".join(f"{key}: {before!r} before, {now!r} now" for key, before, now in changed[:5])
            raise FindRecError(
                f"{folder} contains a run with another configuration ({listed}). Give this run another name "
                "(name=...), or pass --fresh to delete the old one."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
            text = dump_config(job.config)
            (job.folder / "config.yaml").write_text(text)
            if redacted(text) != text:
                (job.folder / "config.yaml").chmod(0o600)  # it has to keep the credentials of addresses
    except OSError as error:
        raise _cannot_write(folder, error) from None
    return folder


def read_run_config(folder: Path) -> RunConfig:
    """The resolved configuration of a run folder."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise FindRecError(f"{folder} is not a run folder: it has no config.yaml")
    return parse_config(_upgraded(read_mapping(path)), source=str(path))


def _upgraded(tree: dict[str, Any]) -> dict[str, Any]:
    """Upgrade a configuration from before version 0.1.0, whose `model` section had the keys of all models.

    Keys of other models are moved to the baseline of that model, or dropped.
    """
    model = tree.get("model")
    evaluation = tree.get("evaluation") or {}
    if not isinstance(model, dict) or not isinstance(evaluation, dict):
        return tree
    given = evaluation.get("baselines", [])
    if str(model.get("name", DEFAULT)) not in CONFIGS or not isinstance(given, list):
        return tree
    own = CONFIGS[model.get("name", DEFAULT)]
    foreign = {k: v for k, v in model.items() if k not in own.model_fields}
    known = {key for other in CONFIGS.values() for key in other.model_fields}
    if not foreign or not foreign.keys() <= known:
        return tree
    evaluation = dict(evaluation)
    baselines = []
    for baseline in given:
        config = CONFIGS.get(baseline) if isinstance(baseline, str) and baseline not in UNTRAINED else None
        keys = {} if config is None else {k: v for k, v in foreign.items() if k in config.model_fields}
        baselines.append({"name": baseline, **keys} if keys else baseline)
    if baselines:
        evaluation["baselines"] = baselines
    kept = {key: value for key, value in model.items() if key not in foreign}
    return {**tree, "model": kept, "evaluation": evaluation}
