"""Train and evaluate one run, on this machine or on a Ray cluster.

    python -m findrec.train_dist --config configs/demo.yaml [dotted.key=value ...]
    ray job submit --working-dir . -- python -m findrec.train_dist --config configs/demo.yaml

Prepares the data set on first use, starts Ray on this machine unless there is a cluster address
(cluster.address or RAY_ADDRESS), trains with DeepSpeed, ranks the full catalogue and writes the run folder.
Started again with the same name it resumes from the newest checkpoint; `--fresh` deletes the run first.
SIGTERM stops it after saving the current step. `--dry-run` only prints the plan: workers, steps and memory.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from findrec.errors import FindRecError, Preempted, system_error
from findrec.paths import drop_checkout_from_sys_path
from findrec.sigterm import handles_sigterm
from findrec.text import printable

if TYPE_CHECKING:
    from findrec.config import RunConfig

EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: start the same command again


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `argv` None: that of this process."""
    parser = argparse.ArgumentParser(
        prog="python -m findrec.train_dist",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="path or name of a run configuration (YAML)")
    parser.add_argument("--fresh", action="store_true", help="delete a run of the same name first")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, start nothing")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="e.g. training.epochs=3")
    return parser.parse_intermixed_args(argv)


def _run(arguments: argparse.Namespace) -> None:
    from findrec.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from findrec.cluster.plan.dry_run import dry_run
        from findrec.training.logs.tracking import check_tracking

        check_tracking(config)
        dry_run(config)
        return
    train_run(config, fresh=arguments.fresh)


def train_run(config: RunConfig, *, fresh: bool = False) -> Path:
    """Train and evaluate a run, or resume it; returns its folder. `fresh` deletes the run first."""
    from findrec.config import dump_config
    from findrec.progress import say
    from findrec.training.logs.tracking import check_tracking
    from findrec.training.runs import only_training_of

    check_tracking(config)
    say(f"resolved configuration:\n{dump_config(config)}")
    with only_training_of(config):
        return _train(config, fresh=fresh)


def _train(config: RunConfig, *, fresh: bool) -> Path:
    from findrec.cluster.async_evaluation import AsyncEvaluation
    from findrec.cluster.plan.machines import machines_of
    from findrec.cluster.plan.tokens import resolve_tokens
    from findrec.cluster.supervise import train_on_ray
    from findrec.datasets.prepare.pipeline import open_or_prepare
    from findrec.evaluation.check import check_run
    from findrec.evaluation.run import evaluate_run
    from findrec.progress import say
    from findrec.ray_session import ray_session
    from findrec.training.checkpoints.checkpoint import checkpoint_folder, list_checkpoints
    from findrec.training.runs import open_run_folder, run_folder, training_jobs, with_saved_tokens
    from findrec.training.warm_start import find_warm_start

    data = open_or_prepare(config.data)
    check_run(config, data)
    for job in training_jobs(config, run_folder(config)):
        if fresh or not list_checkpoints(checkpoint_folder(job.folder)):
            find_warm_start(job.config, data)
    if fresh:
        shutil.rmtree(run_folder(config), ignore_errors=True)
    config = with_saved_tokens(config)
    if config.training.tokens == "auto":
        with machines_of(config) as machines:
            config = resolve_tokens(config, data, machines)
    folder = open_run_folder(config)
    with ray_session(config), _sigterm_sets() as stop:
        async_evaluation = (
            AsyncEvaluation(config, data.location, folder) if config.evaluation.evaluator == "async" else None
        )
        train_on_ray(config, data.location, folder, stop, async_evaluation)
        if async_evaluation is not None:
            async_evaluation.finish(stop)
    if async_evaluation is None:
        evaluate_run(folder)
    say(f"done: {folder / 'report.html'}")
    return folder


@contextmanager
def _sigterm_sets() -> Iterator[threading.Event]:
    stop = threading.Event()
    with handles_sigterm(lambda *_: stop.set()):
        yield stop


def _end_here(*_: object) -> None:
    raise Preempted("training was not running, so nothing had to be saved")


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code: 0 done, 2 user error, 75 stopped cleanly by SIGTERM, 130 interrupted."""
    drop_checkout_from_sys_path()
    arguments = parse_arguments(argv)
    try:
        with handles_sigterm(_end_here):
            _run(arguments)
    except Preempted as ended:
        print(printable(f"stopped by SIGTERM: {ended}; the same command continues"), file=sys.stderr)
        return EXIT_AGAIN
    except FindRecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {system_error(error) or printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(
            f"error: {sys.executable} has no module {error.name!r}. Use the Python FindRec is installed in: "
            "`source .venv/bin/activate` before `ray start` and `ray job submit`.",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
