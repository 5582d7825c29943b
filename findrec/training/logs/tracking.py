"""Mirrors the metrics of a run folder (`findrec.training.logs.metrics_log`) to MLflow.

A background thread sends them from a bounded buffer with short timeouts: a slow, hanging or dead server
causes one warning and never delays a training step. Credentials in addresses are not sent.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from findrec.baseline_configs import BaselineConfig
from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.files import replacing
from findrec.paths import home, resolve
from findrec.progress import warn
from findrec.schema import flatten
from findrec.text import redacted

Status = Literal["FINISHED", "FAILED", "KILLED"]
ARTIFACTS = ("config.yaml", "metrics.json", "report.html")
BUFFER_POINTS = 50_000  # values waiting for a slow server; the oldest are dropped beyond that
FLUSH_S = 2.0  # values are collected this long and sent as one batch
RETRY_S = 30.0  # pause after a failed batch
FINISH_S = 20.0  # how long the end of a run waits for the mirror
_LARGEST_BATCH = 1000  # the most metrics MLflow accepts in one call
_LONGEST_PARAM = 6000
_STAGES = "stages"  # parent of the folders of a model's earlier stages

_SHORT_HTTP = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # with MLflow's defaults a call can hang for many minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def tracking_uri(uri: str | None) -> str:
    """The absolute MLflow URI: `uri`, else `MLFLOW_TRACKING_URI`, else a sqlite file below `home()`.

    A plain path means a sqlite file. Raises FindRecError for a folder store, which MLflow no longer supports,
    and for a path that MLflow cannot open.
    """
    name = "tracking.uri" if uri else "MLFLOW_TRACKING_URI"
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"
    if uri.startswith("file:"):
        raise FindRecError(
            f"{name}={uri!r} is a folder store, which MLflow no longer writes. Give a sqlite file "
            "(sqlite:///mlflow.db) or a server (http://host:5000)."
        )
    if not uri.startswith("sqlite:///") and ("://" in uri or uri == "databricks"):
        return uri
    path = resolve(uri.removeprefix("sqlite:///"))
    problem = "is a folder" if path.is_dir() else ""
    if re.search(r"\?|%[0-9a-fA-F]{2}", str(path)):  # the rest of an address, or an encoded character
        problem = "has a ? or % in its path, which MLflow cannot open"
    if problem:
        raise FindRecError(
            f"the MLflow store {path} {problem}. Set tracking.uri to another sqlite file "
            "(sqlite:////tmp/mlflow.db) or a server (http://host:5000), or tracking.enabled=false."
        )
    return f"sqlite:///{path}"


def check_tracking(config: RunConfig) -> None:
    """Raise FindRecError if the MLflow store of a run cannot be used at all; a dead server is no error."""
    if config.tracking.enabled:
        tracking_uri(config.tracking.uri)


def refuse_split_tracking(config: RunConfig, nodes: int) -> None:
    """Raise FindRecError if workers on more than one machine would use a sqlite file.

    Ray may place rank 0 on any of the machines, so the location of the file would be random.
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


def metric_name(key: str) -> str:
    """`key` in the characters that MLflow allows: `ndcg@10` becomes `ndcg_at_10`."""
    return re.sub(r"[^\w./\- :]", "_", key.replace("@", "_at_"))


class Tracker:
    """Interface of the MLflow mirror; this base class does nothing (tracking disabled, or rank > 0)."""

    @staticmethod
    def start(config: RunConfig, run_folder: Path, *, watch: bool = False) -> Tracker:
        """Create the MLflow run, or continue it on resume; returns at once.

        With `watch`, MLflow also records system metrics of this machine (load, memory, disk, network, GPUs).
        """
        if not config.tracking.enabled:
            return Tracker()
        return _MlflowTracker(config, run_folder.resolve(), tracking_uri(config.tracking.uri), watch=watch)

    @staticmethod
    def add_results(config: RunConfig, run_folder: Path, baseline: BaselineConfig | None = None) -> Tracker:
        """Log results to the finished MLflow run of a training, whose duration does not change.

        A `baseline` that is not trained has an MLflow run of its own, noted in `run_folder`.
        """
        if not config.tracking.enabled:
            return Tracker()
        uri = tracking_uri(config.tracking.uri)
        return _MlflowTracker(config, run_folder.resolve(), uri, adds=True, baseline=baseline)

    @staticmethod
    def join(config: RunConfig, run_folder: Path) -> Tracker:
        """Log to the MLflow run that rank 0 has created, or will create, without changing its status."""
        if not config.tracking.enabled:
            return Tracker()
        return _MlflowTracker(config, run_folder.resolve(), tracking_uri(config.tracking.uri), joins=True)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Mirror the numbers among `values` at `step`; never blocks, never raises."""

    def tag(self, key: str, value: str) -> None:
        """Mirror a tag, such as the checkpoint that the training was started from."""

    def finish(self, status: Status = "FINISHED", artifacts: Sequence[Path] | None = None) -> None:
        """Send the remaining values and close the MLflow run, waiting for `FINISH_S` seconds at most.

        `artifacts` are files to upload (default: those of `ARTIFACTS` that the run folder has).
        """


class _NotBegunError(Exception):
    """The MLflow run to join does not exist yet."""


class _MlflowTracker(Tracker):
    def __init__(
        self,
        config: RunConfig,
        run_folder: Path,
        uri: str,
        *,
        joins: bool = False,
        watch: bool = False,
        adds: bool = False,
        baseline: BaselineConfig | None = None,
    ) -> None:
        self.uri = uri
        self._joins = joins  # the run is created and ended by another process
        self._watch = watch
        self._adds = adds  # to a training that has ended
        self._ended_ms: int | None = None  # when it did
        self._baseline = baseline
        self._monitor: Any = None
        self._config = config
        self._folder = run_folder
        self._wake = threading.Condition()
        self._points: deque[tuple[str, float, int, int]] = deque(maxlen=BUFFER_POINTS)
        self._tags = {} if joins else {"run_folder": str(run_folder)}
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
            self._tags[key] = redacted(value)
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
                final = self._final  # read before sending, so that all values logged before it are sent
            try:
                self._connect()
                while self._send_batch():
                    pass
                if final:
                    self._close(*final)
            except _NotBegunError:
                pass  # rank 0 warns if MLflow is the reason
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
        """The id of the MLflow run created earlier for this folder, if the store still has it."""
        from mlflow.exceptions import MlflowException

        note = self._folder / "mlflow.json"
        if not note.is_file():
            return None
        try:
            earlier = json.loads(note.read_text())
            if earlier.get("uri") != redacted(self.uri):
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
        if self._adds:
            self._ended_ms = run.info.end_time
        elif not self._joins:
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
        run_id = str(client.create_run(experiment_id, run_name=self._run_name()).info.run_id)
        note = {"uri": redacted(self.uri), "experiment_id": str(experiment_id), "run_id": run_id}
        with replacing(self._folder / "mlflow.json") as part:
            part.write_text(json.dumps(note, indent=1) + "\n")
        return run_id

    def _run_name(self) -> str:
        """Name of the run and of its model, and of the stage of the model, if any."""
        stage = f"/{self._folder.name}" if self._folder.parent.name == _STAGES else ""
        return f"{self._config.name}: {(self._baseline or self._config.model).title}{stage}"

    def _log_params(self, client: Any) -> None:
        """Log the parameters; MLflow forbids changes, so those changed on resume become `changed.` tags."""
        from mlflow.entities import Param

        tree = self._config.model_dump(mode="json")
        if self._baseline is not None:  # its own keys, and none of a training
            tree = {k: v for k, v in tree.items() if k not in ("training", "cluster")}
            tree["model"] = self._baseline.model_dump(mode="json")
        settings = flatten(tree)
        params = {key: redacted(str(value))[:_LONGEST_PARAM] for key, value in settings.items()}
        known = client.get_run(self._run_id).data.params
        fresh = [Param(key, value) for key, value in params.items() if key not in known]
        for start in range(0, len(fresh), 100):
            client.log_batch(self._run_id, params=fresh[start : start + 100])
        with self._wake:
            for key, value in params.items():
                if known.get(key, value) != value:
                    self._tags[f"changed.{key}"] = value

    def _send_batch(self) -> bool:
        """Send one batch and return whether more is waiting; a failed batch is put back."""
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
            self._send_file(path)
        self._client.set_terminated(self._run_id, status=status, end_time=self._ended_ms)

    def _send_file(self, path: Path) -> None:
        """Upload a file; the configuration, which holds addresses as they were given, without credentials."""
        if path.suffix != ".yaml":
            self._client.log_artifact(self._run_id, str(path))
            return
        with tempfile.TemporaryDirectory(prefix="findrec-") as folder:
            copy = Path(folder) / path.name
            copy.write_text(redacted(path.read_text(encoding="utf-8")), encoding="utf-8")
            self._client.log_artifact(self._run_id, str(copy))

    def _warn(self, reason: str) -> None:
        if self._warned:
            return
        self._warned = True
        first = reason.splitlines()[0][:200]
        warn(f"MLflow at {self.uri} cannot be written ({first}). The run goes on; metrics.jsonl has all.")
