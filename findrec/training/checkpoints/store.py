"""Copies checkpoints to and from remote storage: an object store or any other fsspec file system.

Training saves to its local disk and continues; a thread uploads committed checkpoints, the manifest last, so
that the remote copy is committed by the same rule and needs no rename. A machine that starts without
checkpoints, or with older ones, downloads the newest one that verifies. An unreachable store causes a
warning and never delays a training step.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Collection
from pathlib import Path

import fsspec.core
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.paths import resolve
from findrec.progress import say, warn
from findrec.training.checkpoints.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    read_state,
    refuse_newer_checkpoint,
    verify_checkpoint,
)
from findrec.training.checkpoints.manifest import MANIFEST, outdated, read_entries, step_of

_COPIES = ".sending"  # hard links to files being uploaded, as the originals may be pruned meanwhile
_LEFT_S = 600.0  # the longest wait for the last upload at the end of a training


class CheckpointStore:
    """The checkpoints of one training in remote storage."""

    def __init__(self, address: str) -> None:
        """Raises `FindRecError` for an unknown kind of address or if its driver is not installed."""
        self.address = address.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise FindRecError(
                f"training.checkpoint_store={address!r} cannot be used: {error}. s3:// needs the package "
                "s3fs, gs:// needs gcsfs."
            ) from None

    @staticmethod
    def of(config: RunConfig, checkpoints: Path) -> CheckpointStore | None:
        """The store of the training whose local folder is `checkpoints`; None if none is configured."""
        address = config.training.checkpoint_store
        if address is None:
            return None
        runs, training = resolve(config.runs), checkpoints.parent
        subfolder = training.relative_to(runs).as_posix() if training.is_relative_to(runs) else config.name
        return CheckpointStore(f"{address.rstrip('/')}/{subfolder}")

    def names(self) -> list[str]:
        """Names of the committed checkpoints, oldest first."""
        self._files.invalidate_cache()
        try:
            paths = self._files.find(self._root)
        except FileNotFoundError:
            return []
        parts = [str(path).rsplit("/", 2)[-2:] for path in paths]
        found = ((step_of(folder), folder) for folder, name in parts if name == MANIFEST)
        return [folder for _, folder in sorted((step, name) for step, name in found if step is not None)]

    def push(self, path: Path) -> None:
        """Upload a committed checkpoint, replacing an earlier one of the same name."""
        target = f"{self._root}/{path.name}"
        self._drop(path.name)
        files = sorted(p for p in path.iterdir() if p.is_file() and p.name != MANIFEST)
        if isinstance(self._files, LocalFileSystem):  # e.g. a mounted disk; object stores have no folders
            self._files.makedirs(target, exist_ok=True)
        for file in [*files, path / MANIFEST]:
            self._files.put_file(str(file), f"{target}/{file.name}")

    def fetch(self, name: str, root: Path) -> Path | None:
        """Download a checkpoint to `root`; None, with a warning, if it does not verify.

        Raises `FindRecError` if it was written by a newer version.
        """
        part, path = root / f".fetching-{name}", root / name
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            problem = self._download(name, part)
            if problem is None:
                shutil.rmtree(path, ignore_errors=True)
                part.rename(path)
                return path
        finally:
            shutil.rmtree(part, ignore_errors=True)
        warn(f"WARNING: checkpoint {self.address}/{name} is not used: {problem}")
        return None

    def _download(self, name: str, part: Path) -> str | None:
        """Download a checkpoint to the folder `part`; returns why it is not valid, or None."""
        source = f"{self._root}/{name}"
        (part / MANIFEST).write_bytes(self._files.cat_file(f"{source}/{MANIFEST}"))
        refuse_newer_checkpoint(part, f"{self.address}/{name}")
        try:
            entries = read_entries(part)
        except ValueError as error:
            return str(error)
        for file in entries:
            try:
                self._files.get_file(f"{source}/{file}", str(part / file))
            except FileNotFoundError:
                return f"{file} is missing"
        refuse_newer_checkpoint(part, f"{self.address}/{name}")  # now with its state.json
        return verify_checkpoint(part)

    def fetch_newest(self, root: Path) -> None:
        """Download the newest checkpoint that verifies, unless the local disk has one as new."""
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".fetching.lock"):  # workers of one machine share the disk
            own = latest_checkpoint(root)
            for name in reversed(self.names()):
                if own is not None and (step_of(name) or 0) <= (step_of(own.name) or 0):
                    return
                say(f"fetching checkpoint {self.address}/{name}")
                if self.fetch(name, root) is not None:
                    return

    def fetch_best(self, root: Path) -> None:
        """Download the newest checkpoint and the one with the best validation, which it names."""
        self.fetch_newest(root)
        newest = latest_checkpoint(root)
        if newest is not None:
            self.fetch_missing(checkpoint_path(root, read_state(newest).best_step).name, root)

    def fetch_missing(self, name: str, root: Path) -> None:
        """Download a checkpoint that the local disk lacks, if the store has it."""
        with FileLock(root / ".fetching.lock"):
            if not (root / name).is_dir() and name in self.names():
                self.fetch(name, root)

    def prune(self, step: int, *, keep: int, protected: Collection[str]) -> None:
        """Delete the checkpoints that are `outdated` at `step`."""
        for name in outdated(self.names(), step, keep=keep, protected=protected):
            self._drop(name)

    def _drop(self, name: str) -> None:
        path = f"{self._root}/{name}"
        if self._files.exists(f"{path}/{MANIFEST}"):
            self._files.rm_file(f"{path}/{MANIFEST}")  # first, so that a partly deleted folder is not valid
        if self._files.exists(path):
            self._files.rm(path, recursive=True)


class Sender:
    """Uploads committed checkpoints in a thread; if it falls behind, only the newest one is uploaded."""

    def __init__(self, store: CheckpointStore, *, keep: int) -> None:
        self._store, self._keep = store, keep
        self._turn = threading.Condition()
        self._next: tuple[Path, Collection[str]] | None = None
        self._closed = False
        self.problem = ""  # of the latest attempt
        self._thread = threading.Thread(target=self._work, name="checkpoint-sender", daemon=True)
        self._thread.start()

    def send(self, path: Path, protected: Collection[str]) -> None:
        """Queue a committed checkpoint for upload and return at once.

        After the upload, older remote checkpoints are deleted except those named in `protected`.
        """
        copy = path.parent / _COPIES / f"{time.monotonic_ns()}" / path.name
        copy.mkdir(parents=True)
        for file in path.iterdir():
            _link(file, copy / file.name)
        with self._turn:
            skipped, self._next = self._next, (copy, protected)
            self._turn.notify_all()
        if skipped is not None:
            shutil.rmtree(skipped[0].parent, ignore_errors=True)

    def close(self) -> None:
        """Wait for the pending upload, `_LEFT_S` seconds at most."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        self._thread.join(_LEFT_S)

    def _work(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._next or self._closed)
                if self._next is None:
                    return
                (copy, protected), self._next = self._next, None
            try:
                self._store.push(copy)
                step = step_of(copy.name)
                assert step is not None
                self._store.prune(step, keep=self._keep, protected=protected)
                self.problem = ""
            except Exception as error:  # fsspec drivers raise errors of many kinds
                self.problem = f"{type(error).__name__}: {error}"
                warn(
                    f"WARNING: checkpoint {copy.name} is on disk but could not be sent to "
                    f"{self._store.address}: {self.problem.splitlines()[0][:300]}. Training goes on."
                )
            shutil.rmtree(copy.parent, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
