"""Runs the trials of a tuning on Ray: Optuna proposes values, and ASHA stops trials that fall behind.

The first trial is of the configuration as it is. The files of the trials are all that is kept: started again,
trials that have ended are told to Optuna, interrupted ones continue, and new ones make up the number.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from findrec.cluster.plan.machines import cluster_machines, use_gpus
from findrec.config import RunConfig
from findrec.datasets.prepare.pipeline import open_or_prepare
from findrec.errors import FindRecError, Preempted
from findrec.evaluation.check import check_run
from findrec.files import replacing
from findrec.paths import resolve
from findrec.progress import Bar, progress, say, warn
from findrec.ray_session import ray_session, worker_threads
from findrec.schema import flatten, read_mapping
from findrec.sigterm import handles_sigterm
from findrec.training.runs import only_training_of
from findrec.tuning.space import Range, Space
from findrec.tuning.train import EPOCH, VALUE, run_trial
from findrec.tuning.trials import TRIALS, Trial, read_trials, trial_name, write_trial

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FILE = "tuning.yaml"  # what is tuned: the configuration and the search space
_REDUCTION = 3  # ASHA keeps one of so many trials at each of its rungs
_SWITCHES = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the trials write files of their own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command like any other
    "RAY_AIR_NEW_OUTPUT": "0",  # prints a table even if told not to
}


def tuning_folder(config: RunConfig) -> Path:
    """Where the tuning of a configuration is kept, beside the folder of its run."""
    return resolve(config.runs) / f"{config.name}-tuning"


def run_study(config: RunConfig, space: Space, *, trials: int, fresh: bool = False) -> list[Trial]:
    """Run trials until `trials` have ended; returns all in the order in which they were started.

    A search space with no more combinations of values than `trials` is tried completely.

    Each has the resources of one worker of the run, and as many run side by side as the cluster of the run
    has room for. `fresh` deletes earlier trials first.

    Raises:
        FindRecError: if the folder has trials of another configuration or search space, or the model does not
            rank items.
        Preempted: on SIGTERM; trials under way continue from their checkpoints when started again.
    """
    folder = tuning_folder(config)
    data = open_or_prepare(config.data)
    check_run(config, data)
    if not config.model.ranked:
        raise FindRecError(f"{config.model.title} does not rank items, so its trials cannot be compared")
    with only_training_of(config.model_copy(update={"name": folder.name})):
        if fresh:
            shutil.rmtree(folder / TRIALS, ignore_errors=True)
        _open(folder, config, space, fresh=fresh)
        known = read_trials(folder)
        ended = [trial for trial in known if trial.ended is not None]
        trials = min(trials, space.size or trials)
        say(f"{len(ended)} of {trials} trials have ended; their folder is {folder}")
        if len(ended) < trials:
            with ray_session(config), _switches(), _raises_preempted():
                _fit(config, space, data.location, folder, known, trials)
        return read_trials(folder)


def _open(folder: Path, config: RunConfig, space: Space, *, fresh: bool) -> None:
    tree = {"config": config.model_dump(mode="json"), "space": space.tree}
    path = folder / FILE
    if path.is_file() and not fresh and read_trials(folder):
        before, now = flatten(read_mapping(path)), flatten(tree)
        differing = [
            key
            for key in dict.fromkeys([*before, *now])
            if before.get(key) != now.get(key) and not key.startswith(("config.cluster.", "config.tracking."))
        ]
        if differing:
            raise FindRecError(
                f"{folder} has trials of another configuration or search space ({', '.join(differing[:5])} "
                "differ). Give the run another name (name=...), or pass --fresh to delete them"
            )
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        part.chmod(0o600)  # addresses may hold credentials


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """The search space as Optuna has it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, BaseDistribution] = {}
    for key, tried in space.keys.items():
        if not isinstance(tried, Range):
            made[key] = CategoricalDistribution(tried)
        elif tried.whole:
            made[key] = IntDistribution(int(tried.low), int(tried.high), log=tried.log)
        else:
            made[key] = FloatDistribution(tried.low, tried.high, log=tried.log)
    return made


def first_values(config: RunConfig, space: Space) -> dict[str, Any] | None:
    """The values that the configuration has itself; None if the search space does not contain them."""
    given = flatten(config.model_dump(mode="json"))
    values = {key: given[key] for key in space.keys}
    return values if all(space.contains(key, value) for key, value in values.items()) else None


def first_points(
    config: RunConfig, space: Space, known: Sequence[Trial], trials: int
) -> list[dict[str, Any]]:
    """What is tried before Optuna proposes values.

    These are the trials that were interrupted; the configuration as it is, if nothing is known yet; and all
    combinations of values if there are no more than `trials`, as Optuna would propose some of them twice.
    """
    points = [dict(trial.values) for trial in known if trial.ended is None]
    if not known and (first := first_values(config, space)) is not None:
        points = [first]
    if space.size is not None and space.size <= trials:
        tried = {trial.name for trial in known} | {trial_name(point) for point in points}
        points += [values for values in space.combinations() if trial_name(values) not in tried]
    return points


def _fit(
    config: RunConfig, space: Space, data: str, folder: Path, known: Sequence[Trial], trials: int
) -> None:
    import optuna
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _, gpu = use_gpus(config, cluster_machines(), announce=True)
    threads = worker_threads(config)
    tree = config.model_dump(mode="json")
    tree["cluster"]["threads"] = threads
    ended = [trial for trial in known if trial.ended is not None]
    search = OptunaSearch(
        distributions(space),
        metric=VALUE,
        mode="max",
        points_to_evaluate=first_points(config, space, known, trials),
        # Another seed for each start: the sampler begins with values that depend on nothing else. Trials that
        # were interrupted count, or else their values would be proposed again.
        sampler=optuna.samplers.TPESampler(seed=config.training.seed + len(known), constant_liar=True),
    )
    for trial in ended:
        search.add_evaluated_point(dict(trial.values), trial.best or 0.0, error=trial.ended == "failed")
    epochs, every = config.training.epochs, config.training.eval_every
    scheduler = ASHAScheduler(
        time_attr=EPOCH,
        metric=VALUE,
        mode="max",
        max_t=epochs + 1,  # after the last epoch a trial ends by itself
        grace_period=min(epochs, max(every, epochs // _REDUCTION**2)),
        reduction_factor=_REDUCTION,
    )
    cpus = config.cluster.cpus_per_worker
    resources = {"CPU": cpus, "GPU": 1} if gpu else {"CPU": max(cpus, threads)}
    session = folder / "session"  # of Ray Tune, which nothing is read from
    shutil.rmtree(session, ignore_errors=True)
    left = trials - len(ended)
    with progress("trials", left, "trials") as bar:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(run_trial, tree=tree, data=data, tuning=str(folder)),
                resources,
            ),
            tune_config=tune.TuneConfig(search_alg=search, scheduler=scheduler, num_samples=left),
            run_config=tune.RunConfig(
                name=session.name,
                storage_path=str(folder),
                verbose=0,
                callbacks=[_callback(folder, epochs, bar)],
                failure_config=tune.FailureConfig(max_failures=1),
            ),
        )
        tuner.fit()
    shutil.rmtree(session, ignore_errors=True)


def _callback(folder: Path, epochs: int, bar: Bar) -> Any:
    """A callback of Ray Tune that records how trials end, on the driver."""
    from ray.tune import Callback

    best = [-1.0]

    class Recorder(Callback):  # type: ignore[misc]  # Ray Tune is not typed
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            name = trial_name(trial.config)
            ended = next((one.ended for one in read_trials(folder) if one.name == name), None)
            result = trial.last_result or {}
            if ended is None:  # ended by the scheduler, perhaps after the last epoch
                ended = "trained" if result.get(EPOCH, 0) >= epochs else "stopped"
            self._end(trial.config, ended, result.get(VALUE))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            warn(f"{trial_name(trial.config)}: {_reason(trial.get_error())}")
            self._end(trial.config, "failed", None)

        def _end(self, values: Mapping[str, Any], ended: str, value: float | None) -> None:
            write_trial(folder / TRIALS / trial_name(values), values, ended)
            best[0] = max(best[0], -1.0 if value is None else value)
            bar.advance(1)
            bar.note(best=f"{best[0]:.4f}")
            shown = "no result" if value is None else f"{VALUE} {value:.4f}"
            say(f"{trial_name(values)} {ended}: {shown}; {', '.join(f'{k}={v}' for k, v in values.items())}")

    return Recorder()


def _reason(error: BaseException | None) -> str:
    """The message of what ended a trial, without the tracebacks of Ray."""
    while error is not None and (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


class _TerminatedError(BaseException):
    """SIGTERM. Not an `Exception`, as Ray Tune makes those an error of the trials."""


@contextmanager
def _raises_preempted() -> Iterator[None]:
    """Raise `Preempted` on SIGTERM, whatever Ray makes of the exception in its handler.

    It becomes a `SystemError` if the signal arrives while compiled code of Ray waits.
    """
    received = threading.Event()

    def terminate(*_: object) -> None:
        received.set()
        raise _TerminatedError

    try:
        with handles_sigterm(terminate):
            yield
    except BaseException:
        if not received.is_set():
            raise
    if received.is_set():
        raise Preempted("trials under way continue from their checkpoints")


@contextmanager
def _switches() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _SWITCHES}
    os.environ.update(_SWITCHES)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
