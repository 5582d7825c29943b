"""The checkpoints of one training: committed, sent on, and deleted when their time is over."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.progress import say
from findrec.tables.base import Table
from findrec.training.checkpoint import TrainState, checkpoint_path
from findrec.training.checkpoint_store import CheckpointStore, Sender
from findrec.training.saving import save_training, snapshot_training
from findrec.training.tower import Tower
from findrec.training.validations import prune_checkpoints, spared_checkpoints
from findrec.training.worker import Worker


def saves_beside(table: Table, worker: Worker) -> bool:
    """Whether a checkpoint is written while training goes on: where it is copied off a GPU anyway, and by one
    worker. A CPU would need the memory for a copy, and has its cores in use.
    """
    return worker.device.type == "cuda" and not table.sharded


class Keeper:
    """Every worker has one and calls it at the same steps."""

    def __init__(
        self, config: RunConfig, checkpoints: Path, tower: Tower, table: Table, worker: Worker
    ) -> None:
        self._config, self._root = config, checkpoints
        self._tower, self._table, self._worker = tower, table, worker
        store = CheckpointStore.of(config, checkpoints) if worker.leads else None
        self._sender = None if store is None else Sender(store, keep=config.training.keep)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._writing: Future[None] | None = None

    def save(self, state: TrainState, *, must: bool = False, wait: bool = False) -> bool:
        """Commit a checkpoint and return whether that went well; every rank takes part.

        A full disk or a lost share does not end a training that may outlive it: the next save tries again.
        With `must` it is an error. Where `saves_beside`, and unless it `must` or is to `wait`, this returns
        when the copy is made; how writing went is then said aloud.
        """
        worker = self._worker
        with worker.pulse.busy("saving"):
            self._finish_writing()
            if saves_beside(self._table, worker) and not must and not wait:
                write = snapshot_training(self._root, state, self._tower, self._table)
                if worker.leads:
                    self._writing = self._writer.submit(self._write, state, write)
                return True
            try:
                save_training(self._root, state, self._tower, self._table, worker)
            except OSError as error:
                if must:
                    raise FindRecError(
                        f"{self._failure(state, error)}. Make room there, then start the same command again: "
                        "it continues from the checkpoint before."
                    ) from error
                self._warn(state, error)
                return False
            self._clean_up(state)
            return True

    def _write(self, state: TrainState, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            self._warn(state, error)
        else:
            self._clean_up(state)

    def _failure(self, state: TrainState, error: OSError) -> str:
        return f"the checkpoint of step {state.step} could not be written to {self._root}: {error}"

    def _warn(self, state: TrainState, error: OSError) -> None:
        if self._worker.leads:
            what = self._failure(state, error)
            say(f"WARNING: {what}. Training goes on; make room before the next one is due.")

    def _clean_up(self, state: TrainState) -> None:
        if self._worker.leads:
            spare = spared_checkpoints(self._config, self._root, state)
            if self._sender is not None:
                self._sender.send(checkpoint_path(self._root, state), spare)
            prune_checkpoints(self._root, keep=self._config.training.keep, spare=spare)

    def _finish_writing(self) -> None:
        if self._writing is not None:
            self._writing.result()
        self._writing = None

    def close(self) -> None:
        """Wait for the last checkpoint to be written and sent."""
        with self._worker.pulse.busy("writing the last checkpoint"):
            self._finish_writing()
            self._writer.shutdown()
        if self._sender is not None:
            with self._worker.pulse.busy("sending the last checkpoint"):
                self._sender.close()
