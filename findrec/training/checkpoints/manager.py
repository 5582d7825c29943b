"""The checkpoint manager of a training: saves checkpoints, uploads them, and deletes old ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.progress import warn
from findrec.tables.base import Table
from findrec.training.checkpoints.checkpoint import TrainState, checkpoint_path
from findrec.training.checkpoints.replicas import check_replicas
from findrec.training.checkpoints.saving import save_training, snapshot_training
from findrec.training.checkpoints.store import CheckpointStore, Sender
from findrec.training.checkpoints.validations import protected_checkpoints, prune_checkpoints
from findrec.training.tower import Tower
from findrec.training.worker import Worker


def saves_in_background(tables: Mapping[str, Table], worker: Worker) -> bool:
    """Whether a checkpoint is written in a thread while training continues.

    It is on GPUs with a replicated table: tensors are copied to host memory anyway, and one worker writes. On
    a CPU the copy would take extra memory, and all cores are in use.
    """
    return worker.device.type == "cuda" and not any(table.sharded for table in tables.values())


class CheckpointManager:
    """Saves and prunes checkpoints; every worker has one and calls it at the same steps."""

    def __init__(
        self,
        config: RunConfig,
        checkpoints: Path,
        tower: Tower,
        tables: Mapping[str, Table],
        worker: Worker,
    ) -> None:
        self._config, self._root = config, checkpoints
        self._tower, self._tables, self._worker = tower, tables, worker
        store = CheckpointStore.of(config, checkpoints) if worker.is_rank_zero else None
        self._sender = None if store is None else Sender(store, keep=config.training.keep)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._writing: Future[None] | None = None

    def save(self, state: TrainState, *, must: bool = False, wait: bool = False) -> bool:
        """Commit a checkpoint and return whether it was written (a collective call).

        Raises `FindRecError` if the workers' copies of the weights differ (`check_replicas`).

        A full disk or an unavailable file share gives a warning, and the next save tries again; with `must`
        it raises `FindRecError`. Where `saves_in_background` holds and neither `must` nor `wait` is set, this
        returns as soon as the tensors are copied, and a later failure is reported as a warning.
        """
        worker = self._worker
        with worker.heartbeat.busy("saving"):
            self._finish_writing()
            check_replicas(self._tower, self._tables, worker, state.step)
            if saves_in_background(self._tables, worker) and not must and not wait:
                write = snapshot_training(self._root, state, self._tower, self._tables, worker)
                if write is not None:
                    self._writing = self._writer.submit(self._write, state, write)
                return True
            try:
                save_training(self._root, state, self._tower, self._tables, worker)
            except OSError as error:
                if must:
                    raise FindRecError(
                        f"{self._failure(state, error)}. Make room there, then start the same command again: "
                        "it continues from the checkpoint before."
                    ) from error
                self._warn(state, error)
                return False
            self._send(state)
            self.delete_old(state)
            return True

    def _write(self, state: TrainState, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            self._warn(state, error)
        else:
            self._send(state)
            self.delete_old(state)

    def _failure(self, state: TrainState, error: OSError) -> str:
        return f"the checkpoint of step {state.step} could not be written to {self._root}: {error}"

    def _warn(self, state: TrainState, error: OSError) -> None:
        if self._worker.is_rank_zero:
            failure = self._failure(state, error)
            warn(f"WARNING: {failure}. Training goes on; make room before the next one is due.")

    def _send(self, state: TrainState) -> None:
        if self._sender is not None:
            protected = protected_checkpoints(self._config, self._root, state)
            self._sender.send(checkpoint_path(self._root, state.step), protected)

    def delete_old(self, state: TrainState) -> None:
        """Delete what is outdated at `state`, also what a process that was killed before this left."""
        if self._worker.is_rank_zero:
            protected = protected_checkpoints(self._config, self._root, state)
            prune_checkpoints(self._root, state.step, keep=self._config.training.keep, protected=protected)

    def _finish_writing(self) -> None:
        if self._writing is not None:
            self._writing.result()
        self._writing = None

    def close(self) -> None:
        """Wait until the last checkpoint is written and uploaded."""
        with self._worker.heartbeat.busy("writing the last checkpoint"):
            self._finish_writing()
            self._writer.shutdown()
        if self._sender is not None:
            with self._worker.heartbeat.busy("sending the last checkpoint"):
                self._sender.close()
