"""MLflow, the mirror of what a run writes into its folder (`findrec.training.metrics_log`).

The mirror works from a background thread with a bounded buffer and short timeouts: a slow, hanging or dead
server costs a warning line, never a training step.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.paths import home, resolve
from findrec.progress import say

Status = Literal["FINISHED", "FAILED", "KILLED"]
ARTIFACTS = ("config.yaml", "metrics.json", "report.html")
BUFFER_POINTS = 50_000  # values waiting for a slow server; the oldest are dropped beyond that
FLUSH_S = 2.0  # values are collected this long and sent as one batch
RETRY_S = 30.0  # pause after a failed batch
FINISH_S = 20.0  # how long the end of a run waits for the mirror
_LARGEST_BATCH = 1000  # MLflow refuses more metrics in one call
_LONGEST_PARAM = 6000

_SHORT_HTTP = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # MLflow's own values let one call hang for many minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def tracking_uri(uri: str | None) -> str:
    """The absolute MLflow URI: given, else `MLFLOW_TRACKING_URI`, else a sqlite file below `home()`.

    A plain path means a sqlite file. Raises FindRecError for a folder store, which MLflow has given up.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{resolve(uri.removeprefix('sqlite:///'))}"
    if uri.startswith("file:"):
        raise FindRecError(
            f"tracking.uri={uri!r} is a folder store, which MLflow no longer writes. Give a sqlite file "
            "(sqlite:///mlflow.db) or a server (http://host:5000)."
        )
    return uri if "://" in uri or uri == "databricks" else f"sqlite:///{resolve(uri)}"


def refuse_split_tracking(config: RunConfig, nodes: int) -> None:
    """Raise FindRecError when a sqlite file is to be used by workers on more than one machine: the one that
    rank 0 lands on would decide where the numbers are.
    """
    if (
        nodes > 1
        and config.tracking.enabled
        and (uri := tracking_uri(config.tracking.uri)).startswith("sqlite:")
    ):
        raise FindRecError(
            f"MLflow would write {uri} on whichever of {nodes} machines holds rank 0. Start a server "
            "(`mlflow server --host ADDRESS`) and set tracking.uri=http://ADDRESS:5000, or switch the mirror "
            "off with tracking.enabled=false (metrics.jsonl is written either way)."
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as `dotted.key -> text`, the form MLflow's parameters have."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value)[:_LONGEST_PARAM]
    return flat


def metric_name(key: str) -> str:
    """`key` in the letters MLflow allows: `ndcg@10` becomes `ndcg_at_10`."""
    return re.sub(r"[^\w./\- :]", "_", key.replace("@", "_at_"))


class Tracker:
    """The mirror's interface; this class itself mirrors nothing (tracking disabled, ranks other than 0)."""

    @staticmethod
    def start(config: RunConfig, run_folder: Path, *, watch: bool = False) -> Tracker:
        """Begin, or on resume continue, the run's MLflow run; returns at once.

        With `watch` MLflow's system metrics of this machine (load, memory, disk, network, GPUs) are mirrored
        too.
        """
        if not config.tracking.enabled:
            return Tracker()
        return _MlflowTracker(config, run_folder.resolve(), tracking_uri(config.tracking.uri), watch=watch)

    @staticmethod
    def join(config: RunConfig, run_folder: Path) -> Tracker:
        """Add to the MLflow run that rank 0 has begun, or is about to begin, and leave its state alone."""
        if not config.tracking.enabled:
            return Tracker()
        return _MlflowTracker(config, run_folder.resolve(), tracking_uri(config.tracking.uri), joins=True)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Mirror the numbers among `values` at `step`; never blocks, never raises."""

    def tag(self, key: str, value: str) -> None:
        """Mirror a tag, such as the place of the newest checkpoint."""

    def finish(self, status: Status = "FINISHED", artifacts: Sequence[Path] | None = None) -> None:
        """Send what is left and close the MLflow run, waiting for `FINISH_S` seconds at most.

        `artifacts` are files to upload (default: those of `ARTIFACTS` that the run folder has).
        """


class _NotBegunError(Exception):
    """There is no MLflow run to join yet."""


class _MlflowTracker(Tracker):
    def __init__(
        self, config: RunConfig, run_folder: Path, uri: str, *, joins: bool = False, watch: bool = False
    ) -> None:
        self.uri = uri
        self._joins = joins  # a run that somebody else begins and ends
        self._watch = watch
        self._monitor: Any = None
        self._config = config
        self._folder = run_folder
        self._wake = threading.Condition()
        self._points: deque[tuple[str, float, int, int]] = deque(maxlen=BUFFER_POINTS)
        self._tags = {"run_folder": str(run_folder), "checkpoint": str(run_folder / "checkpoints")}
        if joins:
            self._tags = {}
        self._final: tuple[Status, Sequence[Path]] | None = None
        self._client: Any = None
        self._run_id = ""
        self._warned = False
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        now_ms = int(time.time() * 1000)
        numbers = {key: value.item() if hasattr(value, "item") else value for key, value in values.items()}
        with self._wake:
            self._points.extend(
                (metric_name(key), float(value), now_ms, step)
                for key, value in numbers.items()
                if isinstance(value, int | float)
            )
            self._wake.notify()

    def tag(self, key: str, value: str) -> None:
        with self._wake:
            self._tags[key] = value
            self._wake.notify()

    def finish(self, status: Status = "FINISHED", artifacts: Sequence[Path] | None = None) -> None:
        files = [self._folder / name for name in ARTIFACTS] if artifacts is None else list(artifacts)
        with self._wake:
            self._final = (status, [path for path in files if path.is_file()])
            self._wake.notify()
        self._thread.join(FINISH_S)
        if self._thread.is_alive():
            self._warn(f"no answer within {FINISH_S:.0f} s")

    # What follows runs in the background thread.

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._final or self._points or self._tags)
                self._wake.wait_for(lambda: self._final, timeout=FLUSH_S)
                final = self._final  # read before sending: all that was logged before it gets sent
            try:
                self._connect()
                while self._send_batch():
                    pass
                if final:
                    self._close(*final)
            except _NotBegunError:
                pass  # rank 0 says so itself if MLflow is why
            except Exception as error:
                self._warn(f"{type(error).__name__}: {error}")
            else:
                if not final:
                    continue
            if final:
                return
            with self._wake:
                self._wake.wait_for(lambda: self._final, timeout=RETRY_S)

    def _connect(self) -> None:
        if self._client is not None:
            return
        for key, value in _SHORT_HTTP.items():
            os.environ.setdefault(key, value)
        import logging

        from mlflow import MlflowClient  # imported here: it takes seconds, and only rank 0 needs it

        for name in ("mlflow", "alembic"):  # a new sqlite file logs some forty migrations
            logging.getLogger(name).setLevel(logging.WARNING)
        if self.uri.startswith("sqlite:///"):
            Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(tracking_uri=self.uri)
        earlier = self._resume(client)
        if self._joins and earlier is None:
            raise _NotBegunError
        self._run_id = earlier or self._create(client)
        if not self._joins:
            self._log_params(client)
        if self._watch:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(self._run_id, resume_logging=True, tracking_uri=self.uri)
            self._monitor.start()
        self._client = client

    def _resume(self, client: Any) -> str | None:
        """The run this folder began earlier, if this store still has it."""
        from mlflow.exceptions import MlflowException

        note = self._folder / "mlflow.json"
        if not note.is_file():
            return None
        try:
            earlier = json.loads(note.read_text())
            if earlier.get("uri") != self.uri:
                return None
            run = client.get_run(earlier["run_id"])
            if run.info.lifecycle_stage == "deleted":
                return None
        except (json.JSONDecodeError, KeyError, AttributeError):
            return None
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        if not self._joins:
            client.update_run(run.info.run_id, status="RUNNING")
        return str(run.info.run_id)

    def _create(self, client: Any) -> str:
        name = self._config.tracking.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            local = None
            if self.uri.startswith("sqlite:///"):  # MLflow's default would be below the working directory
                store = Path(self.uri.removeprefix("sqlite:///")).parent
                local = (store / "mlruns" / metric_name(name)).as_uri()
            experiment_id = client.create_experiment(name, artifact_location=local)
        else:
            experiment_id = experiment.experiment_id
            if experiment.lifecycle_stage == "deleted":
                client.restore_experiment(experiment_id)
        run_id = str(client.create_run(experiment_id, run_name=self._config.name).info.run_id)
        note = {"uri": self.uri, "experiment_id": str(experiment_id), "run_id": run_id}
        new = self._folder / "mlflow.json.new"
        new.write_text(json.dumps(note, indent=1) + "\n")
        new.replace(self._folder / "mlflow.json")
        return run_id

    def _log_params(self, client: Any) -> None:
        """Parameters cannot change in MLflow: those a resumed run changed become `changed.` tags."""
        from mlflow.entities import Param

        params = flatten(self._config.model_dump(mode="json"))
        known = client.get_run(self._run_id).data.params
        fresh = [Param(key, value) for key, value in params.items() if key not in known]
        for start in range(0, len(fresh), 100):
            client.log_batch(self._run_id, params=fresh[start : start + 100])
        with self._wake:
            for key, value in params.items():
                if known.get(key, value) != value:
                    self._tags[f"changed.{key}"] = value

    def _send_batch(self) -> bool:
        """Send one batch; on failure put it back. Returns whether more is waiting."""
        from mlflow.entities import Metric, RunTag

        with self._wake:
            points = [self._points.popleft() for _ in range(min(_LARGEST_BATCH, len(self._points)))]
            tags, self._tags = self._tags, {}
        if not points and not tags:
            return False
        try:
            self._client.log_batch(
                self._run_id,
                metrics=[Metric(*point) for point in points],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )
        except Exception:
            with self._wake:
                room = BUFFER_POINTS - len(self._points)
                self._points.extendleft(reversed(points[-room:] if room else []))
                self._tags = tags | self._tags
            raise
        return bool(self._points)

    def _close(self, status: Status, artifacts: Sequence[Path]) -> None:
        if self._joins:
            return
        if self._monitor is not None:
            self._monitor.finish()
        for path in artifacts:
            self._client.log_artifact(self._run_id, str(path))
        self._client.set_terminated(self._run_id, status=status)

    def _warn(self, reason: str) -> None:
        if self._warned:
            return
        self._warned = True
        first = reason.splitlines()[0][:200]
        say(f"MLflow at {self.uri} cannot be written ({first}). The run goes on; metrics.jsonl has all.")
